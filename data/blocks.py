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
from data.pieces import Piece

BLOCK = 2**24  # bytes of text; a piece more at most


class Place(NamedTuple):
    """Where a piece belongs: to which block and split, how many bytes it has, and whether a document begins with it."""

    block: int
    split: str
    n_bytes: int
    first: bool


def placed(texts: Iterable[tuple[str, Piece]], size: int) -> Iterator[tuple[Piece, Place]]:
    """Each piece with its place, given the name of its split. A block ends with the piece that fills it."""
    block = filled = 0
    for split, piece in texts:
        if filled >= size:
            block, filled = block + 1, 0
        n_bytes = len(piece.text.encode())
        filled += n_bytes
        yield piece, Place(block, split, n_bytes, piece.first)


class Block:
    """The tokens of one block, held until it is written."""

    def __init__(self, number: int, end_of_text: int, dtype: np.dtype) -> None:
        self.number, self.dtype, self.end = number, dtype, np.array([end_of_text], dtype)
        self.tokens: dict[str, list[np.ndarray]] = {}
        self.starts: dict[str, list[int]] = {}
        self.filled: dict[str, int] = {}
        self.bytes: dict[str, int] = {}

    def add(self, place: Place, ids: np.ndarray) -> None:
        """Append the ids of a piece, before them an end-of-text token if a document begins with it."""
        split = place.split
        if split not in self.tokens:
            self.tokens[split], self.starts[split], self.filled[split], self.bytes[split] = [], [], 0, 0
        if place.first:
            self.starts[split].append(self.filled[split])
            self.tokens[split].append(self.end)
        self.tokens[split].append(ids.astype(self.dtype))
        self.filled[split] += place.first + len(ids)
        self.bytes[split] += place.n_bytes

    def write(self, directory: Path) -> None:
        """Put the block into ``directory`` in one step. Raises OSError where that fails."""
        tensors = {}
        for split, tokens in self.tokens.items():
            tensors[f"{split}.tokens"] = np.concatenate(tokens)
            tensors[f"{split}.starts"] = np.array(self.starts[split], np.int64)
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
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem
