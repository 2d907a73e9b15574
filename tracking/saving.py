"""The checkpoints that a run saves: agreed on by all processes, written while a GPU trains on, told when refused."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

import files
from config import Config, Failure
from hardware import Hardware
from program import warn
from training import checkpoint
from training.failures import check_weights
from training.learner import Learner
from training.processes import gathered, on_main
from training.progress import Plan, Progress

Tensors = Iterator[tuple[str, dict[str, torch.Tensor]]]  # of a checkpoint's files


class Saver:
    """Saves a run's checkpoints into ``path``/checkpoints, and points at them.

    On a GPU the weights are copied into the main memory, and a thread writes them from there while training goes on.
    What became of it is known, on all processes together, before the next save and at the end.

    ``before`` is called before each, on the main process, and may raise OSError, too.
    ``best`` is the best evaluation whose weights are on the disk.
    """

    def __init__(self, path: Path, config: Config, hardware: Hardware, before: Callable[[], None]) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self.config, self.hardware, self._before = config, hardware, before
        self.best: dict[str, Any] | None = None
        self.failed = 0  # in a row
        self.saved_at = time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saving")
        self._being_saved: tuple[Progress, Future[str]] | None = None

    def close(self) -> None:
        """Return when nothing is being written any more."""
        self._writer.shutdown()

    @property
    def due(self) -> bool:
        """Whether checkpoint.minutes have passed since the last save."""
        minutes = self.config.checkpoint.minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def save(self, progress: Progress, learner: Learner, plan: Plan) -> None:
        """Commit a checkpoint, point at it, and only then prune older ones.

        A disk that refuses is told, and training goes on; Failure is raised when it refused too often in a row, or
        when no later checkpoint would follow.
        """
        self._settle(progress)
        self.saved_at = time.monotonic()
        check_weights(learner.layout, progress.step)
        shares = gathered(torch.tensor([progress.samples % 2**62]), self.hardware)
        samples = sum(shares.flatten().tolist()) % 2**62
        progress.samples = samples if self.hardware.main else 0
        layout, in_background = learner.layout, self.hardware.saves_in_background
        begun, refused = False, ""
        if layout.saves_rows:  # into a directory that has to be there before any process writes
            begun, refused = on_main(self.hardware, self._begin, progress.step)
        tensors = learner.tensors(progress.step)
        if in_background:
            tensors = iter([(name, in_main_memory(contents)) for name, contents in tensors])
        writes = self.hardware.main or (layout.saves_rows and layout.copy == 0)
        if refused or (layout.saves_rows and not begun) or not writes:
            deque(tensors, maxlen=0)  # what is shared out is gathered by all
            work: Callable[[], str] = partial(str, refused)
        elif self.hardware.main:
            work = partial(self._write, deepcopy(progress), tensors, plan, begun)
        else:
            work = partial(self._write_rows, tensors, progress.step)
        self._being_saved = deepcopy(progress), self._writer.submit(work) if in_background else done(work)
        if progress.over(plan) or not in_background:
            self._settle(progress, last=progress.over(plan))

    def _begin(self, step: int) -> tuple[bool, str]:
        """Whether the checkpoint has to be written, and why the machine refused."""
        try:
            return checkpoint.begin(self.checkpoints, step), ""
        except OSError as problem:
            return False, str(problem)

    def _write(self, progress: Progress, tensors: Tensors, plan: Plan, begun: bool) -> str:
        """Save; returns why the machine refused, empty when it is done."""
        try:
            self._before()
            patience = self.hardware.hang_timeout / 2
            checkpoint.save(self.checkpoints, tensors, progress.stored(), begun, patience)
            point_at(self.path, progress)
            best = {progress.best["step"]} if progress.best else set()
            checkpoint.prune(self.checkpoints, self.config.checkpoint.keep, best | plan.milestones)
        except OSError as problem:
            return str(problem)
        finally:
            deque(tensors, maxlen=0)  # the others go through all of them, also where the disk refused the first
        return ""

    def _write_rows(self, tensors: Tensors, step: int) -> str:
        """Write this process's part of what the main process commits, and tells of."""
        try:
            checkpoint.write_rows(self.checkpoints, tensors, step)
        except OSError as problem:
            warn(f"rank {self.hardware.rank} cannot write its part of the checkpoint of step {step}: {problem}")
        return ""

    def _settle(self, progress: Progress, last: bool = False) -> None:
        """Take in what became of the checkpoint that was being saved; ``last``: no later one follows it."""
        if self._being_saved is None:
            return
        (saved, future), self._being_saved = self._being_saved, None
        wait([future])
        refused = on_main(self.hardware, future.result)
        if not refused:
            self.failed, self.best = 0, saved.best
            return
        self.failed += 1
        if progress.best == saved.best:
            progress.best = self.best  # whose weights are on the disk
        if self.failed >= self.config.training.max_failed_saves or last:
            way = "make room and start again to go on from the last checkpoint"
            raise Failure(f"step {saved.step}: {refused}; {way}")
        if self.hardware.main:
            warn(f"step {saved.step}: {refused}; training goes on ({self.failed} failed in a row)")


def done(work: Callable[[], str]) -> Future[str]:
    """What ``work`` gives, done now."""
    future = Future[str]()
    future.set_result(work())
    return future


def in_main_memory(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors, which training does not change."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def point_at(path: Path, progress: Progress) -> None:
    """Make last.json, and best.json if there is a best, of the run at ``path`` name their checkpoints."""
    for name, values in (("last", {"step": progress.step}), ("best", progress.best)):
        if values is not None:
            named = {"checkpoint": checkpoint.directory_for(Path(), values["step"]).name}
            files.write_json(path / f"{name}.json", named | values)
