"""A sign of life of each process, by which the others tell who hangs.

A process that waits for another in a collective of NCCL can say nothing: it waits in C++, and NCCL's watchdog ends it
there when the time is over. So a thread of each process tells the store that it lives and how far it has come, and
looks at the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

import torch.distributed as dist

from program import FAILED
from training.learner import Learner

PATIENCE = 0.9  # of the hang timeout: a collective that waits is given up when all of it is over
BEATS = 20  # in one hang timeout


@contextmanager
def watched(learner: Learner, failed: Callable[[str], None]) -> Iterator[None]:
    """End this process, with an error that names the rank and goes to ``failed``, if another hangs in the block."""
    over = Event()
    if learner.hardware.world > 1 and learner.hardware.store is not None:
        Thread(target=_watch, args=(learner, failed, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(learner: Learner, failed: Callable[[str], None], over: Event) -> None:
    hardware = learner.hardware
    keys = [f"alive/{rank}" for rank in range(hardware.world)]
    told, since, beats = [""] * hardware.world, [time.monotonic()] * hardware.world, 0
    own, own_since = learner.steps_computed, time.monotonic()
    while not over.wait(hardware.hang_timeout / BEATS):
        now, beats = time.monotonic(), beats + 1
        if learner.steps_computed != own:
            own, own_since = learner.steps_computed, now
        try:
            hardware.store.set(keys[hardware.rank], f"{beats} {own}")
            for rank, key in enumerate(keys):
                words = hardware.store.get(key).decode() if hardware.store.check([key]) else ""
                if words != told[rank]:
                    told[rank], since[rank] = words, now
        except dist.DistError:  # the store is gone, and with it whoever could be named
            return
        limit = PATIENCE * hardware.hang_timeout
        silent = [rank for rank in range(hardware.world) if now - since[rank] > limit]
        behind = [rank for rank in range(hardware.world) if told[rank] and int(told[rank].split()[1]) < own]
        hanging = silent or (behind if now - own_since > limit else [])
        if hanging and not over.is_set():
            names = ", ".join(map(str, hanging))
            error = f"rank {names} hangs: nothing came from it for {hardware.hang_timeout} s"
            failed(error)
            print(f"error: {error}. Start again to go on from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(FAILED)
