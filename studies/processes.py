"""Processes that do not outlive the one that started them, and what this machine has to share among them."""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from program import end_with_parent

ROOT = Path(__file__).parent.parent
CAN_FORK = sys.platform == "linux"  # macOS has fork too, but its own libraries break after it
LOOK_EVERY = 0.05  # seconds between two looks at whether a forked process has ended


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


class Forked:
    """A process made by ``fork``, with what we use of ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def terminate(self) -> None:
        """Send SIGTERM, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        """The exit code, minus the signal's number if one killed it; raises TimeoutExpired after a while."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            else:
                time.sleep(LOOK_EVERY)
        return self.returncode


def fork(words: list[str], environment: dict[str, str], output: TextIO) -> Forked:
    """What ``start`` does with ``python *words``, for a script: but what is imported here need not be imported again.

    To be called from the main thread, while there is no other thread and no open connection: the new process has a
    copy of all that this one holds.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # our handlers are not the script's
    try:
        pid = os.fork()
        if pid == 0:
            _run_script(words, environment, output, parent, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Forked(pid)


def _run_script(
    words: list[str], environment: dict[str, str], output: TextIO, parent: int, blocked: set[int]
) -> NoReturn:
    """In the new process: make it what a freshly started one is, run the script to its end, and leave."""
    code = 1
    try:
        os.setpgid(0, 0)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _end_with(parent)()
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        atexit._clear()  # what was asked for there is for the end of the process that was copied
        os.environ |= environment
        sys.stdout = sys.__stdout__
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
