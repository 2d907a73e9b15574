"""Processes that do not outlive the one that started them, and what this machine has to share among them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from program import end_with_parent

ROOT = Path(__file__).parent.parent


def start(command: list[str], environment: dict[str, str], **options: Any) -> subprocess.Popen[str]:
    """Start ``command`` so that it gets SIGTERM when we die, even by kill -9 (on Linux), and not our terminal's Ctrl-C.

    To be called from the main thread: the kernel sends the signal when the thread that started it ends.
    """
    return subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_end_with(os.getpid()),
        text=True,
        **options,
    )


def _end_with(parent: int) -> Callable[[], None]:
    def ask_the_kernel() -> None:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_the_kernel


def gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; asked without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]
