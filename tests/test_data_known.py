"""A start reads no text that it knows, notices all that changed, and needs none for a corpus that is named itself."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config import BadInput, Data
from data import known
from data.prepare import prepare
from data.shards import Corpus

OPENED: list[str] = []
sys.addaudithook(lambda event, arguments: OPENED.append(str(arguments[0])) if event == "open" else None)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of three texts, which count as settled at once."""
    monkeypatch.setattr(known, "SETTLED", 0)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / f"texts/{number}.txt").write_text(f"{number} some words of text\n" * 20)
    return tmp_path / "texts"


def config_of(texts: Path, **knobs: Any) -> Data:
    return Data(corpus="text", path=f"{texts}/*.txt", **{"tokenizer": "byte", **knobs})


def prepare_and_watch(texts: Path, **knobs: Any) -> tuple[Path, set[str]]:
    """The corpus, and which texts were opened for it."""
    OPENED.clear()
    directory = prepare(config_of(texts, **knobs), texts.parent / "corpora", quiet=True)
    return directory, {Path(name).name for name in OPENED if name.endswith(".txt")}


def test_texts_are_read_again_only_when_one_of_them_changed(texts: Path) -> None:
    everything = {"0.txt", "1.txt", "2.txt"}
    first, opened = prepare_and_watch(texts)
    assert opened == everything
    assert prepare_and_watch(texts) == (first, set())

    # An edit of the same size whose time was set back is still one.
    file = texts / "1.txt"
    before, content = file.stat(), file.read_text()
    file.write_text(content.replace("some", "SOME"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    edited, opened = prepare_and_watch(texts)
    assert edited != first and opened == everything
    assert prepare_and_watch(texts) == (edited, set())

    # What was there before is found by its contents, and remembered by its new times.
    file.write_text(content)
    assert prepare_and_watch(texts) == (first, everything)
    assert prepare_and_watch(texts) == (first, set())

    # Another name, a file more, a file less.
    file.rename(texts / "1b.txt")
    renamed, opened = prepare_and_watch(texts)
    assert renamed not in (first, edited) and opened == {"0.txt", "1b.txt", "2.txt"}
    (texts / "3.txt").write_text("more words\n" * 20)
    assert len(prepare_and_watch(texts)[1]) == 4
    (texts / "3.txt").unlink()
    assert prepare_and_watch(texts) == (renamed, set())


def test_knobs_count_though_the_text_is_known(texts: Path) -> None:
    first, _ = prepare_and_watch(texts)
    other, opened = prepare_and_watch(texts, val_fraction=0.2)
    assert other != first and opened == {"0.txt", "1.txt", "2.txt"}  # of which the second corpus is made
    assert prepare_and_watch(texts, val_fraction=0.2) == (other, set())


def test_a_text_that_changed_just_now_is_not_remembered(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change within the same tick of the clock would not show in its times."""
    monkeypatch.setattr(known, "SETTLED", 3600 * 10**9)
    first, _ = prepare_and_watch(texts)
    assert not (texts.parent / "corpora" / known.CACHE).exists()
    assert prepare_and_watch(texts) == (first, {"0.txt", "1.txt", "2.txt"})


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"x": 3}', '{"x": {"files": 1}}', "null", b"\xff"])
def test_a_damaged_memory_is_none(texts: Path, content: str | bytes) -> None:
    first, _ = prepare_and_watch(texts)
    file = texts.parent / "corpora" / known.CACHE
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert prepare_and_watch(texts) == (first, {"0.txt", "1.txt", "2.txt"})
    assert prepare_and_watch(texts) == (first, set())


def test_the_memory_holds_the_sources_that_were_read_last(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "ENTRIES", 2)
    root, files = texts.parent / "corpora", sorted(texts.iterdir())
    for number in (0, 1, 2, 1):
        known.identity_of(texts, files[number : number + 1], root)
    found = json.loads((root / known.CACHE).read_text())
    assert list(found) == [known.stamp_of(texts, files[1:2]), known.stamp_of(texts, files[2:])]


def test_a_prepared_corpus_trains_without_its_text(
    texts: Path, train: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = tiny(data__path=f"{texts}/*.txt", run__name="text")
    assert train(flags).returncode == 0
    (directory,) = tmp_path.glob("corpora/[!.]*")
    shutil.rmtree(texts)
    for corpus in ("text", "auto"):
        ended = train(tiny(data__path=directory, data__corpus=corpus, run__name=corpus + "less"))
        assert ended.returncode == 0, ended.stderr
        lines = (tmp_path / f"runs/{corpus}less/metrics.jsonl").read_text().splitlines()
        for line, other in zip((tmp_path / "runs/text/metrics.jsonl").read_text().splitlines(), lines, strict=True):
            one, same = json.loads(line), json.loads(other)
            assert all(one[name] == same[name] for name in one if "second" not in name)
    assert len(list(tmp_path.glob("corpora/[!.]*"))) == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, None),
        ({"val_fraction": 0.2, "test_fraction": 0, "split": "tail", "tokenizer": "byte"}, None),
        ({"val_fraction": 0.1}, "data.val_fraction is 0.1, and it was made with 0.2"),
        ({"tokenizer": "mine.json"}, "data.tokenizer is mine.json, and it was made with byte"),
        ({"vocab_size": 300}, "data.vocab_size is 300, and it was made with None"),
        ({"document": "line"}, "data.document is line, and it was made with file"),
        ({"transform": "swap:both"}, "data.transform is swap:both, and it was made with None"),
        ({"max_documents": 5, "split": "documents"}, "max_documents is 5, .*data.split is documents, .*with tail"),
        ({"train_tokens": 50, "shuffle": "documents", "isolate_documents": True}, None),
    ],
)
def test_knobs_that_a_prepared_corpus_was_not_made_with_are_refused(
    texts: Path, knobs: dict[str, Any], message: str | None
) -> None:
    directory, _ = prepare_and_watch(texts, val_fraction=0.2, test_fraction=0)
    config = Data(corpus="text", path=str(directory), **knobs)
    if message is None:
        assert prepare(config, texts.parent / "elsewhere", quiet=True) == directory
        assert not (texts.parent / "elsewhere").exists()
        return
    with pytest.raises(BadInput, match=f"is a prepared corpus: .*{message}"):
        prepare(config, texts.parent / "elsewhere", quiet=True)


def test_a_prepared_corpus_that_is_damaged_is_told_as_one(texts: Path) -> None:
    directory, _ = prepare_and_watch(texts)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match=r"manifest\.json is damaged"):
        Corpus.open(prepare(Data(corpus="text", path=str(directory)), quiet=True))
    with pytest.raises(BadInput, match="is a directory; name the files in it"):
        prepare(Data(corpus="text", path=str(texts)), quiet=True)
