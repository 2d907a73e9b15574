"""A corpus in the making: its text is encoded block by block, and the blocks are put together at the end.

A block is so much text, in the order of the source, of whichever splits. It is written in one step, and its bytes do
not depend on who made it. So a preparation that was killed goes on with the blocks that are missing, and the jobs of
an array can each make some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import files
from data.pieces import Piece, hash_of

BLOCK = 2**24  # bytes of text; a piece more at most


class Place(NamedTuple):
    """Where a piece belongs: to which block and split, and how many bytes it has.

    ``key`` is the hash of a document that begins with it, by which copies are found; None if none does.
    """

    block: int
    split: str
    n_bytes: int
    key: int | None


def placed(texts: Iterable[tuple[str, Piece]], size: int) -> Iterator[tuple[Piece, Place]]:
    """Each piece with its place, given the name of its split. A block ends with the piece that fills it."""
    block = filled = 0
    for split, piece in texts:
        if filled >= size:
            block, filled = block + 1, 0
        n_bytes = len(piece.text.encode())
        filled += n_bytes
        yield piece, Place(block, split, n_bytes, hash_of(piece.text.strip()) if piece.first else None)


class Block:
    """The tokens of one block, held until it is written."""

    def __init__(self, number: int, end_of_text: int, dtype: np.dtype) -> None:
        self.number, self.dtype, self.end = number, dtype, np.array([end_of_text], dtype)
        self.tokens: dict[str, list[np.ndarray]] = {}
        self.starts: dict[str, list[int]] = {}
        self.keys: dict[str, list[int]] = {}
        self.filled: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def add(self, place: Place, ids: np.ndarray) -> None:
        """Append the ids of a piece, before them an end-of-text token if a document begins with it."""
        split = place.split
        if split not in self.tokens:
            self.tokens[split], self.starts[split], self.keys[split] = [], [], []
            self.filled[split] = self.bytes[split] = 0
        if place.key is not None:
            self.starts[split].append(self.filled[split])
            self.keys[split].append(place.key)
            self.tokens[split].append(self.end)
            self.filled[split] += 1
        self.tokens[split].append(ids.astype(self.dtype))
        self.filled[split] += len(ids)
        self.bytes[split] += place.n_bytes

    def write(self, directory: Path) -> None:
        """Put the block into ``directory`` in one step. Raises OSError where that fails."""
        tensors = {}
        for split, tokens in self.tokens.items():
            tensors[f"{split}.tokens"] = np.concatenate(tokens)
            tensors[f"{split}.starts"] = np.array(self.starts[split], np.int64)
            tensors[f"{split}.keys"] = np.array(self.keys[split], np.uint64)
            tensors[f"{split}.bytes"] = np.array(self.bytes[split], np.int64)
        with files.replacing(file_of(directory, self.number)) as temporary:
            save(tensors, temporary)


def read(directory: Path, number: int, split: str) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Tokens, document starts among them and bytes of text that a block has of a split; None if it has none."""
    handle: Any = safe_open(file_of(directory, number), framework="np")
    if f"{split}.tokens" not in handle.offset_keys():
        return None
    tokens, starts, n_bytes = (handle.get_tensor(f"{split}.{part}") for part in ("tokens", "starts", "bytes"))
    return tokens, starts, int(n_bytes)


def keys(directory: Path, number: int, split: str) -> np.ndarray:
    """The hashes [n] of the documents of a split that begin in a block, uint64."""
    handle: Any = safe_open(file_of(directory, number), framework="np")
    name = f"{split}.keys"
    return handle.get_tensor(name) if name in handle.offset_keys() else np.zeros(0, np.uint64)


def file_of(directory: Path, number: int) -> Path:
    """The file of a block."""
    return directory / f"block-{number:06d}.safetensors"


def there(directory: Path) -> set[int]:
    """The numbers of the blocks that have been written."""
    return {int(file.stem.removeprefix("block-")) for file in directory.glob("block-*.safetensors")}


def save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Write a safetensors file; raises OSError where the library raises an error of its own, as on a full disk."""
    try:
        save_file(tensors, path)
        files.give_usual_mode(path)
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem
