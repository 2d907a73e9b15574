"""Files that are whole or absent: replaced in one step, flushed to the disk, locked, and checked by their hash."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)
BLOCK = 2**18  # bytes that are read at once to compare one of them with the manifest


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(content: Any) -> str:
    """Hex sha256 of something that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Return when the bytes of a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def give_usual_mode(path: Path) -> None:
    """Let others read a file as they may read any new one: safetensors makes files for their owner alone."""
    os.chmod(path, 0o666 & ~UMASK)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` to write to, which takes its place when the block ends.

    A reader finds the old file or the new one, of several writers the last wins, and a block that fails leaves
    nothing behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def lock(path: Path, wait: bool = False, shared: bool = False) -> TextIO:
    """Lock the file at ``path`` until what is returned is closed or the process ends, even by kill -9.

    Those who ask for a ``shared`` lock hold it together. Raises BlockingIOError, with the file's text as its message,
    when another holds it and we do not ``wait``.
    """
    file = open(path, "a+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.seek(0)
        text = file.read().strip()
        file.close()
        raise BlockingIOError(text) from None
    return file


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of the file at ``path``."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file: its size in bytes and its sha256."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def entry_in_blocks(path: Path) -> dict[str, Any]:
    """The same, and ``blocks``: the first 16 digits of the sha256 of each BLOCK of bytes, one after the other.

    By them a reader of a part knows that this part is whole, without reading the rest.
    """
    whole, blocks = hashlib.sha256(), []
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            whole.update(block)
            blocks.append(hash_of_block(block))
        return {"size": file.tell(), "sha256": whole.hexdigest(), "blocks": "".join(blocks)}


def hash_of_block(block: Any) -> str:
    """The 16 digits that a manifest has for a block of bytes, which may be an array of NumPy's."""
    return hashlib.sha256(block).hexdigest()[:16]


def problem_of(directory: Path, name: Any, entry: dict[str, Any], verify: bool = True) -> str | None:
    """Why a file of ``directory`` is not what its manifest's ``entry`` says; None when it is, to the last byte.

    ``verify=False`` leaves out the sha256, for which every byte is read. Raises KeyError for an entry without a size
    or a sha256.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
        return f"the manifest of {directory} names {name!r}, which is not a plain file of it"
    path, size, digest = directory / name, entry["size"], entry["sha256"]
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return f"{path} is a link or no regular file"
        if found.st_size != size:
            return f"{path} has {found.st_size:,} bytes instead of {size!r}"
        if verify and sha256(path) != digest:
            return f"{path} is damaged: its sha256 differs from the manifest's"
    except OSError as problem:
        return f"{path} cannot be read ({problem.strerror})"
    return None
