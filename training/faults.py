"""Faults made on purpose, for the tests of what a run survives: WELLPOSED_FAULT=point:rank:step:action.

The points are the calls of ``inject_fault``. The actions: ``kill`` (SIGKILL), ``stop`` (SIGSTOP, a hang), ``sleep`` (a
hang of this thread alone), ``raise``; on
the tensors given ``nan`` (they become not finite), ``spike`` (times 10,000) and ``change`` (the first element
of the first one grows by one). Without the variable nothing happens.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is heavy, and a study asks checkpoints for their state without it
    from torch import Tensor


def inject_fault(point: str, step: int, tensors: Iterable[Tensor | None] = ()) -> None:
    """Do what WELLPOSED_FAULT asks for at this point, on this rank, in this step."""
    asked = os.environ.get("WELLPOSED_FAULT")
    if not asked:
        return
    named, rank, when, action = asked.split(":")
    if (named, rank, when) != (point, os.environ.get("RANK", "0"), str(step)):
        return
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    elif action == "sleep":
        time.sleep(10**6)
    elif action == "raise":
        raise RuntimeError(f"a fault was asked for: {asked}")
    import torch

    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if action == "change" and number == 0:
                tensor.view(-1)[0] += 1
            elif action in ("nan", "spike"):
                tensor.mul_(float("nan") if action == "nan" else 1e4)
