"""Checkpoints that a thread writes while training goes on, as on GPUs, or each process in part, as of large models."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import changed, end, start
from oracle import same_as
from test_shards import SHARED, run

from tracking.load_run import load_model
from tracking.run_directory import read_summary
from tracking.saving import in_main_memory
from training.checkpoint import existing, newest, problem_of, read_tensors

Flags = Callable[..., list[str]]

BACKGROUND = ("hardware", "Hardware.saves_in_background = property(lambda self: True)")
ROWS = ("training.layout", "SAVED_WHOLE = 0")
FILES = ("model", "optimizer", "average")


@pytest.mark.fault(2)
def test_a_kill_while_training_goes_on(tiny: Flags, tmp_path: Path) -> None:
    """The save of step 8 dies with the process; the run ends with the bytes of one that waited for its saves."""
    flags, slow = tiny(checkpoint__every=4), changed(tmp_path, BACKGROUND)
    assert end(start(tiny(run__name="alone", checkpoint__every=4), tmp_path))[0] == [0]
    assert end(start(flags, tmp_path, program=slow, fault="save-file:0:8:kill"))[0] == [-signal.SIGKILL]
    assert newest(tmp_path / "runs/tiny/checkpoints")[0] == 4
    codes, output, errors = end(start(flags, tmp_path, program=slow))
    assert codes == [0] and "goes on from step 4" in output, errors
    same_as(tmp_path / "runs/alone", tmp_path / "runs/tiny")
    assert not list((tmp_path / "runs/tiny/checkpoints").glob(".*"))


def test_what_a_thread_writes_is_of_the_step_of_the_save() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    copies = in_main_memory({"weight": weight})
    with torch.no_grad():
        weight += 1
    assert copies["weight"].tolist() == [0, 0, 0] and not copies["weight"].requires_grad


@pytest.mark.fault(20)
def test_a_thread_whose_disk_is_full(tiny: Flags, tmp_path: Path) -> None:
    """It is known before the next save, and the last one is waited for."""
    flags = tiny(checkpoint__every=8, evaluation__every=24, training__max_failed_saves=3)
    process = start(flags, tmp_path, program=changed(tmp_path, BACKGROUND))
    resource.prlimit(process[0].pid, resource.RLIMIT_FSIZE, (150_000, 150_000))
    codes, _, errors = end(process)
    assert codes == [4] and "Traceback" not in errors
    assert "step 8: cannot save" in errors and "training goes on (2 failed in a row)" in errors
    assert "error: step 24: cannot save the checkpoint" in errors
    assert read_summary(tmp_path / "runs/tiny")["status"] == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_each_process_writes_its_rows(background: bool, tiny: Flags, tmp_path: Path) -> None:
    """Put together they are the tensors that the main process would have gathered, for whoever reads them."""
    knobs = SHARED | {"run__shard": "all", "regularizers__early_stopping_patience": 0}
    whole = run(tiny(run__name="whole", **knobs), tmp_path, 2)
    program = changed(tmp_path, ROWS, *[BACKGROUND] * background)
    codes, _, errors = end(start(tiny(**knobs), tmp_path, 2, program=program))
    assert codes == [0, 0], errors
    rows = tmp_path / "runs/tiny"
    for ours, theirs in zip(existing(whole / "checkpoints"), existing(rows / "checkpoints"), strict=True):
        assert problem_of(theirs) is None
        assert {path.name for path in theirs.glob("model*")} == {
            f"model.rows-{part}-of-2.safetensors" for part in (0, 1)
        }
        for file in FILES:
            expected, found = read_tensors(ours, file), read_tensors(theirs, file)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[name], found[name]) for name in expected), file
    assert all(
        torch.equal(one, other)
        for one, other in zip(load_model(whole)[0].parameters(), load_model(rows)[0].parameters(), strict=True)
    )


@pytest.mark.slow
@pytest.mark.fault(2)
def test_rows_of_copies_killed_and_started_again(tiny: Flags, tmp_path: Path) -> None:
    """Two copies in two parts: one copy writes. Killed on either of its processes, it ends as if it had not been."""
    knobs, program = (
        SHARED | {"run__shard": "node", "checkpoint__every": 4, "training__hang_timeout": 20},
        changed(tmp_path, ROWS),
    )
    alone = run(tiny(run__name="alone", **knobs), tmp_path, 4, per_machine=2)
    for fault in ("save-file:1:8:kill", "save-begin:0:12:kill", "save-renamed:0:16:kill"):
        codes, _, _ = end(start(tiny(**knobs), tmp_path, 4, fault, per_machine=2, program=program))
        assert codes[int(fault.split(":")[1])] == -signal.SIGKILL and 0 not in codes
    codes, _, errors = end(start(tiny(**knobs), tmp_path, 4, per_machine=2, program=program))
    assert codes == [0] * 4, errors
    ours, theirs = (existing(path / "checkpoints")[0] for path in (alone, tmp_path / "runs/tiny"))
    assert len(list(theirs.glob("model*"))) == 2
    for file in FILES:
        expected, found = read_tensors(ours, file), read_tensors(theirs, file)
        assert all(torch.equal(expected[name], found[name]) for name in expected), file


@pytest.mark.fault(20)
def test_one_process_cannot_write_its_rows(tiny: Flags, tmp_path: Path) -> None:
    """The main process is told by the loss of the directory, without waiting, and commits nothing."""
    flags = tiny(training__micro_batch_size=4, checkpoint__every=8, evaluation__every=24, run__shard="all")
    processes = start(flags, tmp_path, 2, program=changed(tmp_path, ROWS))
    resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (60_000, 60_000))
    codes, _, errors = end(processes)
    assert codes == [4, 4] and "Traceback" not in errors
    assert "rank 1 cannot write its part of the checkpoint of step 8" in errors
    assert "step 8: cannot save the checkpoint" in errors and "could not write its part" in errors
    assert not existing(tmp_path / "runs/tiny/checkpoints")
