"""How text is read: files of text, JSON, CSV or Parquet, and Hugging Face datasets, mended and counted on the way.

Files may be compressed, and may be an object store's: anything that fsspec opens by its address.

Readers yield fragments of documents: pairs of a text of any length, and whether its document ends with it. So a file
is read a megabyte at a time, however long its documents are; a row of JSON or Parquet is one fragment.

Code that comes with a dataset is never run; the datasets library (>= 4) has no way to do so any more.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sys
import sysconfig
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from backports import zstd

from config import BadInput, Data
from data.tokenizers import END_OF_TEXT
from files import sha256

JSON, TABLES, PARQUET = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}, ".parquet"
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what tells a saved dataset, or several by name
COMPRESSIONS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}
NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
LARGEST_SHARE_REPLACED = 0.1  # a file with more invalid bytes than this is no text
CHUNK = 2**20  # bytes of a file that are read at once
ROWS = 64  # rows of a Parquet file in memory at once

Fragment = tuple[str, bool]  # a text, and whether its document ends with it

# What is done to the text on the way, in the words that tell of it.
INVALID = "invalid bytes became U+FFFD"
CRLF = "CRLF became LF"
MARKS = "byte-order marks dropped"
EMPTY = "empty documents left out"
SHORT = "documents left out that are too short"
SEPARATORS = f"{END_OF_TEXT} in the text, which separates nothing (--data.separator='{END_OF_TEXT}' would)"
COPIES = "documents of train left out that a held-out split has"
HELD_OUT = "transformed texts left out that a held-out split has"


class Mended(Counter[str]):
    """How often each of these was done while the text was read the last time."""

    def summary(self) -> str:
        """One line, or "nothing"."""
        kinds = (INVALID, CRLF, MARKS, EMPTY, SHORT, SEPARATORS, HELD_OUT, COPIES)
        return "; ".join(f"{self[what]:,} {what}" for what in kinds if self[what]) or "nothing"

    def decode(self, raw: bytes) -> str:
        """UTF-8 without a byte-order mark before it; invalid bytes become lone surrogates, to be mended."""
        text = raw.decode("utf-8", "surrogateescape")
        self[MARKS] += text.startswith("\ufeff")
        return text.removeprefix("\ufeff")

    def mend(self, text: str) -> str:
        """``text`` with lone surrogates (which is how invalid bytes come here) and CRLF replaced, and counted."""
        try:
            text.encode()  # ten times as fast as a search
        except UnicodeEncodeError:
            text, invalid = re.subn("[\ud800-\udfff]", "\ufffd", text)
            self[INVALID] += invalid
        if "\r" in text:
            self[CRLF] += text.count("\r\n")
            text = text.replace("\r\n", "\n")
        return text


# ---------------------------------------------------------------------------------------------- files


def stdlib_files() -> tuple[Path, list[Path]]:
    """The standard library's directory and its .py files in sorted order, tests and site-packages left out."""
    base = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for directory, below, names in os.walk(base):
        below[:] = [name for name in below if name not in NOT_STDLIB_TEXT]
        files += [Path(directory, name) for name in names if name.endswith(".py")]
    if not files:
        raise BadInput(f"this Python has no standard library as text in {base}; use --data.corpus=text")
    return base, sorted(files)


def text_files(path: str) -> tuple[Path, list[Path]]:
    """The common directory and the sorted files of a path, a glob or an address; raises BadInput if there is none."""
    if "://" in path:
        return Path(), remote_files(path)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        example = os.path.join(path, "**", "*.txt")
        raise BadInput(f"data.path={path!r} is a directory; name the files in it, as in --data.path='{example}'")
    found = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    files = sorted({Path(os.path.abspath(name)) for name in found if not os.path.isdir(name)})
    if not files:
        here = os.path.dirname(path) or "."
        names = os.listdir(here) if os.path.isdir(here) else []
        near = difflib.get_close_matches(os.path.basename(path), names, 1, 0.6)
        hint = f"did you mean {os.path.join(os.path.dirname(path), near[0])!r}?" if near else "check data.path"
        raise BadInput(f"there is no file {path!r} (from {os.getcwd()}); {hint}")
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file} is not a regular file; leave it out of data.path")
    return Path(os.path.commonpath([file.parent for file in files])), files


def remote_files(address: str) -> list[Path]:
    """The sorted files of an address or a glob of addresses, such as s3://bucket/*.jsonl.gz, as paths."""
    import fsspec
    from upath import UPath

    try:
        store, path = fsspec.core.url_to_fs(address)
        found = sorted(store.glob(path)) if glob.has_magic(path) else [path]
        files: list[Any] = [UPath(store.unstrip_protocol(name)) for name in found if store.isfile(name)]
    except Exception as problem:  # the stores raise what they like; of a missing package fsspec says which
        raise BadInput(f"data.path={address} cannot be read ({type(problem).__name__}: {problem})") from problem
    if not files:
        raise BadInput(f"there is no file {address}; check data.path")
    return files


