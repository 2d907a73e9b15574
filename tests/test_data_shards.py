"""A corpus that is not as it was written is refused, by name and with the way out, before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from config import BadInput, Data
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizers import byte_tokenizer
from files import BLOCK, entry_in_blocks, entry_of, hash_of_block


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("abcdefghij" * 10)
    config = Data(corpus="text", path=str(tmp_path / "t.txt"), tokenizer="byte", val_fraction=0.2, test_fraction=0.1)
    return prepare(config, tmp_path / "corpora", quiet=True, shard_tokens=30)


def open_all(directory: Path) -> None:
    corpus = Corpus.open(directory)
    corpus.tokenizer()
    for name in corpus.manifest["splits"]:
        split = corpus.split(name)
        split.read(0, split.n_tokens)
        split.starts(0, split.n_tokens)


def refusal(directory: Path) -> str:
    with pytest.raises(BadInput) as caught:
        open_all(directory)
    assert f"delete {directory} and prepare it again" in str(caught.value)
    return str(caught.value)


def edit_manifest(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def rewrite(directory: Path, name: str, contents: bytes) -> None:
    """Put other bytes into a shard and make the manifest agree with them, as an attacker would."""
    (directory / name).write_bytes(contents)

    def change(manifest: dict[str, Any]) -> None:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                if shard["file"] == name:
                    shard |= entry_in_blocks(directory / name)

    edit_manifest(directory, change)


def test_reading_across_shards(directory: Path) -> None:
    open_all(directory)
    train = Corpus.open(directory).split("train")
    stream = [256, *b"abcdefghij" * 7]
    assert [shard.n_tokens for shard in train.shards] == [30, 30, 11]
    assert (train.n_tokens, train.n_bytes, train.n_documents) == (71, 70, 1)
    for start, stop in ((0, 71), (29, 31), (5, 5), (30, 60), (20, 70), (70, 71), (71, 71)):
        tokens = train.read(start, stop)
        assert tokens.dtype == np.int64 and tokens.tolist() == stream[start:stop]
    for start, stop in ((-1, 3), (0, 72), (5, 4)):
        with pytest.raises(IndexError):
            train.read(start, stop)


def test_head(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(f"line {n}\n" for n in range(100)))
    config = Data(corpus="text", path=str(tmp_path / "t.txt"), tokenizer="byte", document="line")
    train = Corpus.open(prepare(config, tmp_path / "c", quiet=True)).split("train")
    starts = train.starts(0, train.n_tokens)
    head = train.head(int(starts[3]) + 2)
    assert (head.n_documents, head.n_tokens) == (4, starts[3] + 2)
    assert train.head(int(starts[3])).n_documents == 3
    assert head.read(0, head.n_tokens).tolist() == train.read(0, head.n_tokens).tolist()
    with pytest.raises(IndexError):
        head.read(0, head.n_tokens + 1)
    assert abs(head.n_bytes - head.n_tokens * train.n_bytes / train.n_tokens) <= 1
    assert train.head(train.n_tokens + 5) is train


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["train-00001.safetensors", "val-00000.safetensors", "tokenizer.json"])
def test_edited_truncated_missing_and_linked_files_are_refused(directory: Path, name: str) -> None:
    file = directory / name
    good = file.read_bytes()
    for size in (0, 8, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        assert name in refusal(directory)
    for place in (0, 20, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert name in refusal(directory)
    file.write_bytes(good[:-9] + bytes(9))
    assert name in refusal(directory)
    file.rename(directory / "elsewhere")
    assert name in refusal(directory)
    file.symlink_to(directory / "elsewhere")
    assert name in refusal(directory) and "link" in refusal(directory)
    file.unlink()
    (directory / "elsewhere").rename(file)
    file.write_bytes(good)
    open_all(directory)


@pytest.mark.fault(27)
def test_swapped_shards_are_refused(directory: Path) -> None:
    first, second = directory / "train-00000.safetensors", directory / "train-00001.safetensors"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    assert "train-0000" in refusal(directory)


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "..", ".", "", "a/b", "a\\b", "x\0", 3, None, ["a"]])
def test_names_that_lead_elsewhere_are_refused(directory: Path, name: object) -> None:
    (directory.parent / "secret").write_bytes((directory / "train-00000.safetensors").read_bytes())

    def change(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][0]["file"] = name

    edit_manifest(directory, change)
    assert "not a plain file" in refusal(directory)


def test_damaged_manifests_are_refused(directory: Path) -> None:
    file = directory / "manifest.json"
    good = file.read_text()
    for bad in ("", "{", "[]", "3", "{}", '{"splits": 3}', "[" * 100_000, good[: len(good) // 2]):
        file.write_text(bad)
        assert "manifest.json" in refusal(directory)
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m.pop("vocab_size"),
        lambda m: m.update(vocab_size="many"),
        lambda m: m.update(vocab_size=100),
        lambda m: m.update(dtype="F32"),
        lambda m: m["splits"]["train"].update(tokens=70),
        lambda m: m["splits"]["val"]["shards"].clear(),
        lambda m: m["splits"]["train"]["shards"].reverse(),
        lambda m: m["splits"]["train"]["shards"][0].pop("sha256"),
        lambda m: m["splits"]["train"]["shards"][0].update(tokens=-1),
        lambda m: m["splits"]["train"].update(bytes=None),
        lambda m: m["splits"]["train"]["shards"][0].update(blocks="0123"),
    ]
    for change in changes:
        file.write_text(good)
        edit_manifest(directory, change)
        refusal(directory)
    file.unlink()
    with pytest.raises(BadInput, match="no manifest"):
        Corpus.open(directory)


def header(fields: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.mark.fault(19)
def test_hostile_headers_are_refused_before_anything_is_allocated(directory: Path) -> None:
    name = "val-00000.safetensors"  # 21 tokens, one document
    starts = {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}
    tokens = {"dtype": "U16", "shape": [21], "data_offsets": [8, 50]}
    good = {"document_starts": starts, "tokens": tokens}
    stream = struct.pack("<q", 0) + np.array([256, *b"abcdefghij" * 2], dtype="<u2").tobytes()
    rewrite(directory, name, header(good, stream))
    open_all(directory)
    huge = 2**62
    hostile = [
        header(good, stream, length=huge),
        header(good, stream, length=2**64 - 1),
        header(good, stream, length=0),
        b"\xff" * 8,
        b"",
        b"\x00" * 7,
        header([], stream),
        header("text", stream),
        header({**good, "more": tokens}, stream),
        header({"tokens": tokens}, stream),
        header({**good, "tokens": {**tokens, "shape": [huge]}}, stream),
        header({**good, "tokens": {**tokens, "shape": [-21]}}, stream),
        header({**good, "tokens": {**tokens, "shape": [2**32, 2**32]}}, stream),
        header({**good, "tokens": {**tokens, "dtype": "F16"}}, stream),
        header({**good, "tokens": {**tokens, "data_offsets": [0, 42]}}, stream),
        header({**good, "tokens": {**tokens, "data_offsets": [8, huge]}}, stream),
        header({**good, "tokens": {**tokens, "data_offsets": [50, 8]}}, stream),
        header({**good, "tokens": {**tokens, "data_offsets": None}}, stream),
        header(good, stream + b"more"),
        header(good, stream[:-2]),
        struct.pack("<Q", 40_000) + b"[" * 40_000,
    ]
    for contents in hostile:
        rewrite(directory, name, contents)
        assert name in refusal(directory)


def test_where_documents_begin_across_shards(tmp_path: Path) -> None:
    """Each document begins with 256, which bytes never are; some go on over shards in which none begins."""
    lines = ["x" * length for length in (3, 1, 40, 2, 2, 25, 7, 1, 1, 60)] * 5
    (tmp_path / "t.txt").write_text("\n".join(lines))
    config = Data(corpus="text", path=str(tmp_path / "t.txt"), tokenizer="byte", document="line", test_fraction=0)
    config = config.model_copy(update={"val_fraction": 0.3})
    corpus = Corpus.open(prepare(config, tmp_path / "c", quiet=True, shard_tokens=10))
    for name in ("train", "val"):
        split = corpus.split(name)
        assert any(shard.n_documents == 0 for shard in split.shards[:-1]) or name == "val"
        expected = np.flatnonzero(split.read(0, split.n_tokens) == corpus.end_of_text)
        assert split.n_documents == len(expected)
        for begin in range(0, split.n_tokens, 3):
            assert split.documents_before(begin) == (expected < begin).sum()
            for end in range(begin, min(begin + 60, split.n_tokens) + 1, 7):
                inside = (begin <= expected) & (expected < end)
                assert split.starts(begin, end).tolist() == expected[inside].tolist()
        for first in range(len(expected)):
            assert split.document_starts(first, len(expected)).tolist() == expected[first:].tolist()


def test_document_starts_out_of_order_are_refused_when_they_are_used(directory: Path) -> None:
    tokens = np.array([256, *b"abcdefghij" * 2], dtype=np.uint16)
    for starts in ([5], [-1], [10**12], [0, 9, 5], [0, 9, 9], [0, 21]):
        save_file({"document_starts": np.array(starts), "tokens": tokens}, directory / "x")
        rewrite(directory, "val-00000.safetensors", (directory / "x").read_bytes())

        def count(manifest: dict[str, Any], documents: int = len(starts)) -> None:
            manifest["splits"]["val"]["shards"][0]["documents"] = manifest["splits"]["val"]["documents"] = documents

        edit_manifest(directory, count)
        val = Corpus.open(directory).split("val")
        assert val.read(0, 21).tolist() == tokens.tolist()  # windows do without the index, and never read it
        assert "document_starts" in refusal(directory)
        with pytest.raises(BadInput, match=r"document_starts of .*val-00000.safetensors are out of order"):
            val.starts(3, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_shards_are_opened_when_they_are_read_and_none_is_kept_open(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcdefghij" * 500)
    config = Data(corpus="text", path=str(tmp_path / "t.txt"), tokenizer="byte")
    train = Corpus.open(prepare(config, tmp_path / "corpora", quiet=True, shard_tokens=30)).split("train")
    assert len(train.shards) > 100
    train.shards[7].path.unlink()
    before = len(os.listdir("/proc/self/fd"))
    assert train.read(7 * 30 - 2, 7 * 30).tolist() == [*b"hi"]
    with pytest.raises(BadInput, match=r"train-00007.safetensors cannot be read"):
        train.read(7 * 30 - 2, 7 * 30 + 1)
    assert len(train.read(8 * 30, train.n_tokens)) == train.n_tokens - 8 * 30
    assert len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.fault(26)
def test_an_id_outside_the_vocabulary_is_named_with_shard_and_offset(directory: Path) -> None:
    tokens = np.array([*b"abcdefghij" * 3], dtype=np.uint16)
    tokens[17] = 257  # the first that the vocabulary does not have
    starts = np.zeros(0, dtype=np.int64)
    save_file({"document_starts": starts, "tokens": tokens}, directory / "x")
    rewrite(directory, "train-00001.safetensors", (directory / "x").read_bytes())
    train = Corpus.open(directory).split("train")
    train.read(30, 47)
    with pytest.raises(BadInput, match=r"train-00001\.safetensors holds token 257 at offset 17, .* 257 entries"):
        train.read(25, 60)


@pytest.mark.fault(28)
def test_another_tokenizer_of_the_same_size_changes_the_fingerprint(directory: Path) -> None:
    before = Corpus.open(directory).fingerprint
    file = directory / "tokenizer.json"
    other = file.read_text().replace('"A":65', '"A":66').replace('"B":66', '"B":65')
    other = other.replace('"A": 65', '"A": 66').replace('"B": 66', '"B": 65')
    assert other != file.read_text()
    file.write_text(other)
    assert "tokenizer.json" in refusal(directory)
    digest = hashlib.sha256(other.encode()).hexdigest()
    edit_manifest(directory, lambda m: m["tokenizer"].update(sha256=digest, size=len(other.encode())))
    assert Corpus.open(directory).fingerprint != before


@pytest.mark.fault(18)
def test_nothing_is_unpickled(directory: Path) -> None:
    loads: list[object] = []
    sys.addaudithook(lambda event, arguments: loads.append(arguments) if event == "pickle.find_class" else None)

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    for name in ("train.pt", "train-00009.safetensors", "tokenizer.pkl", "manifest.pkl"):
        (directory / name).write_bytes(pickle.dumps(Evil()))
    np.save(directory / "tokens.npy", np.array([Evil()]), allow_pickle=True)
    open_all(directory)
    rewrite(directory, "val-00000.safetensors", pickle.dumps(Evil()))
    refusal(directory)
    assert loads == []


def flip(file: Path, place: int) -> None:
    contents = bytearray(file.read_bytes())
    contents[place] ^= 1
    file.write_bytes(contents)


def test_a_block_is_compared_before_it_is_first_read(tmp_path: Path) -> None:
    """Of 500,000 tokens in a megabyte, four blocks and a header, those of the third are edited; the others are good."""
    (tmp_path / "t.txt").write_text("0123456789" * 60_000)
    config = Data(corpus="text", path=str(tmp_path / "t.txt"), tokenizer="byte", val_fraction=0.1, test_fraction=0)
    directory = prepare(config, tmp_path / "corpora", quiet=True)
    file = directory / "train-00000.safetensors"
    data = file.stat().st_size - 2 * 540_001  # where the tokens begin
    edited = 2 * BLOCK + 77
    flip(file, edited)
    train = Corpus.open(directory).split("train")
    first, behind = (2 * BLOCK - data) // 2, (3 * BLOCK - data) // 2
    assert train.read(0, first).tolist() == [256, *(b"0123456789" * 60_000)[: first - 1]]
    assert train.read(behind, behind + 9).tolist() == [*(b"0123456789" * 60_000)[behind - 1 : behind + 8]]
    for start, stop in ((first, first + 1), (first - 1, first + 1), (behind - 1, behind), (0, train.n_tokens)):
        with pytest.raises(BadInput, match=r"train-00000.safetensors is damaged: its bytes from 524,288 on differ"):
            train.read(start, stop)
    assert "train-00000.safetensors" in refusal(directory)
    with pytest.raises(BadInput, match=r"train-00000.safetensors is damaged"):
        Corpus.open(directory).verify()
    flip(file, edited)
    open_all(directory)
    Corpus.open(directory).verify()


def test_old_manifests_have_all_bytes_compared_at_the_start(directory: Path) -> None:
    """They have no hashes of blocks; a neighbour that has compared all may spare us that."""

    def as_of_old(manifest: dict[str, Any]) -> None:
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                assert shard.pop("blocks")

    fingerprint = Corpus.open(directory).fingerprint
    edit_manifest(directory, as_of_old)
    assert Corpus.open(directory).fingerprint == fingerprint
    open_all(directory)
    file = directory / "train-00000.safetensors"
    flip(file, -1)
    with pytest.raises(BadInput, match="sha256 differs"):
        Corpus.open(directory)
    Corpus.open(directory, verify=False)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BadInput, match="bytes"):
        Corpus.open(directory, verify=False)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_an_entry_has_a_hash_for_each_block(tmp_path: Path, size: int) -> None:
    contents = np.random.default_rng(size).bytes(size)
    (tmp_path / "x").write_bytes(contents)
    entry = entry_in_blocks(tmp_path / "x")
    digests = [hashlib.sha256(contents[at : at + BLOCK]).hexdigest()[:16] for at in range(0, size, BLOCK)]
    assert entry.pop("blocks") == "".join(digests) and entry == entry_of(tmp_path / "x")


MEASURE = """
import sys, time
import numpy.random, torch
from config import Data
from data.loader import TrainingLoader
from data.shards import Corpus

