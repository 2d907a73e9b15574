"""Text to token ids, on all cores, by the fastest way that gives exactly the ids of the tokenizers library.

Bytes are looked up in a table. Byte-level BPE with GPT-2's pre-tokenizer is encoded by tiktoken, some four times
faster. Every other tokenizer is the library's own, which has threads of its own.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from data.pieces import Piece, cut
from data.tokenizers import BYTES_AS_CHARACTERS, END_OF_TEXT
from program import cores

Label = TypeVar("Label")

BATCH = 2**20  # characters that a thread encodes at once, a little more at most
MOST_THREADS = 16  # more would wait for the one that reads, and each holds some megabytes
LIBRARY_PIECE = 65_536  # characters: the library needs about 200 bytes for each byte of text

# GPT-2's pre-tokenizer, as OpenAI's own tiktoken writes it.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# What both ways must agree on before the fast one is taken.
PROBE = "It's 1st: naïve  façade,\r\n\tx_1 = {'ä': 3.14}\n\n\n  日本語 🙂🏽 e\u0301 \x00 \xa0 <|endoftext|>we'll\n "

# The parts of a tokenizer.json that put a space before a text, and what makes them leave it out.
NO_PREFIX: dict[str, dict[str, Any]] = {
    "Prepend": {"prepend": ""},
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
}


class Encoder:
    """Gives the ids of pieces of text. ``in_pieces`` tells whether they are those of the whole document; if not,
    documents must come whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.rest = tokenizer, without_prefix(tokenizer)
        self.fast = fast_way(tokenizer)
        self.in_pieces = self.fast is not None or cuts_cleanly(self.tokenizer, self.rest)
        self.threads = min(cores(), MOST_THREADS) if self.fast else 1  # the library's own threads take all cores

    def __call__(self, pieces: list[Piece]) -> list[np.ndarray]:
        """The ids of each piece, uint32; no end-of-text is added."""
        if all(piece.ids is not None for piece in pieces):  # they came tokenized
            return [piece.ids for piece in pieces]  # type: ignore[misc]
        if self.fast:
            return [self.fast(piece.text) for piece in pieces]
        limit = LIBRARY_PIECE if self.in_pieces else sys.maxsize
        parts = [
            Piece(part.text, piece.first and part.first, part.last)
            for piece in pieces
            for part in cut([(piece.text, True)], limit)
        ]
        firsts = iter(self.tokenizer.encode_batch_fast([part.text for part in parts if part.first], False, False))
        others = iter(self.rest.encode_batch_fast([part.text for part in parts if not part.first], False, False))
        encoded: list[np.ndarray] = []
        ids: list[int] = []
        for part in parts:
            ids += next(firsts if part.first else others).ids
            if part.last:
                encoded.append(np.array(ids, dtype=np.uint32))
                ids = []
        return encoded

    def stream(self, pieces: Iterable[tuple[Piece, Label]]) -> Iterator[tuple[Label, np.ndarray]]:
        """The label of each piece and its ids, in order. A few megabytes are read ahead."""
        waiting: deque[tuple[list[Label], Future[list[np.ndarray]]]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            for batch in batches(pieces):
                waiting.append(([label for _, label in batch], pool.submit(self, [piece for piece, _ in batch])))
                if len(waiting) > self.threads + 1:
                    labels, ids = waiting.popleft()
                    yield from zip(labels, ids.result(), strict=True)
            for labels, ids in waiting:
                yield from zip(labels, ids.result(), strict=True)


def batches(pieces: Iterable[tuple[Piece, Label]]) -> Iterator[list[tuple[Piece, Label]]]:
    """All pieces in order, a million characters at a time."""
    batch: list[tuple[Piece, Label]] = []
    characters = 0
    for piece, label in pieces:
        batch.append((piece, label))
        characters += len(piece.text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """The ids of each document, uint32, in order; no end-of-text is added."""
    encoder = Encoder(tokenizer)
    pieces = cut((document, True) for document in documents) if encoder.in_pieces else map(Piece, documents)
    ids: list[np.ndarray] = []  # of the document that the next piece belongs to
    for last, more in encoder.stream((piece, piece.last) for piece in pieces):
        ids.append(more)
        if last:
            yield np.concatenate(ids)
            ids = []


def fast_way(tokenizer: Tokenizer) -> Callable[[str], np.ndarray] | None:
    """What gives exactly this tokenizer's ids of a text, faster; None where that is not certain.

    tiktoken joins whatever makes a token, the earliest token first; the library joins what the list of merges says.
    That is the same if the list makes each of its tokens out of that token's own text.
    """
    state = json.loads(tokenizer.to_str())
    model, pre_tokenizer = state["model"], state["pre_tokenizer"] or {}
    special = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    if (
        model["type"] != "BPE"
        or any(model.get(name) for name in special)
        or state["normalizer"]
        or (pre_tokenizer.get("type"), pre_tokenizer.get("add_prefix_space")) != ("ByteLevel", False)
        or not tokenizer.encode_special_tokens
        or not all(token["special"] for token in state["added_tokens"])
        or not all(character in model["vocab"] for character in BYTES_AS_CHARACTERS)
    ):
        return None
    tokens = list(dict.fromkeys([*BYTES_AS_CHARACTERS, *("".join(pair) for pair in model["merges"])]))
    ids = np.array([model["vocab"][token] for token in tokens], dtype=np.uint32)
    if not model["merges"]:
        return lambda text: ids[np.frombuffer(text.encode(), np.uint8)]
    if not pre_tokenizer["use_regex"] or any(len(tokenizer.model.tokenize(token)) != 1 for token in tokens):
        return None

    import tiktoken

    values = {character: byte for byte, character in enumerate(BYTES_AS_CHARACTERS)}
    ranks = {bytes(values[character] for character in token): rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )

    def encode(text: str) -> np.ndarray:
        # As encode_ordinary, but without a Python list of a million numbers.
        return ids[encoding.encode_to_numpy(text, disallowed_special=())]

    return encode if encode(PROBE).tolist() == tokenizer.encode(PROBE, add_special_tokens=False).ids else None


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer for all pieces of a document but the first: it puts no space before the text."""
    state = json.loads(tokenizer.to_str(), object_hook=lambda part: part | NO_PREFIX.get(str(part.get("type")), {}))
    rest = Tokenizer.from_str(json.dumps(state))
    rest.encode_special_tokens = True
    return rest


def cuts_cleanly(tokenizer: Tokenizer, rest: Tokenizer) -> bool:
    """Whether this tokenizer breaks at our cuts by itself, ``rest`` being the one for all pieces but the first.

    If not, documents are encoded whole.
    """
    probe = ["One two", " three; it's\n", "four(5)\n", "sechs, sieben", "\n\n acht", "  (neun)\n\n"]
    whole = tokenizer.encode("".join(probe), add_special_tokens=False).ids
    ids = [(rest if i else tokenizer).encode(text, add_special_tokens=False).ids for i, text in enumerate(probe)]
    return bool(whole == list(chain.from_iterable(ids)))
