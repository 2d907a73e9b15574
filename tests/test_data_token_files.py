"""Token files of others give the corpus that their text would give, or are refused for what they are not."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from config import BadInput, Data
from data import token_files
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizers import train_bpe

TEXTS = [f"document {number}, naïve {'word ' * (number % 5)}\n" for number in range(100)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose end-of-text is 0."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 400).save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="module")
def documents(theirs: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(theirs / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]


def nanogpt(file: Path, documents: list[list[int]]) -> Path:
    """As its prepare.py writes it: end-of-text behind each document."""
    np.concatenate([[*ids, 0] for ids in documents]).astype(np.uint16).tofile(file)
    return file


def llm_c(file: Path, documents: list[list[int]], magic: int = 20240520, version: int = 1) -> Path:
    """As its data_common.py writes it: 256 int32, and end-of-text before each document."""
    ids = np.concatenate([[0, *ids] for ids in documents])
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids)
    file.write_bytes(header.tobytes() + ids.astype(np.uint16 if version == 1 else np.uint32).tobytes())
    return file


def megatron(
    file: Path, documents: list[list[int]], dtype: type = np.int32, code: int = 4, end: tuple[int, ...] = ()
) -> Path:
    """As its IndexedDatasetBuilder writes it, each document of two sequences, the last with ``end`` behind it."""
    halves = [part for ids in documents for part in (ids[:3], [*ids[3:], *end])]
    np.concatenate(halves).astype(dtype).tofile(file)
    lengths = np.array([len(part) for part in halves], np.int32)
    pointers = (np.cumsum(lengths) - lengths).astype(np.int64) * np.dtype(dtype).itemsize
    begins = np.arange(0, len(halves) + 1, 2, dtype=np.int64)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(halves), len(begins))
    file.with_suffix(".idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + begins.tobytes())
    return file


def tokens_config(file: object, theirs: Path, **knobs: object) -> Data:
    return Data(path=str(file), tokenizer=str(theirs), **{"val_fraction": 0.2, "test_fraction": 0.2, **knobs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "write",
    [
        nanogpt,
        llm_c,
        lambda file, documents: llm_c(file, documents, 20240801, 7),
        megatron,
        lambda file, documents: megatron(file, documents, np.uint16, 8, (0,)),
    ],
    ids=["nanoGPT", "llm.c", "llm.c for Llama 3", "Megatron", "Megatron with end-of-text"],
)
def test_the_corpus_is_that_of_the_text(
    write: object, theirs: Path, documents: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, splits, documents and bytes of text: the same hash of all contents, and so the same training."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    expected = Corpus.open(prepare(tokens_config(tmp_path / "rows.jsonl", theirs), tmp_path / "c", quiet=True))
    file = write(tmp_path / "theirs.bin", documents)  # type: ignore[operator]
    monkeypatch.setattr(token_files, "PIECE", 7)  # so that a document is read in several pieces: no more is held
    monkeypatch.setattr(token_files, "DOCUMENTS", 3)
    config = tokens_config(file, theirs)
    found = Corpus.open(prepare(config, tmp_path / "d", quiet=True))
    whole = [documents_of_split(found, name) for name in ("train", "val", "test")]
    assert sorted(ids for split in whole for ids in split) == sorted(documents)
    monkeypatch.setattr(token_files, "PIECE", 2**20)
    found = Corpus.open(prepare(config, tmp_path / "e", quiet=True))
    assert found.fingerprint == expected.fingerprint
    for name in ("train", "val", "test"):
        assert found.split(name).n_bytes == expected.split(name).n_bytes


def documents_of_split(corpus: Corpus, name: str) -> list[list[int]]:
    split = corpus.split(name)
    starts = [*split.starts(0, split.n_tokens).tolist(), split.n_tokens]
    return [split.read(begin + 1, end).tolist() for begin, end in pairwise(starts)]


def test_train_and_val_files_as_nanogpt_has_them(theirs: Path, documents: list[list[int]], tmp_path: Path) -> None:
    train, val = nanogpt(tmp_path / "train.bin", documents[:80]), nanogpt(tmp_path / "val.bin", documents[80:])
    config = tokens_config(train, theirs, val_path=str(val), test_fraction=0)
    corpus = Corpus.open(prepare(config, tmp_path / "c", quiet=True))
    assert documents_of_split(corpus, "train") == documents[:80] and documents_of_split(corpus, "val") == documents[80:]


def test_what_is_not_what_it_seems_is_refused(theirs: Path, documents: list[list[int]], tmp_path: Path) -> None:
    def refusal(config: Data) -> str:
        with pytest.raises(BadInput) as caught:
            prepare(config, tmp_path / "c", quiet=True)
        return str(caught.value)

    file = nanogpt(tmp_path / "a.bin", [*documents[:3], [5, 60_000]])
    assert "holds the token 60,000, and the tokenizer" in refusal(tokens_config(file, theirs))
    assert "name its tokenizer" in refusal(Data(path=str(file)))
    for knob in ({"transform": "a:b"}, {"separator": "x"}, {"split": "tail"}, {"document": "line"}):
        assert f"data.{next(iter(knob))}" in refusal(tokens_config(file, theirs, **knob))
    file.write_bytes(file.read_bytes()[:-1])
    assert "is not whole" in refusal(tokens_config(file, theirs))
    file = llm_c(tmp_path / "b.bin", documents, version=2)
    assert "version 2" in refusal(tokens_config(file, theirs))
    file = llm_c(tmp_path / "c.bin", documents)
    file.write_bytes(file.read_bytes()[:-2])
    assert "is not whole" in refusal(tokens_config(file, theirs))
    file = megatron(tmp_path / "d.bin", documents)
    index = file.with_suffix(".idx").read_bytes()
    for damaged, says in ((b"MM", "no index of Megatron's"), (index[:-4], "damaged"), (index[:-8] + bytes(8), "fit")):
        file.with_suffix(".idx").write_bytes(damaged)
        assert says in refusal(tokens_config(file, theirs))
    file.with_suffix(".idx").write_bytes(index)
    file.write_bytes(file.read_bytes()[:-4])
    assert "does not fit" in refusal(tokens_config(file, theirs))
