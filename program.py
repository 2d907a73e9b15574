"""How every program here starts, warns, and ends.

Exit codes: 0 finished, 2 bad input, 3 preempted (start it again to go on), 4 failed.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from config import BadInput, Failure

FINISHED, BAD_INPUT, PREEMPTED, FAILED = 0, 2, 3, 4
# SLURM warns with SIGUSR1; a terminal that closes sends SIGHUP, which nohup has ignored, and so do we then.
STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    *(() if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)),
)
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h
# Loaded here, because nothing may be imported between fork and exec.
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def warn(*words: object) -> None:
    """A warning, on standard error."""
    print("warning:", *words, file=sys.stderr, flush=True)


def is_main_process() -> bool:
    """Whether this process speaks for all of a run; before the processes have met, their launcher's word counts."""
    return os.environ.get("RANK", "0") == "0"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_own_cores() -> bool:
    """Whether this process may use fewer cores than the one that started it: its launcher bound it to its share."""
    try:
        return os.sched_getaffinity(0) < os.sched_getaffinity(os.getppid())
    except (AttributeError, OSError):  # not on macOS; or the parent is not ours to ask
        return False


def end_with_parent(number: int) -> None:
    """Ask the kernel (of Linux) to send us the signal ``number`` when the process that started us ends."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, number)


class Patient:
    """A stream that goes on in silence when its reader leaves (`| head`, a closed terminal): work goes on."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> Any:
        """Write, or drop."""
        return self._try(lambda: self.stream.write(text))

    def flush(self) -> None:
        """Flush, or drop."""
        self._try(lambda: self.stream.flush())

    def _try(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except OSError as problem:
            if problem.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def shown(text: str) -> str:
    """``text`` for a terminal, which must not obey what a model wrote: control characters as Python writes them."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def import_torch() -> None:
    """Import torch with its settings in place.

    Signals wait until it is done: one that interrupts the initialisation of its C++ part aborts the process.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGINT})
    import torch  # noqa: F401

    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call ``main`` with the command line's words and exit with its code; a user's mistake gets no traceback.

    The stop signals interrupt like Ctrl-C, until ``main`` knows something better to do.
    """
    sys.stdout, sys.stderr = Patient(sys.stdout), Patient(sys.stderr)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # when torchrun is killed its processes end with it
        end_with_parent(signal.SIGKILL)
    code = exit_code(main, sys.argv[1:])
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the exit code is decided; a signal that comes late changes nothing
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Past this point torch's threads would wait for a process that hangs, or abort: leave without them.
        atexit._run_exitfuncs()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def exit_code(main: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    """What ``main`` returns; what it raises is told, and becomes the exit code of its kind."""
    try:
        return main(arguments) or FINISHED
    except BadInput as mistake:
        tell_error(*str(mistake).splitlines())
        return BAD_INPUT
    except Failure as failure:
        tell_error(str(failure))
    except ModuleNotFoundError as missing:
        way_out = "use .venv/bin/python, which make .venv/train.installed makes"
        tell_error(f"{sys.executable} has no module {missing.name}; {way_out}")
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return PREEMPTED
    except Exception:  # a fault of ours or of the machine, not of the user: its traceback is what is needed
        traceback.print_exc()
    return FAILED


def tell_error(*lines: str) -> None:
    """Errors on standard error, an indented line going with the one above; one process of a run tells for all."""
    for line in lines if is_main_process() else ():
        print(line if line.startswith(" ") else f"error: {line}", file=sys.stderr, flush=True)
