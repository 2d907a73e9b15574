"""Token files of others, read without tokenizing again: nanoGPT's and llm.c's .bin, Megatron's .bin and .idx.

nanoGPT    ids one after the other, uint16
llm.c      the same behind 256 int32: a magic number, a version that tells uint16 from uint32, the number of tokens
Megatron   ids of a type that the .idx beside it names, and how long each of its sequences is

Documents are what stands between end-of-text tokens; Megatron's documents are divided by their index, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from config import BadInput
from data.pieces import Piece
from data.tokenizers import load_tokenizer, vocabulary_size

LLM_C = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # magic number and version: of GPT-2's ids, of Llama 3's
LLM_C_HEADER = 256 * 4  # bytes
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
PIECE = 2**20  # ids of a piece at most
DOCUMENTS = 256  # decoded at once, on all cores


def read_tokens(files: list[Path], knob: str) -> Iterator[Piece]:
    """The documents of token files in pieces, with their ids and the text that ``knob``, their tokenizer, has for them.

    Raises BadInput for a file that is none, or that holds an id outside the tokenizer's vocabulary.
    """
    tokenizer, end = load_tokenizer(knob)
    size = vocabulary_size(tokenizer)
    for file in files:
        parts = in_pieces(documents(file, end))
        while batch := list(islice(parts, DOCUMENTS)):
            for ids, _, _ in batch:
                if (foreign := ids[(ids < 0) | (ids >= size)]).size:
                    raise BadInput(
                        f"{file} holds the token {foreign[0]:,}, and the tokenizer {knob} has {size:,}; "
                        "name the one with which it was made in data.tokenizer"
                    )
            texts = tokenizer.decode_batch([ids.tolist() for ids, _, _ in batch], skip_special_tokens=False)
            for text, (ids, first, last) in zip(texts, batch, strict=True):
                yield Piece(text, first, last, ids.astype(np.uint32))


def in_pieces(documents: Iterable[tuple[np.ndarray, bool]]) -> Iterator[tuple[np.ndarray, bool, bool]]:
    """Documents, given in fragments, in stretches of at most PIECE ids, with whether each is the first and the last."""
    held, first = np.zeros(0, np.int64), True
    for ids, ends in documents:
        held = np.concatenate((held, ids))
        while len(held) > PIECE:
            yield held[:PIECE], first, False
            held, first = held[PIECE:], False
        if ends:
            if len(held):
                yield held, first, True
            held, first = held[:0], True


def documents(file: Path, end: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The documents of a file in fragments: ids without end-of-text, and whether their document ends with them."""
    tokens, borders = opened(file)
    for begin, stop in pairwise(borders):
        for place in range(begin, stop, PIECE):
            ids = tokens[place : min(place + PIECE, stop)].astype(np.int64)
            *whole, rest = np.split(ids, np.flatnonzero(ids == end))
            for part in whole:
                yield part[part != end], True
            yield rest[rest != end], False
        yield tokens[:0].astype(np.int64), True


def opened(file: Path) -> tuple[np.ndarray, list[int]]:
    """The ids of a file, in a memory map, and where its stretches begin, with the end of the last. Raises BadInput."""
    index = file.with_suffix(".idx")
    if index.is_file():
        return megatron(file, index)
    header = np.fromfile(file, np.int32, 3)
    dtype: np.dtype = np.dtype(np.uint16)
    begin = 0
    if len(header) == 3 and int(header[0]) in (magic for magic, _ in LLM_C):
        if tuple(header[:2].tolist()) not in LLM_C:
            raise BadInput(f"{file} is llm.c's version {header[1]}, of which nothing is known here; write it anew")
        dtype, begin = np.dtype(LLM_C[header[0], header[1]]), LLM_C_HEADER
    count, rest = divmod(file.stat().st_size - begin, dtype.itemsize)
    if rest or (begin and count != header[2]):
        there = f"its header says {header[2]:,}" if begin else f"{rest} bytes are left over"
        raise BadInput(f"{file} is not whole: there are {count:,} tokens of {dtype} in it, and {there}")
    return np.memmap(file, dtype, "r", begin) if count else np.zeros(0, dtype), [0, count]


def megatron(file: Path, index: Path) -> tuple[np.ndarray, list[int]]:
    """The ids of a Megatron dataset and where its documents begin."""
    raw = index.read_bytes()
    head = len(MEGATRON) + 8 + 1
    if not raw.startswith(MEGATRON) or len(raw) < head + 16 or raw[head - 1] not in MEGATRON_TYPES:
        raise BadInput(f"{index} is no index of Megatron's; remove it if {file.name} is not from there")
    dtype = np.dtype(MEGATRON_TYPES[raw[head - 1]])
    n_sequences, n_documents = np.frombuffer(raw, np.int64, 2, head).tolist()
    count = file.stat().st_size // dtype.itemsize
    tokens = np.memmap(file, dtype, "r", shape=count) if count else np.zeros(0, dtype)
    try:
        lengths = np.frombuffer(raw, np.int32, n_sequences, head + 16)
        begins = np.frombuffer(raw, np.int64, n_documents, head + 16 + 12 * n_sequences)
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        borders = ends[begins].tolist()
    except (ValueError, IndexError) as problem:
        raise BadInput(f"{index} is damaged ({problem}); make it anew") from problem
    if not borders or borders != sorted(borders) or borders[0] or borders[-1] != len(tokens):
        raise BadInput(f"{index} does not fit {file}, which has {len(tokens):,} tokens; make both anew")
    return tokens, borders
