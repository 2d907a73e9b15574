"""A run from the command line to its directory: real files, real processes, real signals."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, WITH_PARAMETERS, made_up_text

from command_line import parse
from hardware import Hardware
from program import exit_code, shown
from tracking.metrics import read_metrics
from train import main
from training.checkpoint import existing, read_state
from training.failures import out_of_memory

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

DROPOUT = {f"regularizers__{name}_dropout": 0.2 for name in ("embedding", "attention", "residual", "mlp")}


def weights(run: Path, step: int | None = None) -> str:
    """The sha256 of the model's bytes at the last (or a given) step."""
    checkpoints = {int(path.name[5:]): path for path in existing(run / "checkpoints")}
    path = checkpoints[max(checkpoints) if step is None else step]
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, times aside."""
    records = read_metrics(run)
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The run of ``tiny(**DROPOUT)``, left alone from start to end."""
    from conftest import TINY

    directory = tmp_path_factory.mktemp("reference")
    knobs = TINY | {"data.path": str(text_file), "run.dir": "runs", "run.name": "tiny"}
    knobs |= {key.replace("__", "."): str(value) for key, value in DROPOUT.items()}
    flags = [f"--{key}={value}" for key, value in knobs.items()]
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], cwd=directory, check=True, capture_output=True)
    return directory / "runs/tiny"


@pytest.mark.fault(3)
def test_what_a_run_leaves(train: Train, tiny: Flags, tmp_path: Path) -> None:
    ended = train(tiny(data__test_fraction=0.05))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "runs/tiny"
    for word in ("best val loss", "bits per byte", "tokens per second", "test loss", "sample", str(run), "curves.png"):
        assert word in ended.stdout, word
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 24
    assert summary["tokens"] == 24 * 8 * 32
    for key in ("best/val/loss", "final/val/loss", "test/loss", "tokens_per_second", "hardware", "versions"):
        assert key in summary
    assert 1e8 < summary["peak_memory_bytes"] < 1e10  # torch alone takes some 300 MB
    records = read_metrics(run)
    assert [record["step"] for record in records] == [1, 4, 8, 12, 16, 20, 24]
    assert all({"step", "tokens", "epoch"} <= record.keys() for record in records)
    evaluated = records[-1]
    names = {"loss", "perplexity", "bits_per_byte", "accuracy", "ece", "brier", "entropy", "log_z"}
    assert {f"val/{name}" for name in names} | {"gap/loss", "train/loss", "train/objective"} <= evaluated.keys()
    assert evaluated["val/loss"] < 4.5 < records[0]["train/loss"]
    for name in ("curves.png", "samples.txt", "config.yaml", "best.json", "last.json", "tokenizer.json"):
        assert (run / name).stat().st_size > 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "last.json").read_text())["checkpoint"] == "step_00000024"
    again = train(tiny(data__test_fraction=0.05))
    assert again.returncode == 0 and "finished already" in again.stdout


@pytest.mark.fault(1)
@pytest.mark.parametrize("step", [9, 16, 21])
def test_killed_and_started_again_it_ends_the_same(
    step: int, reference: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    """kill -9 once metrics.jsonl shows a step, then the same command: same model bytes, same metrics."""
    flags = tiny(tracking__log_every=1, checkpoint__every=5, **DROPOUT)
    run = tmp_path / "runs/tiny"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(run)):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    assert process.wait() == -signal.SIGKILL
    assert json.loads((run / "summary.json").read_text())["status"] == "running"
    ended = train(flags)
    assert ended.returncode == 0 and "goes on from step" in ended.stdout, ended.stderr
    assert weights(run) == weights(reference)
    ours = [record for record in numbers(run) if record["step"] in {1, 4, 8, 12, 16, 20, 24}]
    assert ours == numbers(reference)
    assert [record["step"] for record in numbers(run)] == list(range(1, 25))


