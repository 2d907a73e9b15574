"""run.profile: what the processor and the GPU do during some steps, as a file that trace viewers read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import files
from program import warn

STEPS_BEFORE = 3  # in which memory, caches and compiled code settle; one more warms the profiler up


@contextmanager
def profiled(steps: int, file: Path) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step; so many ``steps``, from the fifth on, are written to ``file``.

    Fewer, if the block ends before. Nothing that is computed changes.
    """
    if not steps:
        yield lambda: None
        return

    def write(trace: torch.profiler.profile) -> None:
        try:
            with files.replacing(file) as temporary:
                trace.export_chrome_trace(str(temporary))
            print(f"profile    {file}; open it at https://ui.perfetto.dev or chrome://tracing", flush=True)
        except (OSError, RuntimeError) as problem:
            warn(f"no profile was written: {problem}")

    when = torch.profiler.schedule(wait=STEPS_BEFORE, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=when, on_trace_ready=write, record_shapes=True) as profiler:
        yield profiler.step
    if profiler.step_num <= STEPS_BEFORE + 1:
        warn("run.profile: this start ended before its fifth step, with which a profile begins")
