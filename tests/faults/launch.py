"""Runs of several processes, started the way srun starts them: each its own, with rank and rendezvous in variables.

Without torchrun between, a test sees each process's exit code and what it wrote.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

Processes = list[subprocess.Popen[str]]


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(
    flags: list[str],
    directory: Path,
    world: int = 1,
    fault: str = "",
    per_machine: int | None = None,
    program: Path = ROOT / "train.py",
) -> Processes:
    """``world`` processes of train.py that are one run; ``fault`` is WELLPOSED_FAULT.

    They believe that so many of them are on one machine; by default all are.
    """
    per_machine = per_machine or world
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        ranks = rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank % per_machine)}
        ranks |= {"LOCAL_WORLD_SIZE": str(per_machine)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(program), *flags],
                cwd=directory,
                env=os.environ
                | {"PYTHONPATH": str(ROOT)}
                | (ranks if world > 1 else {})
                | ({"WELLPOSED_FAULT": fault} if fault else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def end(processes: Processes, timeout: float = 200) -> tuple[list[int], str, str]:
    """Exit codes in order of rank, and all that was written to standard output and to standard error."""
    codes, output, errors = [], "", ""
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
        finally:
            if process.poll() is None:
                process.kill()
        codes, output, errors = [*codes, process.returncode], output + out, errors + err
    return codes, output, errors


def changed(directory: Path, *changes: tuple[str, str]) -> Path:
    """A program that is train.py after these changes, each a module and ``name = value`` in it.

    For what only large models have, or GPUs.
    """
    lines = [f"import {module}\n{module}.{assignment}" for module, assignment in changes]
    path = directory / "changed.py"
    path.write_text("\n".join([*lines, "import train", "from program import run", "run(train.main)"]))
    return path


def torchrun(flags: list[str], directory: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """train.py under torchrun; ``options`` are torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py"), *flags]
    return subprocess.Popen(
        command, cwd=directory, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers_of(pid: int) -> dict[int, int]:
    """The live train.py processes below ``pid`` by rank, from /proc."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or f"\nPPid:\t{pid}\n" not in (entry / "status").read_text():
                continue
            variables = dict(part.split("=", 1) for part in (entry / "environ").read_text().split("\0") if "=" in part)
        except (OSError, ValueError):
            continue
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return found


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    """Look every few milliseconds until it is so; fails when the process ends before, or the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode} too early:\n{process.communicate()[1]}")
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.003)
