"""Preparation: literal splits, the same bytes each time, all or nothing, and errors that leave nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import files
from config import BadInput, Data
from data import encoding, sources
from data import prepare as preparation
from data.encoding import encode_documents
from data.known import CACHE
from data.pieces import cut
from data.prepare import prepare, progress_bar, split_of
from data.shards import Corpus
from data.tokenizers import train_bpe
from scripts import prepare_data

PROJECT = Path(__file__).parent.parent


def text_config(path: object, **knobs: object) -> Data:
    return Data(corpus="text", path=str(path), **{"tokenizer": "byte", **knobs})  # type: ignore[arg-type]


def many_documents(path: Path, count: int = 300) -> Path:
    rows = [{"text": f"document {number}: " + "lorem ipsum " * (number % 7)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents_of(corpus: Corpus, name: str) -> list[str]:
    split = corpus.split(name)
    starts = split.starts(0, split.n_tokens)
    texts = []
    for start, stop in pairwise([*starts, split.n_tokens]):
        tokens = split.read(int(start), int(stop))
        assert tokens[0] == corpus.end_of_text and corpus.end_of_text not in tokens[1:]
        texts.append(corpus.tokenizer().decode(tokens[1:].tolist(), skip_special_tokens=False))
    return texts


def test_a_tail_split_worked_by_hand(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcde")
    (tmp_path / "b.txt").write_text("fghéjklmno")  # 15 characters, 16 bytes: train 9, val 3, test 3
    directory = prepare(text_config(tmp_path / "*.txt", val_fraction=0.2, test_fraction=0.2), tmp_path / "corpora")
    tensors = load_file(directory / "train-00000.safetensors")
    assert tensors["tokens"].tolist() == [256, *b"abcde", 256, *"fghé".encode()]
    assert tensors["document_starts"].tolist() == [0, 6]
    corpus = Corpus.open(directory)
    assert documents_of(corpus, "val") == ["jkl"] and documents_of(corpus, "test") == ["mno"]
    train = corpus.split("train")
    assert (train.n_tokens, train.n_bytes, train.n_documents) == (12, 10, 2)
    assert (corpus.vocab_size, corpus.end_of_text) == (257, 256)


def test_no_test_split_when_its_share_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    corpus = Corpus.open(prepare(text_config(tmp_path / "a.txt", val_fraction=0.3, test_fraction=0), tmp_path / "c"))
    assert documents_of(corpus, "train") == ["0123456"] and documents_of(corpus, "val") == ["789"]
    with pytest.raises(BadInput, match="no test split"):
        corpus.split("test")


def test_each_document_is_in_one_split_and_stays_there(tmp_path: Path) -> None:
    rows = many_documents(tmp_path / "rows.jsonl", 1000)
    config = text_config(rows, val_fraction=0.1, test_fraction=0.2)
    corpus = Corpus.open(prepare(config, tmp_path / "corpora", quiet=True))
    splits = {name: documents_of(corpus, name) for name in ("train", "val", "test")}
    everything = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    assert sorted(chain.from_iterable(splits.values())) == sorted(everything)
    assert all(split_of(text, 0.1, 0.2) == name for name, texts in splits.items() for text in texts)
    # Binomial counts: five standard deviations are 50 and 65.
    assert abs(len(splits["val"]) - 100) < 50 and abs(len(splits["test"]) - 200) < 65
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True)[:500])))
    fewer = Corpus.open(prepare(config, tmp_path / "corpora", quiet=True))
    for name, texts in splits.items():
        assert documents_of(fewer, name) == [text for text in reversed(everything[:500]) if text in texts]


@pytest.mark.parametrize(("text", "fraction"), [("a", 0.253794), ("b", 0.517376), ("hello", 0.655135)])
def test_splits_of_known_hashes(text: str, fraction: float) -> None:
    # The fractions are those of `printf a | b2sum -l 64`, divided by 2^64.
    assert split_of(text, 0.01, fraction + 0.001) == "test"
    assert split_of(text, 0.01, fraction - 0.001) == "val"
    assert split_of(text, 0.01, fraction - 0.02) == "train"


def test_all_that_a_transform_makes_of_a_document_stays_in_its_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "doubling.py").write_text("def twice(text): return [text, text.upper()]\n")
    monkeypatch.chdir(tmp_path)
    config = text_config(many_documents(tmp_path / "rows.jsonl"), transform="doubling:twice")
    corpus = Corpus.open(prepare(config, quiet=True))
    assert corpus.directory.parent == Path("corpora")
    for name in ("train", "val", "test"):
        texts = documents_of(corpus, name)
        assert texts[1::2] == [text.upper() for text in texts[::2]] and texts


def test_the_tail_is_cut_before_the_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten letters, of which two each are held out; what is made of them is held out with them."""
    (tmp_path / "doubling.py").write_text("def twice(text): return [text, text.upper()]\n")
    (tmp_path / "a.txt").write_text("abcdefghij")
    monkeypatch.chdir(tmp_path)
    config = text_config("a.txt", transform="doubling:twice", val_fraction=0.2, test_fraction=0.2)
    corpus = Corpus.open(prepare(config, quiet=True))
    found = {name: documents_of(corpus, name) for name in ("train", "val", "test")}
    assert found == {"train": ["abcdef", "ABCDEF"], "val": ["gh", "GH"], "test": ["ij", "IJ"]}


