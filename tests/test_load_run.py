"""A run directory on disk, and what the commands that read it make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITH_PARAMETERS
from safetensors import SafetensorError
from tokenizers import Tokenizer

from command_line import dump
from config import BadInput, Config, Failure, Model, Regularizers
from data.tokenizers import byte_tokenizer, load_tokenizer
from model import huggingface
from model.gpt import GPT
from model.huggingface import write_directory
from scripts import export_huggingface
from scripts import generate as generate_script
from tracking import load_run
from tracking.load_run import initial_weights, load_model, run_tokenizer
from training import checkpoint

SMALL = Model(family="qwen3", n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, context_length=32)


def weights(step: int, model: Model = SMALL) -> dict[str, torch.Tensor]:
    """Weights that tell by their values of which step they are."""
    return GPT(model, 257).initialize(step).state_dict()


def make_run(
    directory: Path, model: Model = SMALL, best: int | None = 10, average: bool = False, **regularizers: Any
) -> Path:
    """A run with checkpoints of the steps 10 and 20, written as train.py writes them."""
    config = Config(model=model, regularizers=Regularizers(**regularizers))
    run = directory / "run"
    for step in (10, 20):
        own, others = (GPT(model, 257, config.regularizers).initialize(n).state_dict() for n in (step, step + 1))
        tensors = {"model": own} | ({"average": others} if average else {})
        checkpoint.save(run / "checkpoints", tensors.items(), {"step": step, "best": None})
    (run / "config.yaml").write_text(dump(config))
    corpus = directory / "corpora" / "some-text"
    corpus.mkdir(parents=True)
    byte_tokenizer().save(str(corpus / "tokenizer.json"))
    byte_tokenizer().save(str(run / "tokenizer.json"))
    (run / "summary.json").write_text(json.dumps({"status": "finished", "corpus_directory": str(corpus)}))
    if best is not None:
        pointer = {"checkpoint": f"step_{best:08d}", "step": best, "val/loss": 3.0}
        (run / "best.json").write_text(json.dumps(pointer))
    return run


def step_of(model: GPT) -> int:
    """The step whose weights a model has."""
    for step in (10, 11, 20, 21):
        if all(torch.equal(tensor, weights(step, model.config)[name]) for name, tensor in model.state_dict().items()):
            return step
    raise AssertionError("the weights are of no step")


def test_vector_math_is_settled_before_a_model_computes_its_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(load_run, "settle_vector_math", lambda: done.append("settled"))
    monkeypatch.setattr(load_run, "GPT", lambda *arguments: done.append("built") or GPT(*arguments))
    load_model(make_run(tmp_path))
    assert done == ["settled", "built"]


def damage(file: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# ---------------------------------------------------------------------------------------------- load_model


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    model, config, corpus = load_model(run)
    assert step_of(model) == 10 and not model.training
    assert config == Config(model=SMALL) and corpus == tmp_path / "corpora" / "some-text"
    assert run_tokenizer(run) == run / "tokenizer.json"


def test_a_checkpoint_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    assert step_of(load_model(run / "checkpoints" / "step_00000020")[0]) == 20
    monkeypatch.chdir(run / "checkpoints")
    assert step_of(load_model("step_00000020")[0]) == 20
    assert run_tokenizer("step_00000020") == run / "tokenizer.json"


def test_a_run_knows_the_end_of_text_of_its_tokenizer_s_files(
    tiny: Callable[..., list[str]], train: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A token that we would not take for one is carried from the tokenizer's directory to corpus, run and export."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().to_str().replace("<|endoftext|>", "<|bos|>"))
    (tmp_path / "theirs").mkdir()
    tokenizer.save(str(tmp_path / "theirs/tokenizer.json"))
    (tmp_path / "theirs/tokenizer_config.json").write_text('{"eos_token": "<|bos|>"}')
    ended = train(tiny(data__tokenizer=tmp_path / "theirs", training__max_steps=1))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "runs/tiny"
    assert export_huggingface.main([str(run), str(tmp_path / "export")]) == 0
    (corpus,) = (tmp_path / "corpora").glob("text-*")
    for directory in (corpus, run, tmp_path / "export"):
        assert load_tokenizer(str(directory))[1] == 256
    assert json.loads((tmp_path / "export/config.json").read_text())["eos_token_id"] == 256


@pytest.mark.parametrize("pointer", [None, "{", "[]", '{"checkpoint": "../../elsewhere"}', '{"checkpoint": 3}'])
def test_without_a_best_one_the_newest_is_loaded(pointer: str | None, tmp_path: Path) -> None:
    run = make_run(tmp_path, best=None)
    if pointer is not None:
        (run / "best.json").write_text(pointer)
    assert step_of(load_model(run)[0]) == 20


def test_averaged_weights_are_preferred(tmp_path: Path) -> None:
    assert step_of(load_model(make_run(tmp_path, average=True))[0]) == 11


def test_a_stray_file_beside_a_checkpoint_is_no_average(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "checkpoints" / "step_00000010" / "average.safetensors").write_bytes(b"not listed in the manifest")
    assert step_of(load_model(run)[0]) == 10


def test_damage_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    damage(run / "checkpoints" / "step_00000010" / "model.safetensors")
    assert step_of(load_model(run)[0]) == 20
    assert "step_00000010/model.safetensors is damaged" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"step_00000010/model\.safetensors is damaged"):
        load_model(run / "checkpoints" / "step_00000010")
    damage(run / "checkpoints" / "step_00000020" / "model.safetensors")
    with pytest.raises(BadInput, match="can be trusted"):
        load_model(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"neither a run directory \(there is no config.yaml\)"):
        load_model(tmp_path)
    with pytest.raises(BadInput, match="neither a run directory"):
        load_model(tmp_path / "nothing")
    run = make_run(tmp_path)
    (run / "summary.json").write_text("{}")
    with pytest.raises(BadInput, match=r"summary\.json does not name the corpus"):
        load_model(run)
    (run / "config.yaml").write_text("model: {n_layers: 2}")
    (run / "summary.json").write_text('{"corpus_directory": "/gone"}')
    with pytest.raises(BadInput, match=r"does not fit .*config\.yaml"):
        load_model(run)
    (run / "config.yaml").write_text("model: {n_layer: 2}")
    with pytest.raises(BadInput, match=r"unknown key 'model.n_layer' in .*config\.yaml; did you mean model\.n_layers"):
        load_model(run)
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text(dump(Config(model=SMALL)))
    with pytest.raises(BadInput, match="has no checkpoint yet"):
        load_model(tmp_path / "young")


def test_the_tokenizer_of_the_corpus_is_the_second_choice(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "tokenizer.json").unlink()
    corpus = tmp_path / "corpora" / "some-text"
    assert run_tokenizer(run) == corpus / "tokenizer.json"
    (corpus / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        run_tokenizer(run)


# ---------------------------------------------------------------------------------------------- initial_weights


def test_weights_start_another_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    hub = tmp_path / "hub"
    write_directory(load_model(run)[0], run / "tokenizer.json", hub, 256)
    other = make_run(tmp_path / "other", **WITH_PARAMETERS)  # what its regularizers trained stays behind
    for path, step in [(run, 10), (run / "checkpoints" / "step_00000020", 20), (hub, 10), (other, 10)]:
        found = initial_weights(path, SMALL, 257)
        expected = weights(step)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), path


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"family": "llama"}, "--model.family=qwen3"),
        ({"n_layers": 2}, "--model.n_layers=1"),
        ({"d_model": 32}, "--model.d_model=16"),
        ({"n_kv_heads": 2}, "--model.n_kv_heads=1"),
        ({"head_dim": 16}, "--model.head_dim=8"),
        ({"d_ff": 40}, "--model.d_ff=64"),
        ({"tie_embeddings": False}, "--model.tie_embeddings=true"),
        ({"norm_eps": 1e-3}, "--model.norm_eps=1e-05"),
        ({"rope_theta": 500.0}, "--model.rope_theta=10000.0"),
    ],
)
@pytest.mark.parametrize("source", ["run", "hub"])
def test_each_difference_is_named_with_the_flag_that_removes_it(
    change: dict[str, Any], flag: str, source: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    write_directory(load_model(run)[0], run / "tokenizer.json", tmp_path / "hub", 256)
    asked = Model(**{**SMALL.model_dump(), **change})
    with pytest.raises(BadInput) as refusal:
        initial_weights(tmp_path / source, asked, 300)
    assert flag in str(refusal.value)
    assert "vocabulary has 257 entries, the corpus 300" in str(refusal.value)


def test_a_longer_context_starts_from_shorter_ones_only_without_a_table_of_positions(tmp_path: Path) -> None:
    longer = {"context_length": 64}
    assert initial_weights(make_run(tmp_path / "a"), SMALL.model_copy(update=longer), 257)
    gpt2 = Model(family="gpt2", n_layers=1, d_model=16, n_heads=2, context_length=32)
    with pytest.raises(BadInput, match=r"--model\.context_length=32"):
        initial_weights(make_run(tmp_path / "b", gpt2), gpt2.model_copy(update=longer), 257)


def test_a_name_of_the_hub_is_refused_with_a_way_out() -> None:
    with pytest.raises(BadInput, match=r"run\.init_from = openai-community/gpt2: .* downloaded first"):
        initial_weights("openai-community/gpt2", SMALL, 257)


# ---------------------------------------------------------------------------------------------- the commands


def test_export_writes_what_transformers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path), tmp_path / "exports" / "mine"
    assert export_huggingface.main([str(run), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "largest difference of logits to transformers" in printed and str(out) in printed
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    snippet = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    scope: dict[str, Any] = {}
    exec("\n".join(snippet), scope)  # the printed snippet, as a user would paste it
    ids = scope["tokenizer"]("hello", return_tensors="pt").input_ids
    model = load_model(run)[0]
    with torch.no_grad():
        expected = model.logits(model(ids))
        torch.testing.assert_close(scope["model"](ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("average", [False, True])
def test_what_regularizers_trained_is_not_exported(average: bool, tmp_path: Path) -> None:
    """The export equals, byte for byte, that of a run that never had them; so does what is generated."""
    without = make_run(tmp_path / "without", average=average)
    run = make_run(tmp_path / "with", average=average, **WITH_PARAMETERS)
    assert len(load_model(run)[0].auxiliary)
    prompt = torch.tensor([[1, 2, 3]])
    logits = [model.logits(model(prompt)) for model in (load_model(path)[0] for path in (run, without))]
    assert torch.equal(*logits)
    for path in (run, without):
        assert export_huggingface.main([str(path), str(path / "export")]) == 0  # which compares the logits, too
    assert (run / "export/model.safetensors").read_bytes() == (without / "export/model.safetensors").read_bytes()


def test_export_overwrites_nothing(tmp_path: Path) -> None:
    run, out = make_run(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("kept")
    with pytest.raises(BadInput, match="is not an empty directory"):
        export_huggingface.main([str(run), str(out)])
    with pytest.raises(BadInput, match="is not an empty directory"):
        export_huggingface.main([str(run), str(out / "precious")])
    assert (out / "precious").read_text() == "kept"
    (out / "precious").unlink()
    assert export_huggingface.main([str(run), str(out)]) == 0, "an empty one is filled"


def test_export_leaves_nothing_when_the_logits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = make_run(tmp_path), tmp_path / "exports" / "mine"
    # Gate and up change places, as a wrong table would have it: it loads without complaint.
    monkeypatch.setitem(huggingface.MODULES["qwen3"], "mlp.input", ["mlp.up_proj", "mlp.gate_proj"])
    with pytest.raises(Failure, match="nothing written"):
        export_huggingface.main([str(run), str(out)])
    assert list(out.parent.iterdir()) == []


def test_export_says_what_to_do_about_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(BadInput, match=r"No space left on device.*check permissions and space"):
        export_huggingface.main([str(make_run(tmp_path)), str(tmp_path / "exports" / "mine")])
    assert list((tmp_path / "exports").iterdir()) == []


def test_export_says_when_it_could_not_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export_huggingface, "find_spec", lambda name: None)
    assert export_huggingface.main([str(make_run(tmp_path)), str(tmp_path / "out")]) == 0
    assert "the logits were NOT compared" in capsys.readouterr().out


def test_generate_prints_the_same_text_for_the_same_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path))
    texts = []
    for arguments in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"]):
        assert generate_script.main([run, "--prompt", "import", "--tokens", "40", *arguments]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and all(text.startswith("import") for text in texts)
    assert generate_script.main([run, "--tokens", "5", "--samples", "3", "--top_k", "4", "--top_p", "0.5"]) == 0
    assert capsys.readouterr().out.count("--- sample") == 3


def test_mistakes_end_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    for script, arguments in [("generate", ["nowhere"]), ("export_huggingface", ["nowhere", str(tmp_path / "out")])]:
        done = subprocess.run(
            [sys.executable, "-m", f"scripts.{script}", *arguments], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    with pytest.raises(BadInput, match="top_p"):
        generate_script.main(["nowhere", "--top_p", "7"])
    with pytest.raises(BadInput, match="--samples 0: give at least 1"):
        generate_script.main(["nowhere", "--samples", "0"])
