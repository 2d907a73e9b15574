"""The benchmark's arithmetic, by hand; what it measures is no test's business."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT

from benchmarks.processes import launches, table
from benchmarks.timing import in_turn, ratio, spread


def test_spread_and_ratio() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (3.0, 2.5, 3.5)  # 2, 3, 4: round by round


def test_works_take_turns() -> None:
    done: list[str] = []
    seconds = in_turn({name: lambda name=name: done.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert done == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_processes_share_the_same_cores() -> None:
    for cores in (1, 2, 8):
        used = {processes * threads for processes, threads, _ in list(launches(cores).values())[:-1]}
        assert used == {max(2, cores)}


def test_the_table_of_processes() -> None:
    steps = {"1 process": [10.0, 20.0], "2 processes": [5.0, 30.0]}  # ratios 0.5 and 1.5
    one, two, checkpoint = table({"small": {"step_ms": steps, "checkpoint_ms": [30.0, 30.0]}})[1:]
    assert one.split()[:3] == ["1.00", "1", "process"]
    assert two.split() == ["1.00", "2", "processes", "17.5", "ms", "a", "step", "(11.2", "to", "23.8)"]
    assert checkpoint.split()[0] == "2.00"


def test_an_unknown_part_is_told() -> None:
    command = [sys.executable, "-m", "scripts.benchmark", "proceses"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "error: no part is called proceses; there are processes\n"
