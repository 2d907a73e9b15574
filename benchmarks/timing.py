"""Times of things done in turn, so that a machine whose speed drifts slows all of them alike, and runs of train.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import Failure

ROOT = Path(__file__).parent.parent
Spread = tuple[float, float, float]


def in_turn(works: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds that each work took, once per round; ``warmup`` rounds before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in tqdm(range(-warmup, rounds), disable=None, leave=False, desc="rounds"):
        for name, work in works.items():
            taken = seconds_of(work)
            if round_ >= 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(work: Callable[..., object], *arguments: Any) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def spread(values: list[float]) -> Spread:
    """Median, and the quartiles below and above it."""
    middle, low, high = np.quantile(values, (0.5, 0.25, 0.75)).tolist()
    return middle, low, high


def ratio(numerator: list[float], denominator: list[float]) -> Spread:
    """Median and quartiles of the ratio, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def told(measured: Spread, unit: str = "", digits: int = 2) -> str:
    """Median and quartiles as the tables have them: ``17.5 ms (11.2 to 23.8)``."""
    middle, low, high = measured
    return f"{middle:8.{digits}f}{unit} ({low:.{digits}f} to {high:.{digits}f})"


@contextmanager
def trained(*words: str, processes: int = 1) -> Iterator[Path]:
    """The directory of a run of train.py with these words, each step of it logged, which is then thrown away.

    Raises Failure with what the run said when it does not end well.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, *torchrun, "train.py", *words, f"--run.dir={scratch}", "--run.name=timed"]
        command += ["--tracking.wandb=disabled", "--tracking.log_every=1"]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ended.returncode:
            raise Failure(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
        yield Path(scratch) / "timed"
