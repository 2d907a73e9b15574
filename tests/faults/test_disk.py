"""What the disk does to a run: torn lines, times that jump, debris."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from oracle import Flags, Train, same_as, shuffle_times

from tracking.metrics import read_metrics


@pytest.mark.slow
@pytest.mark.fault(24)
@pytest.mark.parametrize("tail", [b'{"step": 20, "tok', b'{"step": 20}\n{"step": 99, "tokens": 0}\n\xff\xfe\0\0\0'])
def test_a_torn_line_is_trimmed_and_lines_past_the_checkpoint_are_written_again(
    tail: bytes, whole_run: Path, interrupted: Path, train: Train, breakable: Flags
) -> None:
    assert [record["step"] for record in read_metrics(interrupted)][-1] == 20  # the checkpoint is of step 16
    with open(interrupted / "metrics.jsonl", "ab") as file:
        file.write(tail)
    ended = train(breakable())
    assert ended.returncode == 0 and "goes on from step 16\n" in ended.stdout, ended.stderr
    lines = (interrupted / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 25))
    same_as(whole_run, interrupted)


@pytest.mark.slow
@pytest.mark.fault(25)
def test_the_newest_checkpoint_is_that_of_the_highest_step_whatever_the_times_say(
    whole_run: Path, interrupted: Path, train: Train, breakable: Flags, tmp_path: Path
) -> None:
    """Each file of run and corpus moves by up to a year, and the checkpoints change places in time."""
    shuffle_times(tmp_path)
    older, newer = (interrupted / f"checkpoints/step_{step:08d}" for step in (12, 16))
    for path in [older, *older.iterdir()]:
        os.utime(path, (newer.stat().st_mtime + 1e7,) * 2)
    ended = train(breakable())
    assert ended.returncode == 0 and "goes on from step 16\n" in ended.stdout, ended.stderr
    same_as(whole_run, interrupted)
