"""Asked to stop, a run stops with everything saved, and goes on the same (cases 12 to 14)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT
from launch import end, start, wait_until
from oracle import Train, same_as

from tracking.metrics import read_metrics
from tracking.run_directory import read_summary
from training.checkpoint import existing, problem_of, read_state

Flags = Callable[..., list[str]]

SHARED = {"training__micro_batch_size": 4, "tracking__log_every": 1, "regularizers__residual_dropout": 0.2}


@pytest.mark.slow
@pytest.mark.fault(12, 14)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(shard: str, number: int, tiny: Flags, tmp_path: Path) -> None:
    knobs = SHARED | {"run__shard": shard}
    assert end(start(tiny(run__name="alone", **knobs), tmp_path, 2))[0] == [0, 0]
    run = tmp_path / "runs/tiny"
    processes = start(tiny(**knobs), tmp_path, 2)
    wait_until(lambda: len(read_metrics(run)) >= 3, processes[0])
    processes[1].send_signal(number)
    codes, output, errors = end(processes)
    assert codes == [3, 3], errors
    assert "The same command goes on from here" in output and "Traceback" not in errors
    summary = read_summary(run)
    assert summary["status"] == "preempted" and 3 <= summary["steps"] < 24
    newest = existing(run / "checkpoints")[0]
    assert problem_of(newest) is None and read_state(newest)["step"] == summary["steps"]
    assert end(start(tiny(**knobs), tmp_path, 2))[0] == [0, 0]
    same_as(tmp_path / "runs/alone", run)


@pytest.mark.slow
@pytest.mark.fault(13)
@pytest.mark.parametrize("moment", ["start-up", "save"])
def test_signals_at_bad_moments(moment: str, tiny: Flags, tmp_path: Path) -> None:
    """At any moment of the start-up, or twice during a save: one valid checkpoint or none, and then the same end."""
    assert end(start(tiny(run__name="alone", **SHARED), tmp_path))[0] == [0]
    run = tmp_path / "runs/tiny"
    flags = tiny(checkpoint__every=1, **SHARED)
    for attempt in range(6):
        (process,) = start(flags, tmp_path)
        if moment == "start-up" and attempt == 0:
            wait_until((run / "lock").exists, process)
        elif moment == "start-up":
            time.sleep(0.3 + 0.5 * attempt)
        else:
            wait_until(lambda: list((run / "checkpoints").glob(".saving_*")), process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        codes, _, errors = end([process])
        # In its first moments the interpreter knows no signals of ours yet; nothing exists then.
        before_us = (
            moment == "start-up" and attempt > 0 and codes == [-signal.SIGTERM] and not (run / "summary.json").exists()
        )
        assert codes == [3] or (moment == "start-up" and codes == [0]) or before_us, (codes, errors)
        assert "Traceback" not in errors
        assert all(problem_of(path) is None for path in existing(run / "checkpoints"))
    assert end(start(flags, tmp_path))[0] == [0]
    same_as(tmp_path / "runs/alone", run)


STRIKE = """
import os, signal, sys

class DuringImport:  # asked for every module, in the midst of importing torch for this one
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGTERM)
            print("the import goes on", file=sys.stderr)

sys.meta_path.insert(0, DuringImport())
"""


@pytest.mark.fault(13)
def test_a_signal_waits_until_torch_is_imported(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """An exception raised there can pass through torch's C++ part, which then aborts the process."""
    (tmp_path / "sitecustomize.py").write_text(STRIKE)
    ended = train(tiny(), PYTHONPATH=str(tmp_path))
    assert (ended.returncode, ended.stderr) == (3, "the import goes on\ninterrupted\n")


@pytest.mark.slow
@pytest.mark.fault(12)
@pytest.mark.parametrize("nohup", [False, True])
def test_the_terminal_closes(nohup: bool, tiny: Flags, tmp_path: Path) -> None:
    """The run saves, stops and goes on when asked; under nohup it goes on by itself."""
    assert end(start(tiny(run__name="alone", **SHARED), tmp_path))[0] == [0]
    run = tmp_path / "runs/tiny"
    terminal, ours = os.openpty()
    command = [*["nohup"] * nohup, sys.executable, str(ROOT / "train.py"), *tiny(**SHARED)]
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=lambda: os.login_tty(ours))
    os.close(ours)

    def far_enough() -> bool:
        os.set_blocking(terminal, False)
        with suppress(OSError):  # nothing to read; or nohup let it go
            os.read(terminal, 2**16)  # else it fills, and the run waits
        return len(read_metrics(run)) >= 3

    wait_until(far_enough, process)
    os.close(terminal)
    assert process.wait(60) == (0 if nohup else 3)
    assert (read_summary(run)["steps"] == 24) is nohup
    assert end(start(tiny(**SHARED), tmp_path))[0] == [0]
    same_as(tmp_path / "runs/alone", run)


def test_a_second_ctrl_c_leaves_at_once(tiny: Flags, tmp_path: Path) -> None:
    (process,) = start(tiny(training__max_steps=100_000, evaluation__every=100_000), tmp_path)
    wait_until(lambda: read_metrics(tmp_path / "runs/tiny"), process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    codes, _, errors = end([process])
    assert codes == [3] and "Traceback" not in errors
