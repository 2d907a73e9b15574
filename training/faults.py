"""One fault point for tests: a run that breaks at a chosen place, chosen from outside.

WELLPOSED_FAULT=point:rank:step:action lets the process of that rank kill itself, stop, or raise when it comes to that
point of that step. Nothing but the tests sets the variable; without it ``strike`` does nothing.
"""

from __future__ import annotations

import os
import signal


def strike(point: str, step: int) -> None:
    """Do what WELLPOSED_FAULT asks for, if it names this point, this step and this process."""
    where, _, action = os.environ.get("WELLPOSED_FAULT", "").rpartition(":")
    if where != f"{point}:{os.environ.get('RANK', '0')}:{step}":
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise RuntimeError(f"fault injected at {where}")
    else:
        raise ValueError(f"WELLPOSED_FAULT names the action {action!r}; there are kill, stop and raise")