@pytest.mark.fault(12)
def test_asked_to_stop_it_saves_and_goes_on_the_same(
    reference: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    flags = tiny(**DROPOUT)
    run = tmp_path / "runs/tiny"
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    while not read_metrics(run) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "preempted" and 1 <= summary["steps"] < 24
    assert read_state(existing(run / "checkpoints")[0])["step"] == summary["steps"]
    assert train(flags).returncode == 0
    assert weights(run) == weights(reference) and numbers(run) == numbers(reference)


def test_others_may_read_what_a_run_writes_as_they_may_read_any_file(reference: Path) -> None:
    usual = reference.parent / "usual"
    usual.touch()
    modes = {path.name: oct(path.stat().st_mode) for path in reference.rglob("*") if path.is_file()}
    assert set(modes.values()) == {oct(usual.stat().st_mode)}, modes


def test_a_terminal_does_not_obey_a_sample() -> None:
    """Bell, escape and the like are shown; tabs, lines and letters of any script stay."""
    assert shown("a\x07\x1b[2J\x9b0m\tb\né 日 \x7f\r") == r"a\x07\x1b[2J\x9b0m" + "\tb\né 日 " + r"\x7f\r"


def test_watching_changes_no_weight(reference: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    """How often it evaluates, logs or saves leaves every bit of the weights alone."""
    changes = {"evaluation__every": 5, "tracking__log_every": 1, "checkpoint__every": 7, "checkpoint__keep": 5}
    assert train(tiny(**DROPOUT, **changes)).returncode == 0
    assert weights(tmp_path / "runs/tiny", 24) == weights(reference, 24)


def test_a_checkpoint_is_saved_when_the_last_is_too_long_ago(
    reference: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    """After every step, when any time is too long; and no bit of the weights is another."""
    flags = tiny(**DROPOUT, evaluation__every=24, checkpoint__minutes=1e-6, checkpoint__keep=30)
    assert train(flags).returncode == 0
    run = tmp_path / "runs/tiny"
    assert sorted(read_state(path)["step"] for path in existing(run / "checkpoints")) == list(range(1, 25))
    assert weights(run, 24) == weights(reference, 24)


@pytest.mark.parametrize(("steps", "traced"), [(3, [5, 6, 7]), (100, [*range(5, 25)])])
def test_a_profile_changes_no_weight_and_holds_its_steps(
    steps: int, traced: list[int], reference: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    """The run has 24 steps; of more there are the ones up to its end, and what comes after it, which is no step.

    Steps of the trace are numbered from 0.
    """
    ended = train(tiny(**DROPOUT, run__profile=steps))
    assert ended.returncode == 0 and "profile.json; open it at https://ui.perfetto.dev" in ended.stdout
    assert weights(tmp_path / "runs/tiny", 24) == weights(reference, 24)
    events = json.loads((tmp_path / "runs/tiny/profile.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::scaled_dot_product_attention" in names or "aten::baddbmm" in names
    found = {name for name in names if str(name).startswith("ProfilerStep#")}
    assert found - {"ProfilerStep#24"} == {f"ProfilerStep#{step - 1}" for step in traced}
    assert train(tiny(**DROPOUT)).returncode == 0, "a run is found again without its profile"


@pytest.mark.fault(29)
def test_a_changed_config_is_refused_and_nothing_is_touched(train: Train, tiny: Flags, tmp_path: Path) -> None:
    assert train(tiny(training__max_steps=3)).returncode == 0
    run = tmp_path / "runs/tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    changes = {"model__d_ff": 16, "optimizer__lr": 0.5, "training__global_batch_size": 4, "run__seed": 1}
    changes |= {"data__train_tokens": 5000, "data__path": __file__, "regularizers__l2": 0.1}
    refused = train(tiny(training__max_steps=3, **changes))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "optimizer.lr: the run has 0.002, asked for is 0.5" in refused.stderr
    assert refused.stderr.count("the run has") == len(changes)
    assert all(f"  {knob.replace('__', '.')}: the run has " in refused.stderr for knob in changes)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    # What only watches the run may change.
    assert (
        train(tiny(training__max_steps=3, tracking__log_every=7, checkpoint__every=2, data__corpus="auto")).returncode
        == 0
    )


def test_starting_afresh_moves_the_old_run_aside(train: Train, tiny: Flags, tmp_path: Path) -> None:
    assert train(tiny(training__max_steps=2, run__resume="never")).returncode == 0  # there is nothing to move yet
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny"]
    before = weights(tmp_path / "runs/tiny")
    (tmp_path / "runs/tiny/config.yaml").unlink()  # nor does a lost config make its checkpoints another run's
    assert train(tiny(training__max_steps=2, run__resume="never", run__seed=1)).returncode == 0
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert runs == ["tiny", "tiny.previous-1"]
    assert weights(tmp_path / "runs/tiny") != before == weights(tmp_path / "runs/tiny.previous-1")


def test_a_short_run_draws_its_pictures_once_at_its_end(interrupted: Path, train: Train, breakable: Flags) -> None:
    """Not at each evaluation, while all processes wait; of a killed run metrics.jsonl has the numbers."""
    assert any("val/loss" in record for record in numbers(interrupted))
    assert not (interrupted / "curves.png").exists()
    assert train(breakable()).returncode == 0
    assert (interrupted / "curves.png").exists() and (interrupted / "reliability.png").exists()


@pytest.mark.parametrize(("watched", "pause", "expected"), [(True, -1, 4), (True, 1000, 1), (False, -1, 1)])
def test_pictures_are_drawn_on_the_way_for_a_person_only(
    watched: bool, pause: float, expected: int, tiny: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluation.judge.SECONDS_BETWEEN_PICTURES", pause)
    monkeypatch.setattr("pictures.curves", lambda records, path, *_: drawn.append(path))
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: watched)
    with redirect_stdout(screen):
        assert exit_code(main, tiny(training__max_steps=3)) == 0
    assert len(drawn) == expected


@pytest.mark.fault(15)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    reference: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    flags = tiny(**DROPOUT)
    assert train(flags).returncode == 0
    run = tmp_path / "runs/tiny"
    os.truncate(run / "checkpoints/step_00000024/model.safetensors", 100)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"status": "running"}))
    ended = train(flags)
    assert ended.returncode == 0 and "step_00000024/model.safetensors has 100 bytes" in ended.stderr
    assert "goes on from step 16" in ended.stdout
    assert weights(run) == weights(reference) and numbers(run) == numbers(reference)


@pytest.mark.fault(29)
def test_other_data_under_the_same_name_are_refused(train: Train, tiny: Flags, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(made_up_text(5000, seed=1))
    flags = tiny(data__path=text, training__max_steps=3)
    assert train(flags).returncode == 0
    text.write_text(made_up_text(5000, seed=2))
    summary = tmp_path / "runs/tiny/summary.json"
    summary.write_text(summary.read_text().replace("finished", "running"))
    refused = train(flags)
    assert refused.returncode == 2 and "was trained on the corpus" in refused.stderr


@pytest.mark.fault(27)
def test_an_edited_shard_is_refused(train: Train, tiny: Flags, tmp_path: Path) -> None:
    assert train(tiny(training__max_steps=1)).returncode == 0
    shard = next((tmp_path / "corpora").glob("*/train-00000.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(content)
    refused = train(tiny(training__max_steps=1, run__name="other"))
    assert refused.returncode == 2 and "train-00000.safetensors" in refused.stderr and "delete" in refused.stderr


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"too short " * 20, "model.context_length"),
        (None, "missing.txt"),
        (b"one NUL byte\0" + b"." * 9000, "byte 12 is NUL"),
        (bytes(range(1, 256)) * 40, "is not UTF-8 text"),
        (Path, "is a directory"),
    ],
    ids=["empty", "short", "missing", "NUL", "binary", "directory"],
)
def test_bad_text(content: Any, word: str, train: Train, tiny: Flags, tmp_path: Path) -> None:
    path = tmp_path / "missing.txt"
    if content is Path:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused = train(tiny(data__path=path, model__context_length=256))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and word in refused.stderr


@pytest.mark.fault(31)
def test_invalid_utf8_is_replaced_counted_and_told(train: Train, tiny: Flags, tmp_path: Path) -> None:
    path = tmp_path / "broken.txt"
    path.write_bytes(made_up_text(5000).encode()[:2500] + b"\xff\xfe\r\n" + made_up_text(5000).encode())
    ended = train(tiny(data__path=path, training__max_steps=1))
    assert ended.returncode == 0 and "2 invalid bytes became U+FFFD; 1 CRLF became LF" in ended.stdout


def test_the_best_checkpoint_outlives_newer_ones_and_is_tested(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """A learning rate that soon ruins the model: the first evaluation is the best of eight, one checkpoint is kept."""
    knobs = {"optimizer__lr": 3, "schedule__warmup_steps": 7, "training__max_steps": 8, "checkpoint__keep": 1}
    assert train(tiny(**knobs, evaluation__every=1, evaluation__sample_tokens=0)).returncode == 0
    run = tmp_path / "runs/tiny"
    assert sorted(path.name for path in existing(run / "checkpoints")) == ["step_00000001", "step_00000008"]
    assert json.loads((run / "best.json").read_text())["checkpoint"] == "step_00000001"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best/step"] == 1 and summary["final/val/loss"] > 2 * summary["best/val/loss"]
    assert summary["test/loss"] == pytest.approx(summary["best/val/loss"], rel=0.1)


@pytest.mark.fault(22)
def test_two_runs_in_one_directory(train: Train, tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(training__max_steps=100000)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    run = tmp_path / "runs/tiny"
    while not read_metrics(run) and process.poll() is None:
        time.sleep(0.01)
    refused = train(flags)
    assert refused.returncode == 2 and f"process {process.pid} on " in refused.stderr
    process.kill()
    process.wait()
    again = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    before = len(read_metrics(run))
    while len(read_metrics(run)) <= before and again.poll() is None:
        time.sleep(0.01)
    assert again.poll() is None  # the lock was freed by kill -9
    again.kill()
    again.wait()


def test_start_from_the_weights_of_another_run(reference: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    ended = train(tiny(run__init_from=reference, training__max_steps=1, optimizer__lr=1e-9))
    assert ended.returncode == 0, ended.stderr
    first, last = read_metrics(tmp_path / "runs/tiny")[0], read_metrics(reference)[-1]
    assert first["val/loss"] == pytest.approx(last["val/loss"], abs=1e-4)
    knobs = {f"regularizers__{name}": value for name, value in WITH_PARAMETERS.items()}
    with_more = knobs | {"run__name": "more", "training__max_steps": 1, "optimizer__lr": 1e-9}
    assert train(tiny(run__init_from=reference, **with_more)).returncode == 0
    again = {"run__init_from": tmp_path / "runs/more", "run__name": "again"}
    assert train(tiny(**with_more | again)).returncode == 0
    for name in ("more", "again"):  # and back: what regularizers train begins anew
        assert read_metrics(tmp_path / "runs" / name)[0]["val/loss"] == pytest.approx(first["val/loss"], abs=1e-5)
    refused = train(tiny(run__init_from=reference, run__name="other", model__n_layers=3))
    assert refused.returncode == 2 and "n_layers" in refused.stderr


def test_a_gradient_that_is_not_finite_changes_nothing(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """At an absurd learning rate the loss overflows: steps are skipped, counted, and the run gives up by itself."""
    ended = train(tiny(optimizer__lr=1e30, training__max_nonfinite=3, schedule__name="constant"))
    assert ended.returncode == 4 and "3 times in a row" in ended.stderr
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("place", "knobs", "way"),
    [
        ("training.step.differentiate", {}, "use --training.micro_batch_size=4, or --model.checkpoint_activations=b"),
        ("training.step.differentiate", {"training__micro_batch_size": 1}, "use a smaller model.context_length or"),
        ("evaluation.evaluate.hidden_states", {}, "16 sequences at once do not fit"),
        ("evaluation.evaluate.hidden_states", {"evaluation__batch_size": 6}, "use --evaluation.batch_size=3"),
    ],
)
def test_a_lack_of_memory_names_the_knob_and_the_next_size(
    place: str, knobs: dict[str, int], way: str, train: Train, tiny: Flags, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(place, lambda *_: torch.empty(2**60, dtype=torch.uint8))
    ended = train(tiny(**knobs))
    assert ended.returncode == 4 and "Traceback" not in ended.stderr
    assert "do not fit into the memory of cpu" in ended.stderr and way in ended.stderr
    assert way in json.loads((tmp_path / "runs/tiny/summary.json").read_text())["error"]


def test_the_next_size_is_one_that_the_processes_can_share() -> None:
    """Of 12 sequences two processes take 6, 3, 2 or 1 each at once, and mixup needs a pair."""
    problem = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    on_two = Hardware(0, 2, torch.device("cuda"), "bf16", True, 1)
    for size, knobs, expected in ((6, [], "micro_batch_size=3"), (2, ["--regularizers.mixup_alpha=1"], "a smaller")):
        config = parse(["--training.global_batch_size=12", f"--training.micro_batch_size={size}", *knobs])
        assert expected in str(out_of_memory(problem, config, on_two))
    assert out_of_memory(RuntimeError("another"), config, on_two) is None


def test_a_mistake_leaves_the_name_free(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """What was refused before it trained stores nothing: the corrected command works, a good run stays in place."""
    assert train(tiny(training__max_steps=1, data__path=tmp_path / "typo.txt")).returncode == 2
    assert train(tiny(training__max_steps=1, run__init_from=tmp_path / "typo")).returncode == 2
    assert train(tiny(training__max_steps=1)).returncode == 0
    assert train(tiny(training__max_steps=1, data__path=tmp_path / "typo.txt", run__resume="never")).returncode == 2
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny"]


def test_a_knob_that_the_stored_config_does_not_know_was_at_its_default(
    train: Train, tiny: Flags, tmp_path: Path
) -> None:
    assert train(tiny(training__max_steps=1)).returncode == 0
    stored = tmp_path / "runs/tiny/config.yaml"
    stored.write_text("".join(line for line in stored.read_text().splitlines(True) if "z_loss" not in line))
    refused = train(tiny(training__max_steps=1, regularizers__z_loss=0.1))
    assert refused.returncode == 2 and "regularizers.z_loss: the run has 0.0" in refused.stderr
    assert train(tiny(training__max_steps=1)).returncode == 0


def test_pointers_are_mended_and_damaged_checkpoints_set_aside(train: Train, tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(checkpoint__keep=1)
    assert train(flags).returncode == 0
    run = tmp_path / "runs/tiny"
    best = (run / "best.json").read_text()
    (run / "best.json").write_text(best.replace("24", "08"))
    summary = run / "summary.json"
    summary.write_text(summary.read_text().replace("finished", "running"))
    assert train(flags).returncode == 0
    assert (run / "best.json").read_text() == best
    # A damaged newest one is kept under another name, so that pruning cannot prefer it to a good one.
    good = run / "checkpoints/step_00000024"
    os.rename(good, run / "checkpoints/kept")
    subprocess.run(["cp", "-r", run / "checkpoints/kept", good], check=True)
    os.rename(run / "checkpoints/kept", run / "checkpoints/step_00000030")
    summary.write_text(summary.read_text().replace("finished", "running"))
    ended = train(flags)
    assert ended.returncode == 0 and "is of step 24" in ended.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000024", "step_00000030.damaged"]


def test_a_reader_that_leaves_does_not_end_the_run(tiny: Flags, tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'train.py'} {' '.join(tiny())} | head -9"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=60)
    deadline = time.monotonic() + 60
    summary = tmp_path / "runs/tiny/summary.json"
    while time.monotonic() < deadline and '"running"' in summary.read_text():
        time.sleep(0.1)
    assert json.loads(summary.read_text())["status"] == "finished"
