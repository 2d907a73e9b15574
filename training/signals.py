"""Signals that stop a run: the step is finished, a checkpoint is saved, and the run ends as preempted."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from program import STOP_SIGNALS, is_main_process


class StopSignals:
    """While the block lasts, STOP_SIGNALS and Ctrl-C set ``received``; a second Ctrl-C leaves at once, unsaved."""

    def __init__(self) -> None:
        self.received = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self.before = {number: signal.signal(number, self._receive) for number in (*STOP_SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            raise KeyboardInterrupt
        self.received = True
        if is_main_process():
            print("\nstopping: this step is finished and saved; Ctrl-C again leaves without that", flush=True)