def files_identity(base: Path, files: list[Path]) -> dict[str, Any]:
    """Number, size and one hash of names (relative to ``base``), sizes and contents of ``files``.

    A remote file's contents are what its store says of them without sending them: a checksum, a time.
    """
    total, listing = 0, hashlib.sha256()
    for file in files:
        try:
            if isinstance(file, Path):
                name, digest = file.relative_to(base).as_posix(), sha256(file)
            else:
                name, digest = str(file), file.fs.ukey(file.path)
            size = file.stat().st_size
        except OSError as problem:
            raise cannot_read(file, problem) from problem
        total += size
        listing.update(json.dumps([name, size, digest]).encode())
    return {"files": len(files), "bytes": total, "sha256": listing.hexdigest()}


def opened(file: Path) -> io.BufferedReader:
    """A file to be read, unpacked on the way if its name ends with .gz, .bz2, .xz or .zst."""
    packed: Any = file.open("rb")
    unpack = COMPRESSIONS.get(file.suffix.lower(), io.BufferedReader)
    return unpack(packed)  # type: ignore[no-any-return]


def is_compressed(file: Path) -> bool:
    """Whether the name of a file says so."""
    return file.suffix.lower() in COMPRESSIONS


def suffix_of(file: Path) -> str:
    """What the name of a file ends with before the ending of its compression: .jsonl of rows.JSONL.gz."""
    return Path(file.stem if is_compressed(file) else file.name).suffix.lower()


def cannot_read(file: Path, problem: OSError) -> BadInput:
    """The error for a file that the system does not let us read."""
    return BadInput(f"cannot read {file}: {problem.strerror or problem}; check its permissions, or leave it out")


def document_kind(config: Data, file: Path) -> str:
    """What a document is in ``file``: "file", "line", "field" or "separated"."""
    has_fields = suffix_of(file) in (*JSON, *TABLES, PARQUET)
    if config.document == "auto":
        return "field" if has_fields else "separated" if config.separator else "file"
    if has_fields != (config.document == "field"):
        holds = "one document per row" if has_fields else "plain text, without fields"
        raise BadInput(f"data.document={config.document} does not fit {file}, which holds {holds}; set it to auto")
    return config.document


def read_files(config: Data, files: list[Path], mended: Mended) -> Iterator[Fragment]:
    """The documents of local files in fragments, in order, mended."""
    for file in files:
        try:
            kind = document_kind(config, file)
            if kind == "field":
                for place, row in rows_of(file, config.text_field, mended):
                    yield text_of(row, config.text_field, place, mended), True
            elif kind == "file":
                for text in read_text(file, mended):
                    mended[SEPARATORS] += text.count(END_OF_TEXT)
                    yield text, False
                yield "", True
            else:
                yield from split_at(str(config.separator) if kind == "separated" else "\n", read_text(file, mended))
        except (EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError) as problem:
            raise BadInput(f"{file} cannot be unpacked ({problem}); is all of it there?") from problem
        except OSError as problem:
            raise cannot_read(file, problem) from problem


def read_text(file: Path, mended: Mended) -> Iterator[str]:
    """The mended text of a file, a megabyte at a time. Raises BadInput if it looks binary."""
    way_out = "leave it out of data.path, or convert it to UTF-8 text"
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    before, size, held = mended[INVALID], 0, ""
    with opened(file) as handle:
        for raw in chain(iter(partial(handle.read, CHUNK), b""), [b""]):
            if b"\0" in raw:
                raise BadInput(f"{file} looks binary (byte {size + raw.index(0):,} is NUL); {way_out}")
            text = held + decoder.decode(raw, final=not raw)
            if not size:
                mended[MARKS] += text.startswith("\ufeff")
                text = text.removeprefix("\ufeff")
            held = "\r" if raw and text.endswith("\r") else ""  # its "\n" may begin the next megabyte
            yield mended.mend(text[: len(text) - len(held)])
            size += len(raw)
    replaced = mended[INVALID] - before
    if replaced > LARGEST_SHARE_REPLACED * size:
        raise BadInput(f"{file} is not UTF-8 text ({replaced:,} of {size:,} bytes are invalid); {way_out}")


def split_at(separator: str, texts: Iterable[str]) -> Iterator[Fragment]:
    """The documents between separators, in fragments. The texts are one text; a separator may lie across two of them.

    Behind the last separator there is a document only if there is text. (For lines this is not str.splitlines(),
    which also breaks at form feeds and U+2028.)
    """
    rest, unfinished = "", False
    for text in texts:
        *documents, rest = (rest + text).split(separator)
        for document in documents:
            yield document, True
        unfinished = bool(rest) or (unfinished and not documents)
        sure = len(rest) - len(separator) + 1  # what stands behind it may be the beginning of a separator
        if sure > 0:
            yield rest[:sure], False
            rest = rest[sure:]
    if unfinished:
        yield rest, True


def rows_of(file: Path, field: str, mended: Mended) -> Iterator[tuple[str, Any]]:
    """Place and contents of the rows of a file of JSON, CSV or Parquet, of which the text is in ``field``."""
    if suffix_of(file) == PARQUET:
        yield from parquet_rows(file, field)
    elif suffix_of(file) in TABLES:
        yield from table_rows(file)
    else:
        yield from json_rows(file, mended)