@pytest.mark.parametrize("function", ["lower", "swap", "plain_and_swap"])
def test_no_transformed_text_is_in_two_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Documents in pairs that the transform makes one (lower), each other (swap), or each other and themselves.

    Whatever stands in test is out of val and train, whatever stands in val out of train; nothing else is lost, and
    train has no text that a held-out document was before its transform.
    """
    (tmp_path / "pairs.py").write_text(
        "def lower(text): return text.lower()\n"
        "def swap(text): return text.swapcase()\n"
        "def plain_and_swap(text): return [text, text.swapcase()]\n"
    )
    sources = [form(f"Document {number}") for number in range(300) for form in (str, str.swapcase)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sources))
    monkeypatch.chdir(tmp_path)
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    corpus = Corpus.open(prepare(text_config("rows.jsonl", transform=f"pairs:{function}", **fractions), quiet=True))
    found = {name: documents_of(corpus, name) for name in ("train", "val", "test")}

    import pairs  # type: ignore[import-not-found]

    given: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    before: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for text in sources:
        name = split_of(text, 0.2, 0.2)
        before[name].append(text)
        made = getattr(pairs, function)(text)
        given[name] += [made] if isinstance(made, str) else made
    assert found["test"] == given["test"]
    test = {*given["test"], *before["test"]}
    assert found["val"] == [text for text in given["val"] if text not in test]
    held_out = test | {*given["val"], *before["val"]}
    assert found["train"] == [text for text in given["train"] if text not in held_out]
    left_out = sum(map(len, given.values())) - sum(map(len, found.values()))
    assert left_out > 50
    assert f"{left_out} transformed texts left out" in corpus.manifest["replaced"]


@pytest.mark.parametrize("split", ["tail", "documents"])
def test_a_random_transform_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    (tmp_path / "growing.py").write_text(
        "calls = []\ndef more(text):\n    calls.append(1)\n    return text * len(calls)"
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("abc " * 100)
    with pytest.raises(BadInput, match=r"gave two results .*'abc abc"):
        prepare(text_config("a.txt", transform="growing:more", split=split), quiet=True)


def test_bpe_sees_the_training_split_alone(tmp_path: Path) -> None:
    rows = many_documents(tmp_path / "rows.jsonl")
    corpus = Corpus.open(prepare(text_config(rows, tokenizer="bpe", vocab_size=300), tmp_path / "c", quiet=True))
    train = documents_of(corpus, "train")
    assert corpus.tokenizer().to_str() == train_bpe(train, 300).to_str()
    secret = "zqxjkvwzqxjkvw"
    (tmp_path / "t.txt").write_text("common words " * 900 + secret * 80)  # the secret is in the tail only
    corpus = Corpus.open(prepare(text_config(tmp_path / "t.txt", tokenizer="bpe"), tmp_path / "c", quiet=True))
    assert not any("zq" in token for token in corpus.tokenizer().get_vocab())
    assert any("common" in token for token in corpus.tokenizer().get_vocab())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    config = text_config(many_documents(tmp_path / "rows.jsonl"), tokenizer="bpe", vocab_size=400)
    first, second = (prepare(config, tmp_path / root, quiet=True, shard_tokens=1000) for root in "ab")
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir()) and first.name == second.name
    assert sum(name.startswith("train") for name in files) > 2
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)


def test_shards_hold_one_stream(tmp_path: Path) -> None:
    config = text_config(many_documents(tmp_path / "rows.jsonl"))
    whole = Corpus.open(prepare(config, tmp_path / "a", quiet=True)).split("train")
    corpus = Corpus.open(prepare(config, tmp_path / "a", quiet=True, shard_tokens=37))
    split = corpus.split("train")
    assert len(split.shards) > 100 and all(shard.n_tokens == 37 for shard in split.shards[:-1])
    assert split.starts(0, split.n_tokens).tolist() == whole.starts(0, split.n_tokens).tolist()
    assert split.read(0, split.n_tokens).tolist() == whole.read(0, whole.n_tokens).tolist()
    assert split.read(30, 200).tolist() == whole.read(30, 200).tolist()


def test_what_the_fingerprint_follows(tmp_path: Path) -> None:
    rows = many_documents(tmp_path / "rows.jsonl")

    def name(**knobs: object) -> str:
        return prepare(text_config(rows, **knobs), tmp_path / "c", quiet=True).name

    base = name()
    assert base.startswith("rows-")
    assert base == name(train_tokens=10) == name(shuffle="documents") == name(isolate_documents=True)
    assert base == name(vocab_size=300)  # bytes have no size to choose
    others = {name(tokenizer="bpe"), name(tokenizer="bpe", vocab_size=300), name(val_fraction=0.1)}
    others |= {name(test_fraction=0), name(split="tail"), name(max_documents=290)}
    assert len(others | {base}) == 7
    rows.write_text(rows.read_text().replace("lorem", "LOREM", 1))
    assert name() not in others | {base}


def test_wide_vocabularies_get_wide_tokens(tmp_path: Path) -> None:
    words = {f"w{number}": number for number in range(70_000)} | {"</s>": 70_000}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "wide.json"))
    (tmp_path / "t.txt").write_text("w1 w69999 w65536 w2 " * 20)
    directory = prepare(text_config(tmp_path / "t.txt", tokenizer=str(tmp_path / "wide.json")), tmp_path / "c")
    assert str(load_file(directory / "train-00000.safetensors")["tokens"].dtype) == "uint32"
    corpus = Corpus.open(directory)
    assert (corpus.vocab_size, corpus.manifest["dtype"]) == (70_001, "U32")
    assert corpus.split("train").read(0, 5).tolist() == [70_000, 1, 69_999, 65_536, 2]


def test_preparing_again_only_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_bytes(b"some text\r\n" * 20 + b"\xff")
    directory = prepare(text_config(tmp_path / "t.txt"), tmp_path / "c")
    said = capsys.readouterr().out
    assert "20 CRLF became LF" in said and "1 invalid bytes" in said and "train:" in said and "bytes per token" in said
    stamps = {file: file.stat().st_mtime_ns for file in directory.iterdir()}
    assert said.startswith(f"data       {tmp_path / 't.txt'} (1 file)\n")
    assert prepare(text_config(tmp_path / "t.txt"), tmp_path / "c") == directory
    assert capsys.readouterr().out == f"data       {tmp_path / 't.txt'} (1 file)\n"
    assert prepare(text_config(tmp_path / "t.txt"), tmp_path / "c", quiet=True) == directory
    assert capsys.readouterr().out == ""
    assert stamps == {file: file.stat().st_mtime_ns for file in directory.iterdir()}


def test_the_standard_library_is_found_again_quickly(tmp_path: Path) -> None:
    config = Data(tokenizer="byte")
    directory = prepare(config, tmp_path, quiet=True)
    start = time.perf_counter()
    assert prepare(config, tmp_path, quiet=True) == directory
    assert time.perf_counter() - start < 2  # 0.15 s on a quiet machine


@pytest.mark.fault(31)
def test_texts_too_small_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    def refusal(path: Path, **knobs: object) -> str:
        with pytest.raises(BadInput) as caught:
            prepare(text_config(path, **knobs), tmp_path / "c", quiet=True)
        assert [name for name in os.listdir(tmp_path / "c") if not name.endswith(".lock") and name != CACHE] == []
        return str(caught.value)

    (tmp_path / "empty.txt").write_text("")
    assert "no text" in refusal(tmp_path / "empty.txt")
    assert "no text" in refusal(tmp_path / "empty.txt", tokenizer="bpe", document="line")
    (tmp_path / "one.jsonl").write_text('{"text": "a single document"}\n')
    assert "the val split" in refusal(tmp_path / "one.jsonl")
    assert "data.split=tail" in refusal(tmp_path / "one.jsonl")
    (tmp_path / "short.txt").write_text("abcd")
    assert "data.val_fraction" in refusal(tmp_path / "short.txt", test_fraction=0)
    assert "data.test_fraction=0" in refusal(tmp_path / "short.txt", val_fraction=0.3)
    (tmp_path / "torn.jsonl").write_text('{"text": "x"}\n' * 50 + "{")
    assert "line 51" in refusal(tmp_path / "torn.jsonl")
    (tmp_path / "binary.txt").write_bytes(b"text \0")
    assert "looks binary" in refusal(tmp_path / "binary.txt")


@pytest.mark.fault(31)
def test_one_huge_line(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("word " * 400_000)
    corpus = Corpus.open(prepare(text_config(tmp_path / "t.txt"), tmp_path / "c", quiet=True))
    assert corpus.split("train").n_tokens == 1 + 1_800_000


def test_an_unwritable_root_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text " * 100)
    (tmp_path / "c").write_text("a file where the directory should be")
    with pytest.raises(BadInput, match="cannot write the corpus"):
        prepare(text_config(tmp_path / "t.txt"), tmp_path / "c", quiet=True)


def start_preparing(source: Path, root: Path, **knobs: object) -> subprocess.Popen[str]:
    """A process of its own that prepares; ``knobs`` are of prepare()."""
    code = (
        "import sys; from config import Data; from data.prepare import prepare\n"
        f"prepare(Data(corpus='text', path={str(source)!r}, tokenizer='byte'), {str(root)!r}, quiet=True, **{knobs!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stderr=subprocess.PIPE, text=True)


def killed_at_work(source: Path, root: Path, **knobs: object) -> Path:
    """The directory of a preparation that was killed -9 when it had made three blocks."""
    process = start_preparing(source, root, **knobs)
    deadline = time.time() + 30
    while len(list(root.glob(".*.partial/block-*"))) < 3 and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not [path for path in root.iterdir() if path.suffix != ".partial" and not path.name.startswith(".")]
    (partial,) = root.glob(".*.partial")
    return partial


def same_files(one: Path, other: Path) -> bool:
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in other.iterdir()) and one.name == other.name
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.fault(2)
def test_kill_9_loses_the_block_at_work(tmp_path: Path) -> None:
    """The next one goes on, does no block again that was there, and ends with the same bytes."""
    source, root, knobs = tmp_path / "rows.jsonl", tmp_path / "c", {"shard_tokens": 100_000, "block_bytes": 5_000}
    many_documents(source, 30_000)  # of about 50 bytes: 300 blocks
    alone = prepare(text_config(source), tmp_path / "alone", quiet=True, **knobs)
    partial = killed_at_work(source, root, **knobs)
    first = partial / "block-000000.safetensors"
    assert json.loads((partial / "state.json").read_text()).get("blocks") is None
    shutil.copytree(root, tmp_path / "marked")
    assert same_files(prepare(text_config(source), root, quiet=True, **knobs), alone)
    assert not partial.exists()
    # A mark in a block that was there is there in the end.
    mark = tmp_path / "marked" / partial.name / first.name
    tensors = load_file(mark)
    tensors["train.tokens"] = np.array([256, 77, *tensors["train.tokens"][2:]], np.uint16)
    save_file(tensors, mark)
    marked = Corpus.open(prepare(text_config(source), tmp_path / "marked", quiet=True, **knobs)).split("train")
    assert marked.read(0, 2).tolist() == [256, 77] != Corpus.open(alone).split("train").read(0, 2).tolist()


@pytest.mark.fault(2)
def test_what_a_kill_left_is_kept_for_a_week(tmp_path: Path) -> None:
    small, root = tmp_path / "small.txt", tmp_path / "c"
    partial = killed_at_work(many_documents(tmp_path / "rows.jsonl", 30_000), root, block_bytes=5_000)
    (root / "small-dead").mkdir()  # a stranger's directory is not debris
    for days, kept in ((6, True), (8, False)):
        small.write_text(f"some words of text {days}\n" * 20)
        os.utime(partial, (time.time() - days * 86_400,) * 2)
        with files.lock(partial.with_suffix(".lock")):
            prepare(text_config(small, val_fraction=0.1), root, quiet=True)
        assert partial.is_dir()  # somebody is at work on it
        prepare(text_config(small), root, quiet=True)
        assert partial.is_dir() == kept and (root / "small-dead").is_dir()


def test_blocks_of_another_size_are_made_again(tmp_path: Path) -> None:
    source, root = many_documents(tmp_path / "rows.jsonl", 30_000), tmp_path / "c"
    killed_at_work(source, root, block_bytes=5_000)
    found = prepare(text_config(source), root, quiet=True, block_bytes=7_000)
    assert same_files(found, prepare(text_config(source), tmp_path / "alone", quiet=True))


def test_the_jobs_of_an_array_make_the_same_corpus(tmp_path: Path) -> None:
    """Three at once, in processes of their own, one of which is killed and started again."""
    source, root, knobs = many_documents(tmp_path / "rows.jsonl", 9_000), tmp_path / "c", {"block_bytes": 5_000}
    alone = prepare(text_config(source), tmp_path / "alone", quiet=True)
    with pytest.raises(BadInput, match="no job has come to the end of the text"):
        prepare(text_config(source), root, quiet=True, merge=True, **knobs)
    processes = [start_preparing(source, root, job=(index, 3), **knobs) for index in range(3)]
    while not list(root.glob(".*.partial/block-*")):
        time.sleep(0.002)
    processes[1].kill()
    assert [process.wait(60) for process in processes] == [0, -9, 0] and not list(root.glob("rows-*"))
    with pytest.raises(BadInput, match=r"blocks are missing in .*leave out --merge"):
        prepare(text_config(source), root, quiet=True, merge=True, **knobs)
    assert start_preparing(source, root, job=(1, 3), **knobs).wait(60) == 0
    (partial,) = root.glob(".*.partial")
    made = {int(file.stem[-6:]) for file in partial.glob("block-*")}
    assert made == set(range(len(made))) and len(made) > 50
    assert same_files(prepare(text_config(source), root, quiet=True, merge=True, **knobs), alone)
    assert not list(root.glob(".*.partial"))


def test_jobs_work_side_by_side_and_what_puts_them_together_waits(tmp_path: Path) -> None:
    source, root = many_documents(tmp_path / "rows.jsonl"), tmp_path / "c"
    directory = prepare(text_config(source), tmp_path / "alone", quiet=True)
    root.mkdir()
    with files.lock(root / f".{directory.name}.lock", shared=True):  # as a job at work holds it
        whole = start_preparing(source, root)
        assert start_preparing(source, root, job=(0, 2)).wait(30) == 0
        time.sleep(0.5)
        assert whole.poll() is None and not (root / directory.name).exists()
    assert whole.wait(30) == 0 and same_files(root / directory.name, directory)


@pytest.mark.fault(20)
@pytest.mark.parametrize("limit", [8_000, 100_000])
def test_a_full_disk_is_told_and_what_is_there_is_gone_on_with(tmp_path: Path, limit: int) -> None:
    """A disk that takes no file of a block's size, and one that takes no shard."""
    source, root, knobs = many_documents(tmp_path / "rows.jsonl", 9_000), tmp_path / "c", {"block_bytes": 5_000}
    process = start_preparing(source, root, **knobs)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    errors = process.communicate(timeout=60)[1]
    assert "config.BadInput: cannot write the corpus" in errors and "start again: it will go on" in errors
    assert "File too large" in errors
    (partial,) = root.glob(".*.partial")
    assert (len(list(partial.glob("block-*"))) > 50) == (limit == 100_000)
    assert same_files(
        prepare(text_config(source), root, quiet=True, **knobs), prepare(text_config(source), tmp_path / "alone")
    )


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "cores", lambda: 2)  # each more has a few megabytes of its own
    peaks = []
    for size in (20_000_000, 40_000_000):
        (tmp_path / "t.txt").write_text("some words " * (size // 11))
        tracemalloc.start()
        prepare(text_config(tmp_path / "t.txt"), tmp_path / "c", quiet=True, shard_tokens=10**6, block_bytes=10**6)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0] < 60e6


@pytest.mark.parametrize("limit", [20, 50])
def test_a_document_in_pieces_gives_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Across splits too, whose ends lie within pieces, between them, and at the ends of documents."""
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(f"The {name} text of words,\nit's short. " * 5)
    config = text_config(tmp_path / "*.txt", tokenizer="bpe", vocab_size=280, val_fraction=1 / 3, test_fraction=1 / 3)
    whole = prepare(config, tmp_path / "whole", quiet=True)
    assert Corpus.open(whole).split("val").n_documents == 2
    monkeypatch.setattr(sources, "cut", lambda fragments: cut(fragments, limit))
    assert same_files(prepare(config, tmp_path / "pieces", quiet=True), whole)
    uneven = config.model_copy(update={"val_fraction": 0.21, "test_fraction": 0.33})
    pieces = prepare(uneven, tmp_path / "pieces", quiet=True)
    monkeypatch.undo()
    assert same_files(prepare(uneven, tmp_path / "whole", quiet=True), pieces)


def test_a_tokenizer_that_reaches_across_pieces_gets_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose tokens have blanks within."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    text = "one two three. " * 20
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(tmp_path / "mine.json"))
    (tmp_path / "t.txt").write_text(text)
    monkeypatch.setattr(sources, "cut", lambda fragments: cut(fragments, 20))
    config = text_config(tmp_path / "t.txt", tokenizer=str(tmp_path / "mine.json"), val_fraction=0.2, test_fraction=0)
    train = Corpus.open(prepare(config, tmp_path / "c", quiet=True)).split("train")
    expected = tokenizer.encode(text[:240], add_special_tokens=False).ids
    assert train.read(1, train.n_tokens).tolist() == expected and len(expected) < 40


def test_a_sample_for_the_tokenizer_is_drawn_evenly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of ten stretches of text, each with a word of its own, a tenth has all ten words."""
    words = ["zebra", "quick", "jolly", "vexed", "fudge", "money", "hotel", "brisk", "wispy", "graph"]
    source = tmp_path / "t.txt"
    source.write_text("".join(f"{word} {word} {word}\n" * 300 for word in words))
    config = text_config(source, document="line", split="tail", val_fraction=0.001, test_fraction=0, tokenizer="bpe")
    config = config.model_copy(update={"vocab_size": 400, "tokenizer_sample": 6000})
    corpus = Corpus.open(prepare(config, tmp_path / "c"))
    assert all(f"Ġ{word}" in corpus.tokenizer().get_vocab() for word in words)
    trained_on = json.loads((corpus.directory / "manifest.json").read_text())["tokenizer"]["trained_on"]
    assert 6000 <= trained_on < 6018
    assert f"trained on {trained_on:,} of 50,949 characters, drawn evenly" in capsys.readouterr().out
    everything = prepare(config.model_copy(update={"tokenizer_sample": 60_000}), tmp_path / "c")
    assert json.loads((everything / "manifest.json").read_text())["tokenizer"]["trained_on"] > 50_000
    assert "drawn evenly" not in capsys.readouterr().out


def test_progress_without_a_terminal_is_told_in_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From time to time, also while nothing comes to its end."""
    assert preparation.TELL_EVERY <= 60
    monkeypatch.setattr(preparation, "TELL_EVERY", 0.01)
    with progress_bar("tokenizing", 3_000_000, quiet=False) as bar:
        bar.set_postfix_str("0.3M tokens", refresh=False)
        bar.update(1_000_000)
        time.sleep(0.1)
    with progress_bar("in silence", 3_000_000, quiet=True) as bar:
        bar.update(1_000_000)
        time.sleep(0.05)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    for line in lines:
        form = r"tokenizing: 1.00MB of 3.00MB in \d\d:\d\d, \S+B/s, \d\d:\d\d left, 0.3M tokens"
        assert re.fullmatch(form, line), line


def test_two_processes_do_the_work_once(tmp_path: Path) -> None:
    source, root = tmp_path / "t.txt", tmp_path / "c"
    source.write_text("some words of text\n" * 50_000)
    directory = prepare(text_config(source), tmp_path / "alone", quiet=True)
    lock = root / f".{directory.name}.lock"
    root.mkdir()
    with open(lock, "w") as handle:  # both wait for us, then one finds what the other has made
        fcntl.flock(handle, fcntl.LOCK_EX)
        processes = [start_preparing(source, root) for _ in range(2)]
        time.sleep(1)
        assert [process.poll() for process in processes] == [None, None] and set(os.listdir(root)) <= {lock.name, CACHE}
    assert [process.wait(30) for process in processes] == [0, 0]
    assert set(os.listdir(root)) - {CACHE} == {lock.name, directory.name}
    assert Corpus.open(root / directory.name).fingerprint == Corpus.open(directory).fingerprint


def test_the_script(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 30)
    command = [sys.executable, "-m", "scripts.prepare_data", "--data.corpus=text", "--data.tokenizer=byte"]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT)}
    for _ in range(2):
        done = subprocess.run(
            [*command, "--data.path=t.txt"], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("train:") == 1 and "corpora/t-" in done.stdout
        assert "'<|endoftext|>' 'T' 'h' 'e' ' ' 'q'" in done.stdout and "every byte" not in done.stdout
    (corpus,) = (tmp_path / "corpora").glob("t-*")
    corpus.rename(tmp_path / corpus.name)
    says = {"--shard=0/2": "job 0 of 2 is done", "--shard 1/2": "job 1 of 2 is done", "--merge": "train:"}
    for flags, expected in says.items():
        words = [*command, "--data.path=t.txt", *flags.split()]
        done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
        assert corpus.exists() == (flags == "--merge")
    assert same_files(corpus, tmp_path / corpus.name)
    for wrong in (["--shard", "2/2"], ["--shard=1"], ["--shard"], ["--shard=0/2", "--merge"]):
        with pytest.raises(BadInput, match="such as 0/3"):
            prepare_data.main(wrong)
    for edited in (False, True):
        done = subprocess.run(
            [*command, "--data.path=t.txt", "--verify"], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert (done.returncode, "every byte is as the manifest says" in done.stdout) == (2 * edited, not edited)
        (test,) = tmp_path.glob("corpora/*/test-00000.safetensors")
        assert (f"{test.name} is damaged" in done.stderr) == edited
        test.write_bytes(test.read_bytes()[:-1] + b"x")
    done = subprocess.run([*command, "--data.path=no.txt"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: there is no file 'no.txt'")
    assert len(done.stderr.splitlines()) == 1


def test_tokens_are_those_of_the_documents(tmp_path: Path) -> None:
    rows = many_documents(tmp_path / "rows.jsonl")
    corpus = Corpus.open(prepare(text_config(rows, tokenizer="bpe", vocab_size=400), tmp_path / "c", quiet=True))
    val = corpus.split("val")
    expected = []
    for ids in encode_documents(corpus.tokenizer(), documents_of(corpus, "val")):
        expected += [corpus.end_of_text, *ids.tolist()]
    assert val.read(0, val.n_tokens).tolist() == expected
    assert val.n_bytes == sum(len(text.encode()) for text in documents_of(corpus, "val"))
