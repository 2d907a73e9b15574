"""Documents of any length as a stream of short pieces, so that memory holds a piece and never a document.

Pieces are cut where no token can reach across, so the tokens of the pieces are those of the whole document.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE = 2**20  # characters of a piece at most

# Everything up to the last place where a pre-tokenizer breaks whether or not it sees the other side: behind a single
# newline, or between a letter and white space. (Behind any newline would not do: GPT-2's pattern breaks "a\n\nb"
# between the newlines, but does not break "a\n\n" at the end of a piece.)
UP_TO_A_CLEAN_CUT = re.compile(r".+(?:(?<=\S\n)(?=\S)|(?<=[^\W\d_])(?=\s))", re.DOTALL)


class Piece(NamedTuple):
    """A stretch of a document, whether the document begins and ends with it, and its ids, if it came tokenized."""

    text: str
    first: bool = True
    last: bool = True
    ids: np.ndarray | None = None


def cut(fragments: Iterable[tuple[str, bool]], limit: int = PIECE) -> Iterator[Piece]:
    """Documents in pieces of at most ``limit`` characters, cut where no token reaches across if possible.

    ``fragments`` are texts of any length, each with whether its document ends with it. Where the pieces are cut
    depends on the text alone, not on how it was divided into fragments. Only an empty document has an empty piece.
    """
    text, first = "", True
    for more, ends in fragments:
        text = text + more if text else more
        start = 0
        while len(text) - start > limit:
            clean = UP_TO_A_CLEAN_CUT.match(text, start, start + limit + 1)
            stop = clean.end() if clean else start + limit
            yield Piece(text[start:stop], first, False)
            start, first = stop, False
        text = text[start:]
        if ends:
            yield Piece(text, first, True)
            text, first = "", True


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def whole(pieces: Iterable[Piece]) -> Iterator[str]:
    """The text of each document, put together again."""
    texts: list[str] = []
    for piece in pieces:
        texts.append(piece.text)
        if piece.last:
            yield "".join(texts)
            texts = []