def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1000

def first_batch():
    loader = TrainingLoader(Corpus.open(sys.argv[1]).split("train"), data, 0, 1024, 8)
    assert loader.n_tokens == 10**10 and loader.batch(10**6).tokens_BT.numel() == 8 * 1024

data = Data(corpus="text", path="x", shuffle=sys.argv[2], isolate_documents=sys.argv[2] == "documents")
before, took = held(), []
for _ in range(3):
    started = time.process_time()
    first_batch()
    took.append(time.process_time() - started)
print(min(took), held() - before)
"""


@pytest.fixture(scope="module")
def ten_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 shards of 50 million tokens, all zero and sparse: one file of 200 names."""
    directory = tmp_path_factory.mktemp("large")
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    documents, tokens = 100_000, 50_000_000
    starts = np.arange(0, tokens, tokens // documents)
    offsets = {"document_starts": [0, 8 * documents], "tokens": [8 * documents, 8 * documents + 2 * tokens]}
    fields = {
        "document_starts": {"dtype": "I64", "shape": [documents], "data_offsets": offsets["document_starts"]},
        "tokens": {"dtype": "U16", "shape": [tokens], "data_offsets": offsets["tokens"]},
    }
    head = json.dumps(fields).encode()
    head = (
        struct.pack("<Q", len(head) + -len(head) % 8) + head + b" " * (-len(head) % 8) + starts.astype("<i8").tobytes()
    )
    size = len(head) - starts.nbytes + offsets["tokens"][1]
    file = directory / "train-00000.safetensors"
    with open(file, "wb") as handle:
        handle.write(head)
        handle.truncate(size)
    zeros, written = bytes(BLOCK), len(head) // BLOCK + 1
    blocks = [(head + zeros)[number * BLOCK :][:BLOCK] for number in range(written)]
    blocks += [zeros[: min(BLOCK, size - at)] for at in range(written * BLOCK, size, BLOCK)]
    entry = {"size": size, "sha256": "0" * 64, "tokens": tokens, "documents": documents}
    entry["blocks"] = "".join(map(hash_of_block, blocks))
    for number in range(1, 200):
        os.link(file, directory / f"train-{number:05d}.safetensors")
    shards = [entry | {"file": f"train-{number:05d}.safetensors"} for number in range(200)]
    train = {"bytes": 200 * tokens, "tokens": 200 * tokens, "documents": 200 * documents, "shards": shards}
    manifest = {
        "describe": "zeros",
        "replaced": "nothing",
        "tokenizer": {"file": "tokenizer.json", **entry_of(directory / "tokenizer.json")},
        "vocab_size": 257,
        "end_of_text": 256,
        "dtype": "U16",
        "splits": {"train": train},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
@pytest.mark.parametrize("shuffle", ["windows", "documents"])
def test_ten_billion_tokens_give_their_first_batch_at_once(ten_billion: Path, shuffle: str) -> None:
    """In 0.2 CPU-seconds (the best of three, as machines are busy) and 50 MB; documents shuffled and isolated, too."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, ten_billion, shuffle], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 0.2 and megabytes < 50
