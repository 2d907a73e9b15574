"""Ensembles against float64 by hand, and as a user evaluates, saves and samples them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, flags_of, in_this_process, made_up_text
from torch import Tensor

from config import BadInput
from data.shards import Corpus
from evaluation.ensemble import Member, Scores, evaluate_ensemble, load_members
from hardware import Hardware
from model.generate import log_mean
from scripts import evaluate as evaluate_script
from scripts import generate as generate_script
from tracking.load_run import Listed, list_members, load_corpus, read_list

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]
ALONE = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)

# Different seeds, width, context length and micro-batches; the last two have averaged weights.
RUNS: dict[str, dict[str, Any]] = {
    "a": {"run.seed": 0},
    "b": {"run.seed": 1, "model.d_model": 16, "model.context_length": 24, "training.micro_batch_size": 2},
    "c": {"run.seed": 2, "regularizers.ema_decay": 0.7, "optimizer.lr": 0.02},
    "d": {"run.seed": 3, "regularizers.ema_decay": 0.7, "checkpoint.at": "[8,16]", "optimizer.lr": 0.01},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A directory with corpora/ and the finished runs of RUNS."""
    directory = tmp_path_factory.mktemp("ensemble")
    for name, knobs in RUNS.items():
        flags = flags_of(TINY | {key: str(value) for key, value in knobs.items()}, text_file, directory, run__name=name)
        assert in_this_process(flags, directory).returncode == 0
    return directory


@pytest.fixture(autouse=True)
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def paths(names: str) -> list[str]:
    return [f"runs/{name}" for name in names]


def members_of(names: str, *weights: float) -> tuple[list[Member], Corpus]:
    listed = list_members(paths(names))
    listed = [one.model_copy(update={"weight": weight}) for one, weight in zip(listed, weights, strict=True)]
    return load_members(listed), load_corpus("runs/a")


def probabilities(member: Member, stream: Tensor) -> Tensor:
    """Of every token after the first, (N, V) float64, window by window of the member's own context."""
    length, rows = member.config.model.context_length, []
    with torch.no_grad():
        for start in range(0, len(stream) - 1, length):
            window = stream[start : start + length + 1]
            rows.append(member.model.logits(member.model(window[None, :-1]))[0].double().softmax(-1))
    return torch.cat(rows)


def plain(members: list[Member], corpus: Corpus, split: str) -> list[dict[str, float]]:
    """What ``after`` should be, but ECE: all probabilities at once, in float64."""
    text = corpus.split(split)
    stream = torch.from_numpy(text.read(0, text.n_tokens))
    target_N1, after = stream[1:, None], []
    p_MNV = torch.stack([probabilities(member, stream) for member in members])
    for count in range(1, len(members) + 1):
        share_M11 = torch.tensor([member.weight for member in members[:count]], dtype=torch.float64)[:, None, None]
        share_M11 = share_M11 / share_M11.sum()
        p_NV = (share_M11 * p_MNV[:count]).sum(0)
        right_N = p_NV.gather(1, target_N1)[:, 0]
        each = -p_MNV[:count].gather(2, target_N1.expand(count, -1, -1)).log().mean(1).flatten()
        expected = (share_M11[..., 0] * torch.special.entr(p_MNV[:count]).sum(-1)).sum(0).mean().item()
        one_hot_NV = torch.nn.functional.one_hot(target_N1[:, 0], p_NV.shape[1])
        loss, entropy = -right_N.log().mean().item(), torch.special.entr(p_NV).sum(-1).mean().item()
        after.append(
            {
                "loss": loss,
                "perplexity": torch.tensor(loss).exp().item(),
                "bits_per_byte": loss / 0.6931471805599453,  # one document of bytes: each target is a byte
                "accuracy": (p_NV.argmax(1) == target_N1[:, 0]).double().mean().item(),
                "brier": (p_NV - one_hot_NV).square().sum(1).mean().item(),
                "entropy": entropy,
                "gain": (share_M11.flatten() * each).sum().item() - loss,
                "expected_entropy": expected,
                "mutual_information": entropy - expected,
            }
        )
    return after