def table_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Place and fields of the rows of a .csv or .tsv file, whose first line names them."""
    before = csv.field_size_limit(2**31 - 1)  # else 128 kB; of the whole process, so it is given back
    with io.TextIOWrapper(opened(file), encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.DictReader(text, delimiter=TABLES[suffix_of(file)])
        try:
            yield from ((f"{file}, line {rows.line_num}", row) for row in rows)
        except csv.Error as problem:
            raise BadInput(f"{file}, line {rows.line_num} is no row ({problem}); mend it or remove it") from problem
        finally:
            csv.field_size_limit(before)


def json_rows(file: Path, mended: Mended) -> Iterator[tuple[str, Any]]:
    """Place and contents of the lines of a file that are not blank; of the items, if it is one JSON array."""
    with opened(file) as handle:
        begins = handle.peek(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if suffix_of(file) == ".json" and begins == b"[":  # read whole: the format has no place to stop at
            try:
                items = json.loads(mended.decode(handle.read()))
            except ValueError as problem:
                raise BadInput(f"{file} is not JSON ({problem}); mend it or leave it out") from problem
            yield from ((f"{file}, item {number}", item) for number, item in enumerate(items, 1))
            return
        for number, raw in enumerate(handle, 1):
            place, line = f"{file}, line {number}", mended.decode(raw)
            if line.strip():
                try:
                    yield place, json.loads(line)
                except ValueError as problem:
                    raise BadInput(f"{place} is not JSON ({problem}); mend the line or remove it") from problem


def parquet_rows(file: Path, field: str) -> Iterator[tuple[str, Any]]:
    """Place and text field of the rows of a .parquet file, a few rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(opened(file), buffer_size=CHUNK)  # read by the buffer, not by the row group
        columns = [field] if field in table.schema_arrow.names else None  # all, for the message that it is not there
        number = 0
        for batch in table.iter_batches(ROWS, columns=columns):
            for row in batch.to_pylist() if columns is None else column_rows(batch, field):
                number += 1
                yield f"{file}, row {number}", row
    except pyarrow.ArrowException as problem:
        raise BadInput(f"{file} cannot be read as parquet ({problem}); make it anew or leave it out") from problem


def column_rows(batch: Any, field: str) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow batch of one column; invalid UTF-8, which it does not refuse, becomes lone surrogates."""
    import pyarrow

    column = batch.column(0)
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        raws = column.cast(pyarrow.large_binary()).to_pylist()
        yield from ({field: raw if raw is None else raw.decode("utf-8", "surrogateescape")} for raw in raws)
    else:
        yield from batch.to_pylist()


def text_of(row: Any, field: str, place: str, mended: Mended) -> str:
    """The mended text of one row; null counts as empty. Raises BadInput for a row without text in ``field``."""
    if not isinstance(row, dict):
        raise BadInput(f"{place} is not a JSON object but a {type(row).__name__}; mend the line or remove it")
    if field not in row:
        raise BadInput(
            f"{place} has no field {field!r}; its fields are {', '.join(map(repr, row)) or 'none'}: "
            "set data.text_field to one of them"
        )
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise BadInput(f"field {field!r} of {place} is not text but {type(text).__name__}; set data.text_field")
    return mended.mend(text or "")


# ---------------------------------------------------------------------------------------------- datasets


def dataset_identity(config: Data, identity_of: Callable[[Path, list[Path]], dict[str, Any]]) -> dict[str, Any]:
    """What tells one dataset from another: the knobs, and for a local directory ``identity_of`` its files."""
    identity = {"subset": config.subset, "source_split": config.source_split, "text_field": config.text_field}
    directory = Path(str(config.path)).expanduser()
    if not directory.is_dir():
        return {"path": config.path, **identity}
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {**identity, **identity_of(directory, files)}


def is_saved_dataset(path: str) -> bool:
    """Whether the directory was written by save_to_disk of the datasets library."""
    return any(os.path.isfile(os.path.join(os.path.expanduser(path), name)) for name in (SAVED, SAVED_SPLITS))


def read_dataset(config: Data, mended: Mended) -> Iterator[Fragment]:
    """The texts of the dataset's rows, mended. Raises BadInput if it cannot be found or read."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    what = f"dataset {config.path!r}"
    path = os.path.expanduser(str(config.path))
    try:
        if is_saved_dataset(path):
            saved = datasets.load_from_disk(path)
            rows = saved[config.source_split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(path, config.subset, split=config.source_split, streaming=config.streaming)
        if config.text_field in (rows.column_names or []):
            rows = rows.select_columns([config.text_field])
        for number, row in enumerate(rows):
            yield text_of(row, config.text_field, f"{what}, row {number}", mended), True
    except BadInput:
        raise
    except Exception as problem:  # the library and its file systems raise what they like
        reason = " ".join(str(problem).split())
        raise BadInput(
            f"cannot read {what} (subset {config.subset}, split {config.source_split}): {type(problem).__name__}: "
            f"{reason}; check data.path, data.subset, data.source_split and the network, "
            "or give a local directory of .jsonl or .parquet files"
        ) from problem
