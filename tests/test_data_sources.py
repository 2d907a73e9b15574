"""Reading text: what is a document, what is mended and counted, what is refused and how."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import tracemalloc
from pathlib import Path

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from config import BadInput, Data
from data import readers
from data.readers import CRLF, EMPTY, INVALID, MARKS, Mended, read_text, split_at
from data.sources import FEW_FILES, Source, kind_of, open_source, short_name


def text_source(path: object, **knobs: object) -> Source:
    return open_source(Data(**{"corpus": "text", "path": str(path), **knobs}))  # type: ignore[arg-type]


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(path: object, **knobs: object) -> str:
    with pytest.raises(BadInput) as caught:
        list(text_source(path, **knobs).documents())
    return str(caught.value)


def test_the_standard_library_has_no_tests_in_it() -> None:
    source = open_source(Data())
    documents = list(source.documents())
    assert len(documents) > 300 and sum(map(len, documents)) > 5_000_000
    assert any("class JSONDecodeError" in text for text in documents)  # json/decoder.py
    assert not any(text.startswith('"""Unittests for the various HTTPServer modules') for text in documents)
    assert list(source.documents()) == documents
    assert source.split == "documents"


@pytest.mark.fault(27)
def test_files_come_sorted_whatever_the_listing_says(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c/d.txt", "a-.txt", "B.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = text_source(tmp_path / "**" / "*.txt")
    assert list(source.documents()) == ["B.txt", "a-.txt", "a.txt", "b.txt", "c/d.txt"]
    (tmp_path / "a.txt").rename(tmp_path / "x")  # another order of creation, another place on the disk
    (tmp_path / "a.txt").write_text("a.txt")
    (tmp_path / "x").unlink()
    assert text_source(tmp_path / "**" / "*.txt").identity == source.identity


def test_identity_follows_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    first = text_source(tmp_path / "*.txt").identity
    (tmp_path / "a.txt").write_text("two")
    second = text_source(tmp_path / "*.txt").identity
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    third = text_source(tmp_path / "*.txt").identity
    assert first != second != third
    (tmp_path / "moved").mkdir()
    (tmp_path / "b.txt").rename(tmp_path / "moved" / "b.txt")
    assert text_source(tmp_path / "moved" / "b.txt").identity == third  # the same text elsewhere is the same text


def test_what_a_document_is(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one\n\n  \ntwo\x0c\u2028more\n")
    assert list(text_source(tmp_path / "t.txt").documents()) == ["one\n\n  \ntwo\x0c\u2028more\n"]
    lines = text_source(tmp_path / "t.txt", document="line")
    assert list(lines.documents()) == ["one", "two\x0c\u2028more"]
    assert lines.mended[EMPTY] == 2
    rows = write_lines(tmp_path / "t.jsonl", {"text": "a\nb", "n": 1}, {"text": None}, {"text": "c"})
    assert list(text_source(rows).documents()) == ["a\nb", "c"]
    assert list(text_source(rows, max_documents=1).documents()) == ["a\nb"]
    table = pyarrow.table({"body": ["x", None, "yé"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    assert list(text_source(tmp_path / "t.parquet", text_field="body").documents()) == ["x", "yé"]
    column = pyarrow.array([b"a\xff\r\n", b"b"] * 100).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t.parquet")
    source = text_source(tmp_path / "t.parquet")
    assert list(source.documents()) == ["a\ufffd\n", "b"] * 100 and source.mended[INVALID] == 100


def test_auto_split(tmp_path: Path) -> None:
    for number in range(FEW_FILES):
        (tmp_path / f"{number}.txt").write_text("x")
    assert text_source(tmp_path / "*.txt").split == "documents"
    (tmp_path / "0.txt").unlink()
    assert text_source(tmp_path / "*.txt").split == "tail"
    assert text_source(tmp_path / "*.txt", split="documents").split == "documents"
    assert text_source(tmp_path / "*.txt", document="line").split == "documents"


@pytest.mark.fault(31)
def test_invalid_bytes_crlf_and_marks_are_mended_and_counted(tmp_path: Path) -> None:
    # A lone continuation byte, a cut-off euro sign (two bytes), a surrogate in CESU-8 (three): six invalid bytes.
    raw = (
        b"\xef\xbb\xbfgood text, long enough\r\n" * 1 + b"a\x80b" + b"\xe2\x82" + b"\xed\xa0\x80" + b"z\r\n" + b"." * 99
    )
    (tmp_path / "t.txt").write_bytes(raw)
    source = text_source(tmp_path / "t.txt")
    for _ in range(2):  # counts are of the last reading, not of all
        (text,) = source.documents()
        assert text == "good text, long enough\na\ufffdb" + "\ufffd" * 5 + "z\n" + "." * 99
        assert (source.mended[INVALID], source.mended[CRLF], source.mended[MARKS]) == (6, 2, 1)
    assert "6 invalid bytes" in source.mended.summary() and "2 CRLF" in source.mended.summary()
    lonely = tmp_path / "t.jsonl"
    lonely.write_bytes(b'\xef\xbb\xbf{"text": "a\\ud800b\\r\\n"}\n')
    source = text_source(lonely)
    assert list(source.documents()) == ["a\ufffdb\n"]
    assert (source.mended[INVALID], source.mended[CRLF], source.mended[MARKS]) == (1, 1, 1)


def test_a_file_reads_the_same_in_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks, CRLF, characters of four bytes and invalid bytes lie across chunks, wherever those end."""
    raw = (
        b"\xef\xbb\xbfa\r\nb\r\r\n\r"
        + "é日🙂\ufeff".encode()
        + b"\xe2\x82 \xed\xa0\x80\xf0\x9f\x99z"
        + b"." * 99
        + b"\r"
    )
    (tmp_path / "t.txt").write_bytes(raw)
    expected = raw[3:].decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    expected = "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in expected)
    for size in (*range(3, 20), len(raw), 1000):
        monkeypatch.setattr(readers, "CHUNK", size)
        mended = Mended()
        texts = list(read_text(tmp_path / "t.txt", mended))
        assert "".join(texts) == expected and all(len(text) <= size + 4 for text in texts)
        assert (mended[MARKS], mended[CRLF], mended[INVALID]) == (1, 2, 8)


@pytest.mark.parametrize("separator", ["\n", "<|endoftext|>", "abab"])
def test_documents_between_separators(separator: str) -> None:
    """As str.split has them, however the text comes, but for an empty one behind the last separator."""
    for text in ("", "x", separator, f"x{separator}", f"{separator}x", f"one{separator}two{separator}{separator}x<|ab"):
        documents = text.split(separator)
        if documents[-1] == "":
            documents.pop()
        for size in range(1, len(text) + 2):
            found, unfinished = [], ""
            for part, ends in split_at(separator, [text[at : at + size] for at in range(0, len(text), size)]):
                unfinished += part
                if ends:
                    found.append(unfinished)
                    unfinished = ""
            assert (found, unfinished) == (documents, "")


def test_a_document_longer_than_memory_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight megabytes as one file, as one line and as lines: reading holds a few of them."""
    monkeypatch.setattr(readers, "CHUNK", 2**16)
    (tmp_path / "t.txt").write_text("some words of text " * 420_000)
    (tmp_path / "lines.txt").write_text("some words of text\n" * 420_000)
    for path, document in (("t.txt", "file"), ("t.txt", "line"), ("lines.txt", "file"), ("lines.txt", "line")):
        source = text_source(tmp_path / path, document=document)
        tracemalloc.start()
        assert sum(len(piece.text) for piece in source.pieces()) >= 420_000 * 18
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_500_000


@pytest.mark.fault(31)
def test_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "nul.txt").write_bytes(b"text\0text")
    (tmp_path / "noise.txt").write_bytes(b"abcdefgh\xff\xfe")
    (tmp_path / "wide.txt").write_bytes("some text".encode("utf-16"))
    for name, says in (("nul.txt", "byte 4 is NUL"), ("noise.txt", "2 of 10 bytes"), ("wide.txt", "NUL")):
        message = refusal(tmp_path / name)
        assert name in message and says in message and "data.path" in message
    (tmp_path / "noise.txt").write_bytes(b"abcdefghi\xff")  # a tenth is still text
    assert list(text_source(tmp_path / "noise.txt").documents()) == ["abcdefghi\ufffd"]


@pytest.mark.fault(31)
def test_paths_that_hold_nothing_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("x")
    assert "directory" in refusal(tmp_path) and "*.txt" in refusal(tmp_path)
    assert "did you mean" in refusal(tmp_path / "bok.txt") and "book.txt" in refusal(tmp_path / "bok.txt")
    assert "there is no file" in refusal(tmp_path / "*.md")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
def test_a_file_that_cannot_be_read_is_refused() -> None:
    assert "cannot read /proc/self/mem" in refusal("/proc/self/mem")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x")
    (tmp_path / "t.txt").chmod(0)
    assert "t.txt" in refusal(tmp_path / "t.txt") and "permission" in refusal(tmp_path / "t.txt")


def test_rows_that_hold_no_text_are_refused_with_file_and_line(tmp_path: Path) -> None:
    rows = tmp_path / "t.jsonl"
    rows.write_text('{"text": "fine"}\n\n{"text": "torn\n')
    assert "t.jsonl, line 3 is not JSON" in refusal(rows)
    write_lines(rows, {"body": "x", "title": "y"})
    assert "line 1 has no field 'text'" in refusal(rows) and "'body', 'title'" in refusal(rows)
    write_lines(rows, {"text": 3})
    assert "line 1 is not text but int" in refusal(rows)
    write_lines(rows, ["text"])
    assert "not a JSON object" in refusal(rows)
    assert "data.document=line" in refusal(rows, document="line")
    (tmp_path / "t.txt").write_text("x")
    assert "data.document=field" in refusal(tmp_path / "t.txt", document="field")
    (tmp_path / "t.parquet").write_text("not parquet")
    assert "parquet" in refusal(tmp_path / "t.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1]}), tmp_path / "t.parquet")
    assert "its fields are 'n'" in refusal(tmp_path / "t.parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "rows"
    directory.mkdir()
    write_lines(directory / "a.jsonl", {"text": "one\r\n", "n": 1}, {"text": "", "n": 2}, {"text": "two", "n": 3})
    (directory / "evil.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    knobs = {"corpus": "huggingface", "path": str(directory), "streaming": streaming}
    source = open_source(Data(**knobs))
    assert list(source.documents()) == ["one\n", "two"] == list(source.documents())
    assert (source.split, source.mended[CRLF], source.mended[EMPTY]) == ("documents", 1, 1)
    assert list(open_source(Data(**knobs, max_documents=1)).documents()) == ["one\n"]
    with pytest.raises(BadInput, match=r"no field 'body'; its fields are 'text', 'n'"):
        list(open_source(Data(**knobs, text_field="body")).documents())
    with pytest.raises(BadInput, match="source_split"):
        list(open_source(Data(**knobs, source_split="nowhere")).documents())
    write_lines(directory / "a.jsonl", {"text": "three", "n": 1})
    assert open_source(Data(**knobs)).identity != source.identity


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress, "": bytes}


@pytest.mark.parametrize("ending", list(PACKERS))
def test_files_of_all_kinds_compressed_or_not(ending: str, tmp_path: Path) -> None:
    """The same three documents, with what a table and an array must quote."""
    texts = ['one,\t"1"\nmore', "zwei ü", "three " * 30_000]
    limit = csv.field_size_limit()
    table = io.StringIO()
    csv.writer(table).writerows([["id", "text"], *enumerate(texts)])
    tabbed = io.StringIO()
    csv.writer(tabbed, delimiter="\t").writerows([["text", "id"], *([text, 1] for text in texts)])
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    contents = {
        "t.csv": table.getvalue(),
        "t.TSV": "\ufeff" + tabbed.getvalue(),
        "t.jsonl": "\n".join(map(json.dumps, rows)),
        "lines.json": "\n".join(map(json.dumps, rows)),
        "array.json": json.dumps(rows, indent=1),
    }
    for name, content in contents.items():
        (tmp_path / (name + ending)).write_bytes(PACKERS[ending](content.encode()))
        assert list(text_source(tmp_path / (name + ending)).documents()) == texts, name
    parts = (texts[0][:4].encode(), texts[0][4:].encode())  # as when one packed file is appended to another
    (tmp_path / f"t.txt{ending}").write_bytes(b"".join(map(PACKERS[ending], parts)))
    source = text_source(tmp_path / f"t.txt{ending}")
    assert list(source.documents()) == texts[:1]
    assert (source.n_bytes is None) is bool(ending), "what it unpacks to is not known beforehand"
    assert csv.field_size_limit() == limit, "long fields are read, and the process is as it was"


@pytest.mark.parametrize("ending", list(PACKERS)[:4])
def test_a_file_that_is_not_all_there_is_refused(ending: str, tmp_path: Path) -> None:
    packed = PACKERS[ending](random.Random(0).randbytes(5000).hex().encode())
    (tmp_path / f"t.txt{ending}").write_bytes(packed[: len(packed) // 2])
    assert "cannot be unpacked" in refusal(tmp_path / f"t.txt{ending}")
    (tmp_path / f"t.txt{ending}").write_bytes(b"not packed at all")
    assert f"t.txt{ending}" in refusal(tmp_path / f"t.txt{ending}")


def test_tables_that_hold_no_text_are_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n")
    assert "t.csv, line 2 has no field 'text'; its fields are 'a', 'b'" in refusal(tmp_path / "t.csv")
    (tmp_path / "t.json").write_text('[{"text": "a"}, 3]')
    assert "t.json, item 2 is not a JSON object" in refusal(tmp_path / "t.json")
    (tmp_path / "t.json").write_text('[{"text": "a"},')
    assert "t.json is not JSON" in refusal(tmp_path / "t.json")
    assert "is a file and no dataset" in refusal(tmp_path / "t.csv", corpus="huggingface")


def test_a_separator_makes_documents_of_a_file(tmp_path: Path) -> None:
    end = "<|endoftext|>"
    (tmp_path / "t.txt").write_text(f"one\n{end}two{end}{end} three")
    source = text_source(tmp_path / "t.txt", separator=end)
    assert list(source.documents()) == ["one\n", "two", " three"] and source.split == "documents"
    other = text_source(tmp_path / "t.txt", separator="t")
    assert other.identity != source.identity
    whole = text_source(tmp_path / "t.txt")
    assert len(list(whole.documents())) == 1
    assert f"3 {end} in the text, which separates nothing (--data.separator='{end}' would)" in whole.mended.summary()
    with pytest.raises(ValueError, match=r"leave data\.document at auto"):
        Data(path="t.txt", separator=end, document="line")


def test_files_of_a_store_are_read_by_address(tmp_path: Path) -> None:
    """fsspec's own store in memory stands for S3 and the like: known by what the store says of its files."""
    store = fsspec.filesystem("memory")
    for name, text in (("b.jsonl.gz", "two"), ("a.jsonl.gz", "one"), ("c.txt", "three")):
        store.pipe(f"/bucket/{name}", gzip.compress(json.dumps({"text": text}).encode()))
    source = text_source("memory://bucket/*.jsonl.gz")
    assert list(source.documents()) == ["one", "two"] and source.describe == "memory://bucket/*.jsonl.gz (2 files)"
    assert text_source("memory://bucket/*.jsonl.gz").identity == source.identity
    assert list(text_source("memory://bucket/a.jsonl.gz").documents()) == ["one"]
    store.pipe("/bucket/a.jsonl.gz", gzip.compress(b'{"text": "new"}'))
    assert text_source("memory://bucket/*.jsonl.gz").identity != source.identity
    for address, says in (("memory://bucket/*.csv", "no file"), ("s3://bucket/a", "s3fs"), ("odd://a", "odd")):
        with pytest.raises(BadInput, match=says):
            text_source(address)


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path) -> None:
    """What save_to_disk of datasets wrote: one split, or several, of which one is named."""
    rows = {name: datasets.Dataset.from_dict({"text": [name, "more"]}) for name in ("train", "validation")}
    rows["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "several")
    for name, knobs in (("one", {}), ("several", {}), ("several", {"source_split": "validation"})):
        expected = knobs.get("source_split", "train")
        assert list(open_source(Data(path=str(tmp_path / name), **knobs)).documents()) == [expected, "more"]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (None, "stdlib"),
        ("play.txt", "text"),
        ("books/play.txt", "text"),
        ("books/ply.txt", "text"),  # which is not there; an owner of datasets is no directory
        ("books/*.txt", "text"),
        ("/absent/play", "text"),
        ("roneneldan/TinyStories", "huggingface"),
        ("saved", "huggingface"),
    ],
)
def test_a_path_implies_its_corpus(
    path: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("books/play.txt", "play.txt", "saved/state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert kind_of(Data(path=path)) == kind
    if path == "play.txt":
        assert list(open_source(Data(path=path)).documents()) == ["text"]
        assert open_source(Data(path=path)).identity == open_source(Data(path=path, corpus="text")).identity


def test_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "shouting.py"
    module.write_text(
        "def loud(text): return text.upper()\n"
        "def halves(text): return [text[:2], '', text[2:]]\n"
        "def wrong(text): return 3\n"
        "def broken(text): return 1 / 0\n"
    )
    (tmp_path / "faulty.py").write_text("'a' + 1\n")
    (tmp_path / "t.txt").write_text("abcd")
    before = list(sys.path)

    def texts(name: str) -> list[str]:
        source = text_source(tmp_path / "t.txt", transform=name)
        return [text for document in source.documents() for text in source.transformed(document)]

    assert texts("shouting:loud") == ["ABCD"]
    assert texts("shouting:halves") == ["ab", "cd"]
    assert sys.path == before
    for name, says in (
        ("shouting:wrong", "not int"),
        ("shouting:broken", "ZeroDivisionError.*shouting.py:4"),
        ("shouting:missing", "no function 'missing'"),
        ("no_such_module:f", "cannot import no_such_module"),
        ("faulty:f", "cannot import faulty .TypeError"),
        ("math:sqrt", "no Python source"),
    ):
        with pytest.raises(BadInput, match=says):
            texts(name)
    identity = text_source(tmp_path / "t.txt", transform="shouting:loud").identity
    module.write_text(module.read_text() + "# changed\n")
    import linecache

    linecache.checkcache()
    assert text_source(tmp_path / "t.txt", transform="shouting:loud").identity != identity


def test_short_names() -> None:
    assert short_name("a/books/*.txt") == "books"
    assert short_name("roneneldan/TinyStories") == "TinyStories"
    assert short_name("/x/my book (1).txt") == "my-book-1"
    assert short_name("../**") == ""