@pytest.mark.parametrize("rows", [5, 10_000])
def test_it_is_the_plain_computation_in_float64(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other sizes, context lengths and weights; in chunks of few tokens and of many."""
    monkeypatch.setattr("evaluation.evaluate.CHUNK_ELEMENTS", rows * 257)
    members, corpus = members_of("abc", 1.0, 2.5, 0.5)
    found, expected = evaluate_ensemble(members, corpus, "val", ALONE), plain(members, corpus, "val")
    for ours, theirs in zip(found.after, expected, strict=True):
        assert {name: value for name, value in ours.items() if name != "ece"} == pytest.approx(
            theirs, rel=1e-6, abs=2e-6
        )
    assert found.after[0]["gain"] == pytest.approx(0, abs=1e-12) and found.after[2]["gain"] > 0.02
    assert found.after[2]["mutual_information"] > 0.01


def test_the_order_of_members_does_not_matter_when_all_are_in() -> None:
    one, other = (evaluate_ensemble(*members_of(names, 1, 1, 1), "test", ALONE) for names in ("abc", "cab"))
    assert one.after[-1] == pytest.approx(other.after[-1], rel=1e-6)
    assert one.after[0] != pytest.approx(other.after[0], rel=1e-3)
    assert one.members == pytest.approx([other.members[1], other.members[2], other.members[0]], rel=1e-12)


def test_members_that_are_the_same_teach_each_other_nothing() -> None:
    found = evaluate_ensemble(*members_of("ccc", 1, 1, 1), "val", ALONE)
    for metrics in found.after:
        assert metrics["mutual_information"] == pytest.approx(0, abs=1e-6)
        assert metrics["gain"] == pytest.approx(0, abs=1e-6)
        assert metrics == pytest.approx(found.after[0], abs=1e-5)


def test_a_target_that_fp32_cannot_hold_has_its_loss() -> None:
    """Below exp(-103) a probability is 0 in fp32."""
    members, corpus = members_of("ab", 1, 1)
    with torch.no_grad():
        for member in members:
            member.model.embedding.weight.mul_(600)
    found, expected = evaluate_ensemble(members, corpus, "val", ALONE), plain(members, corpus, "val")
    assert found.after[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5) and found.after[1]["loss"] > 60


# ---------------------------------------------------------------------------------------------- the commands


def evaluated(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert evaluate_script.main(list(words)) == 0
    return capsys.readouterr().out


def test_an_ensemble_of_one_is_the_run_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """To the last digit that is printed."""
    alone = evaluated(capsys, "runs/a")
    ensemble = evaluated(capsys, "runs/a", "--ensemble")
    assert "loss" in alone and "val, 1" in ensemble
    results = json.loads(Path("runs/a/evaluation.json").read_text())
    for split in ("val", "test"):
        (ours,) = json.loads(Path("runs/a/ensemble.json").read_text())[split]["after"]
        theirs = results[split]["model"]
        for name in theirs.keys() - {"log_z"}:
            assert f"{ours[name]:.4f}" == f"{theirs[name]:.4f}", name


def test_it_is_saved_read_again_and_writes_text(capsys: pytest.CaptureFixture[str]) -> None:
    told = evaluated(capsys, *paths("abc"), "--ensemble", "--save", "saved/three.json")
    content = json.loads(Path("saved/three.json").read_text())
    assert [member["run"] for member in content["members"]] == paths("abc")
    assert Path("saved/three.png").read_bytes().startswith(b"\x89PNG")
    losses = [metrics["loss"] for metrics in content["val"]["after"]]
    assert len(losses) == 3 and all(f"{loss:.4f}" in told for loss in losses + content["val"]["members"])
    content["members"][0]["weight"] = 3.0
    Path("saved/three.json").write_text(json.dumps(content))
    told = evaluated(capsys, "saved/three.json", "--split", "val", "--max_tokens", "200")
    again = json.loads(Path("saved/three.json").read_text())
    assert again["members"] == content["members"] and again["max_tokens"] == 200 and "weight 3:" in told
    expected = evaluate_ensemble(*members_of("abc", 3, 1, 1), "val", ALONE, 200)
    assert Scores(**again["val"]).after[-1] == pytest.approx(expected.after[-1], rel=1e-9)

    assert generate_script.main(["saved/three.json", "--prompt", "the", "--tokens", "40"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_snapshots_of_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    snapshots = [f"runs/d/checkpoints/step_{step:08d}" for step in (8, 16, 24)]
    evaluated(capsys, *snapshots, "--ensemble", "--split", "val")
    content = json.loads(Path("runs/d/ensemble.json").read_text())
    assert [member["checkpoint"] for member in content["members"]] == [Path(path).name for path in snapshots]
    first, _, last = content["val"]["members"]
    assert first > last


def test_twice_the_same_run_writes_what_it_writes(capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(capsys, "runs/c", "runs/c", "--ensemble", "--split", "val", "--max_tokens", "40", "--save", "twice.json")
    texts = []
    for what in ("runs/c", "twice.json"):
        assert generate_script.main([what, "--prompt", "a cat", "--tokens", "80", "--seed", "4"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and len(texts[0]) > 40


def test_the_mean_of_logits_is_that_of_their_probabilities() -> None:
    """p = 0.9 and 0.5 with weights 3 and 1: 0.8. Logits would give 0.839."""
    logits = [torch.tensor([[0.9, 0.1]]).log() + 7, torch.tensor([[0.5, 0.5]]).log() - 2]
    assert log_mean(logits, [3.0, 1.0]).exp().flatten().tolist() == pytest.approx([0.8, 0.2], rel=1e-6)
    assert log_mean(logits[:1], [3.0]) is logits[0]


# ---------------------------------------------------------------------------------------------- mistakes


def test_runs_of_another_corpus_are_refused(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(made_up_text(seed=1))
    for name, knobs in {"text": {}, "tokenizer": {"data__tokenizer": "bpe", "data__vocab_size": 257 + 8}}.items():
        flags = flags_of(TINY | {"training.max_steps": "1"}, other, home, run__name=name, **knobs)
        assert in_this_process(flags, home).returncode == 0
    with pytest.raises(BadInput, match=r"runs/text and runs/a cannot be averaged: the corpus of one is"):
        evaluate_script.main(["runs/a", "runs/text", "--ensemble"])
    with pytest.raises(BadInput, match=r"runs/tokenizer and runs/b cannot be averaged: the tokenizer of one is"):
        evaluate_script.main(["runs/b", "runs/tokenizer", "--ensemble"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a", "runs/b"], "need --ensemble"),
        (["runs/a", "--save", "x.json"], "need --ensemble"),
        (["runs/a", "--ensemble", "--mc_samples", "3"], "neither --mc_samples nor --ood"),
        (["runs/a", "--ensemble", "--save", "x.png"], "give the name of a .json file"),
        (["runs/a", "runs/nowhere", "--ensemble"], "runs/nowhere is neither a run directory"),
        (["runs/a/config.yaml"], "runs/a/config.yaml is no list of members"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        evaluate_script.main(words)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"members": []}',
        '{"members": [{"run": "runs/a"}]}',
        '{"members": [{"run": "runs/a", "checkpoint": "step_00000024", "weight": 0}]}',
        '{"members": [{"run": "runs/a", "checkpoint": "../step_00000024"}]}',
    ],
)
def test_a_list_that_makes_no_sense_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "ensemble.json").write_text(content)
    with pytest.raises(BadInput, match=r"ensemble\.json"):
        read_list(tmp_path / "ensemble.json")


def test_a_member_weighs_1_unless_it_is_told_otherwise() -> None:
    assert Listed(run="a", checkpoint="step_00000001").weight == 1
