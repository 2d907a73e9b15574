"""Documents of the training text that a held-out split has too, which would make it a test of memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from config import BadInput
from data import blocks
from data.pieces import hash_of

WORDS = 5  # in a row, of which a document is the set when near copies are looked for
ALIKE = 0.8  # of all such sequences of two documents, the share that both have: then they are near copies


class Copies:
    """``text in Copies(held_out)``: whether one of these texts is the same, but for outer white space.

    ``near``: or shares most sequences of five words with one (MinHash, Broder 1997, by datasketch).
    """

    def __init__(self, held_out: Iterable[str], near: bool) -> None:
        self.index: Any = None
        if near:
            try:
                from datasketch import MinHashLSH
            except ModuleNotFoundError as problem:
                raise BadInput(
                    "data.copies=drop_near needs datasketch: pip install --editable '.[near]'; or use drop"
                ) from problem
            self.index = MinHashLSH(threshold=ALIKE, num_perm=128)
        self.keys: set[int] = set()
        for text in held_out:
            key = hash_of(text.strip())
            if self.index is not None and key not in self.keys:
                self.index.insert(key, signature(text))
            self.keys.add(key)

    def __contains__(self, text: str) -> bool:
        if hash_of(text.strip()) in self.keys:
            return True
        return self.index is not None and bool(self.index.query(signature(text)))


def signature(text: str) -> Any:
    """The MinHash of a text's sequences of five words; of all its words, if there are fewer."""
    from datasketch import MinHash

    words = text.split()
    rows = {" ".join(words[first : first + WORDS]) for first in range(max(1, len(words) - WORDS + 1))}
    made = MinHash(num_perm=128)
    made.update_batch([row.encode() for row in rows])
    return made


def copies_in_train(directory: Path, n_blocks: int, splits: Iterable[str]) -> dict[str, int]:
    """Of each held-out split the number of documents that train has, too; their keys alone are in memory."""
    held_out = {split: np.concatenate([blocks.keys(directory, n, split) for n in range(n_blocks)]) for split in splits}
    found = {split: np.zeros(len(keys), bool) for split, keys in held_out.items()}
    for number in range(n_blocks):
        train = blocks.keys(directory, number, "train")
        for split, keys in held_out.items():
            found[split] |= np.isin(keys, train)
    return {split: int(copies.sum()) for split, copies in found.items()}
