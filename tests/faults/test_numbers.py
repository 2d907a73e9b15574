"""Numbers that go wrong: on one rank, in the loss, in the weights (cases 32 to 34)."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import end, start
from oracle import same_as

from tracking.metrics import read_metrics
from tracking.run_directory import read_summary
from training import progress
from training.checkpoint import existing, read_state, read_tensors
from training.spikes import NEEDED, WINDOW, is_spike

Flags = Callable[..., list[str]]
Train = Callable[..., subprocess.CompletedProcess[str]]

SHARED = {"training__micro_batch_size": 4, "tracking__log_every": 1}


@pytest.mark.slow
@pytest.mark.fault(32)
@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_anywhere(
    shard: str, tiny: Flags, tmp_path: Path
) -> None:
    """Step 9 is skipped by both: weights and moments stay those of step 8, and the run goes on."""
    knobs = SHARED | {"checkpoint__every": 1, "checkpoint__keep": 30, "run__shard": shard}
    codes, _, errors = end(start(tiny(**knobs), tmp_path, 2, fault="gradient:1:9:nan"))
    assert codes == [0, 0] and "step 9: the gradient is not finite; the step is skipped (1 in a row)" in errors
    checkpoints = {int(path.name[5:]): path for path in existing(tmp_path / "runs/tiny/checkpoints")}
    for file in ("model", "optimizer"):
        eight, nine, ten = (read_tensors(checkpoints[step], file) for step in (8, 9, 10))
        assert all(torch.equal(eight[name], nine[name]) for name in eight)
        assert any(not torch.equal(nine[name], ten[name]) for name in nine)
    assert read_state(checkpoints[9])["nonfinite"] == 1 and read_state(checkpoints[10])["nonfinite"] == 0
    record = read_metrics(tmp_path / "runs/tiny")[8]
    assert record["step"] == 9 and record["train/loss"] is None  # what is not a number is logged as null


@pytest.mark.fault(32)
def test_a_state_that_is_not_finite_is_never_saved(tiny: Flags, tmp_path: Path) -> None:
    """At an absurd learning rate the weights overflow: the run stops, and its newest checkpoint is finite."""
    flags = tiny(optimizer__lr=3e38, schedule__name="constant", checkpoint__every=1, regularizers__weight_decay=0)
    codes, _, errors = end(start(flags, tmp_path))
    assert codes == [4] and "Traceback" not in errors and "finite" in errors
    assert read_summary(tmp_path / "runs/tiny")["status"] == "failed"
    for path in existing(tmp_path / "runs/tiny/checkpoints"):
        for file in ("model", "optimizer"):
            assert all(value.isfinite().all() for value in read_tensors(path, file).values())


@pytest.mark.slow
@pytest.mark.fault(33)
def test_a_spike_is_told_logged_and_remembered_over_a_resume(tiny: Flags, tmp_path: Path) -> None:
    knobs = {"tracking__log_every": 100, "checkpoint__every": 4}
    assert end(start(tiny(run__name="alone", **knobs), tmp_path, fault="gradient:0:20:spike"))[0] == [0]
    flags = tiny(**knobs)
    assert end(start(flags, tmp_path, fault="weights:0:19:kill"))[0] == [-9]
    # The history of 16 losses, by which a spike at step 20 is told, comes from the checkpoint of step 16.
    codes, _, errors = end(start(flags, tmp_path, fault="gradient:0:20:spike"))
    assert codes == [0] and "step 20: the objective jumped to" in errors
    same_as(tmp_path / "runs/alone", tmp_path / "runs/tiny")
    records = read_metrics(tmp_path / "runs/tiny")
    assert [record["step"] for record in records if record.get("train/loss", 0) > 1e4] == [20]
    state = read_state(existing(tmp_path / "runs/tiny/checkpoints")[0])
    assert state["spikes"] == 1 and len(state["losses"]) == 24 and max(state["losses"]) < 10


@pytest.mark.fault(33)
def test_what_is_a_spike() -> None:
    history: list[float] = []
    falling = [5 * math.exp(-step / 40) + 0.05 * math.sin(step) for step in range(200)]
    assert not any(is_spike(loss, history) for loss in falling)
    assert is_spike(1e4, history) and is_spike(1e2, history) and is_spike(1e4, history)
    assert not is_spike(falling[-1], history) and not is_spike(float("nan"), history)
    short: list[float] = []
    assert not any(is_spike(9.0 if step == 5 else 1.0, short) for step in range(NEEDED)) and len(short) == NEEDED
    # A level of 1 without any noise: half a nat above it is no spike yet, and 1,000 steps are not all remembered.
    level = [1.0] * 1000
    assert not is_spike(1.49, level) and len(level) == WINDOW and is_spike(2.6, level)
    # A loss that moves to a higher level for good is soon the usual.
    level = [1.0 + 0.01 * math.sin(step) for step in range(128)]
    assert sum(is_spike(3.0, level) for _ in range(128)) < 20


@pytest.mark.slow
@pytest.mark.fault(34)
def test_weights_that_differ_name_the_rank(tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(checkpoint__every=4, **SHARED)
    codes, _, errors = end(start(flags, tmp_path, 2, fault="weights:1:6:change"))
    assert codes == [4, 4] and "Traceback" not in errors
    assert "step 8: the weights of rank 1 differ from the others' in embedding.weight" in errors
    assert [path.name for path in existing(tmp_path / "runs/tiny/checkpoints")] == ["step_00000004"]
    assert end(start(flags, tmp_path, 2))[0] == [0, 0]  # the way out: start it again


def test_fp16_resumes_bit_for_bit_with_its_loss_scale(
    tiny: Flags, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is doubled after every three steps here, so that the gradient overflows now and then, which is told."""
    monkeypatch.setattr(progress, "STEPS_TO_DOUBLE", 3)
    whole = train(tiny(run__name="whole", run__precision="fp16"))
    assert whole.returncode == 0 and "skipped (fp16, loss scale" in whole.stderr
    monkeypatch.setenv("WELLPOSED_FAULT", "save-begin:0:16:raise")
    assert train(tiny(run__name="broken", run__precision="fp16")).returncode == 4
    monkeypatch.delenv("WELLPOSED_FAULT")
    assert train(tiny(run__name="broken", run__precision="fp16")).returncode == 0
    same_as(tmp_path / "runs/whole", tmp_path / "runs/broken")


def test_fp16_trains_as_well_as_fp32(tiny: Flags, train: Train, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        assert train(tiny(run__name=precision, run__precision=precision)).returncode == 0
    (full, half) = (read_metrics(tmp_path / "runs" / name)[-1] for name in ("fp32", "fp16"))
    assert half["val/loss"] != full["val/loss"] and half["val/loss"] == pytest.approx(full["val/loss"], abs=0.02)
    assert half["train/grad_norm"] == pytest.approx(full["train/grad_norm"], rel=0.1)
