"""The oracle of the fault suite, and the ways in which it breaks runs."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from files import entry_in_blocks, sha256
from tracking.metrics import read_metrics
from tracking.run_directory import read_summary
from training.checkpoint import existing

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def same_as(reference: Path, run: Path, rounding: float = 0.0) -> None:
    """Fails unless ``run`` ended as ``reference`` did, which nothing disturbed.

    That is: the same numbers at each step (times aside), the same samples, the same bytes of weights and moments.
    With a ``rounding`` above 0 losses may differ by so much, and bytes are not compared.
    """
    one, other = numbers(reference), numbers(run)
    assert [record["step"] for record in one] == [record["step"] for record in other]
    assert read_summary(reference).get("samples") == read_summary(run).get("samples")
    if rounding:
        for a, b in zip(one, other, strict=True):
            for name in (name for name in a if name.endswith("/loss")):
                assert a[name] == pytest.approx(b[name], abs=rounding), (a["step"], name)
        return
    for a, b in zip(one, other, strict=True):
        assert a == b
    assert tensors(reference) == tensors(run)


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, times aside."""
    records = read_metrics(run)
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


def tensors(run: Path) -> dict[str, str]:
    """The step and the sha256 of each tensor file of the newest checkpoint."""
    newest = existing(run / "checkpoints")[0]
    return {"step": newest.name} | {file.name: sha256(file) for file in sorted(newest.glob("*.safetensors"))}


@contextmanager
def launched(
    flags: list[str], directory: Path, stderr: Any = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """train.py at work in ``directory``, killed at the latest when the block ends, even if SIGSTOP holds it.

    What it says is dropped, or goes to ``stderr``.
    """
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=directory,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=stderr or subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    """Return when SIGSTOP holds the process, as WELLPOSED_FAULT=...:stop asks for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T":
            return
        time.sleep(0.01)
    raise AssertionError(f"it did not stop itself; exit code {process.poll()}")


def children(parent: int) -> list[tuple[int, str]]:
    """Process id and name of each child of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = status.read_text().split("(", 1)[1].rsplit(")", 1)
        except OSError:  # it ended meanwhile
            continue
        if int(rest.split()[1]) == parent:
            found.append((int(status.parent.name), name))
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below ``directory`` but the lock, which names the process that looked last."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def flip(file: Path, place: int | None = None) -> None:
    """Flip one bit of a file: of the byte at ``place``, or of the one in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    file.write_bytes(content)


def replace_in_checkpoint(checkpoint: Path, name: str, content: bytes) -> None:
    """Put other bytes into a checkpoint and make its manifest agree with them, as an attacker would."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def replace_in_corpus(corpus: Path, name: str, content: bytes) -> None:
    """The same for a shard."""
    (corpus / name).write_bytes(content)
    manifest = json.loads((corpus / "manifest.json").read_text())
    for shard in (shard for split in manifest["splits"].values() for shard in split["shards"]):
        if shard["file"] == name:
            shard |= entry_in_blocks(corpus / name)
    (corpus / "manifest.json").write_text(json.dumps(manifest))


def shuffle_times(directory: Path) -> None:
    """Give all files and directories times up to a year away, as clocks that jump and copies do."""
    draw = random.Random(0)
    for path in [directory, *directory.rglob("*")]:
        moved = path.stat().st_mtime + draw.uniform(-1, 1) * 365 * 24 * 3600
        os.utime(path, (moved, moved))
