"""Where the text comes from: Python's own standard library, your files, or a Hugging Face dataset.

A Source yields its documents as often as it is asked, always in the same order, as text that can be written
as UTF-8: invalid bytes have become U+FFFD, CRLF has become LF, a leading byte-order mark is gone, and each
of these has been counted. Nothing here knows of tokens or splits.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from config import BadInput, Data

JSON_LINES = (".jsonl", ".ndjson")
NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
LARGEST_SHARE_REPLACED = 0.1  # a file with more invalid bytes than this is no text
FEW_FILES = 100  # below this many files the hash of a document splits too coarsely, and the tail is held out


@dataclass
class Mended:
    """Counts of what was changed in the text while it was read the last time."""

    invalid: int = 0
    crlf: int = 0
    marks: int = 0
    empty: int = 0
    held_out: int = 0

    def reset(self) -> None:
        """Start counting anew."""
        for field in fields(self):
            setattr(self, field.name, 0)

    def summary(self) -> str:
        """One line, or "nothing"."""
        counts = [
            (self.invalid, "invalid bytes became U+FFFD"),
            (self.crlf, "CRLF became LF"),
            (self.marks, "byte-order marks dropped"),
            (self.empty, "empty documents left out"),
            (self.held_out, "transformed texts left out that a held-out split has"),
        ]
        return "; ".join(f"{count:,} {what}" for count, what in counts if count) or "nothing"

    def mend(self, text: str) -> str:
        """``text`` with lone surrogates (which is how invalid bytes come here) and CRLF replaced, and counted."""
        text, invalid = re.subn("[\ud800-\udfff]", "\ufffd", text)
        crlf = text.count("\r\n")
        self.invalid += invalid
        self.crlf += crlf
        return text.replace("\r\n", "\n") if crlf else text

    def mend_file(self, raw: bytes, path: Path) -> str:
        """The text of a whole file. Raises BadInput if it looks binary."""
        way_out = "leave it out of data.path, or convert it to UTF-8 text"
        if b"\0" in raw:
            raise BadInput(f"{path} looks binary (byte {raw.index(0):,} is NUL); {way_out}")
        text = raw.decode("utf-8", "surrogateescape")
        if text.startswith("\ufeff"):
            text = text[1:]
            self.marks += 1
        before = self.invalid
        text = self.mend(text)
        replaced = self.invalid - before
        if replaced > LARGEST_SHARE_REPLACED * len(raw):
            raise BadInput(f"{path} is not UTF-8 text ({replaced:,} of {len(raw):,} bytes are invalid); {way_out}")
        return text


@dataclass(frozen=True)
class Source:
    """Text that can be read again and again.

    ``name`` is short and fit for a directory's name; ``identity`` is JSON-able and changes whenever the documents
    do; ``split`` is "documents" or "tail"; ``n_bytes`` the size of what is read, where it is known beforehand.
    """

    name: str
    describe: str
    identity: dict[str, Any]
    split: str
    mended: Mended
    n_bytes: int | None
    read: Callable[[], Iterator[str]]
    transform: Callable[[str], Any] | None
    max_documents: int | None

    def documents(self) -> Iterator[str]:
        """Every document that is not empty, before the transform, at most ``max_documents`` of them."""
        self.mended.reset()
        given = 0
        for text in self.read():
            if not text.strip():
                self.mended.empty += 1
                continue
            yield text
            given += 1
            if given == self.max_documents:
                return

    def transformed(self, document: str) -> list[str]:
        """What data.transform makes of one document; empty texts are left out. Raises BadInput if it fails."""
        if self.transform is None:
            return [document]
        what = f"data.transform {self.identity['transform']['name']}"
        try:
            result = self.transform(document)
        except Exception as problem:
            frame = traceback.extract_tb(problem.__traceback__)[-1]
            place = f"{frame.filename}:{frame.lineno}"
            raise BadInput(
                f"{what} failed on the document that begins {document[:60]!r}: "
                f"{type(problem).__name__}: {problem} ({place}); mend the function"
            ) from problem
        texts = [result] if isinstance(result, str) else result
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"{what} must return a str or a list of str, not {type(result).__name__}; mend the function")
        return [self.mended.mend(text) for text in texts if text]


def open_source(config: Data) -> Source:
    """The source that the config describes; local files are hashed, but nothing is decoded yet.

    Raises BadInput for a path that holds nothing readable, or a transform that cannot be imported.
    """
    mended = Mended()
    identity: dict[str, Any] = {"corpus": config.corpus, "max_documents": config.max_documents}
    split, n_bytes = "documents", None
    if config.corpus == "huggingface":
        from data.huggingface import dataset_identity, read_dataset

        if config.document not in ("auto", "field"):
            raise BadInput(f"data.document={config.document} does not fit a dataset, made of rows; use auto")
        path = str(config.path)
        name = path
        describe = f"dataset {path}, {config.subset + ', ' if config.subset else ''}split {config.source_split}"
        identity |= dataset_identity(config)

        def read() -> Iterator[str]:
            return read_dataset(config, mended)
    else:
        if config.corpus == "stdlib":
            base, files = stdlib_files()
            name, describe = "stdlib", f"the standard library of Python {platform.python_version()}"
        else:
            base, files = text_files(str(config.path))
            name = str(config.path)
            describe = f"{config.path} ({len(files)} file{'s' if len(files) > 1 else ''})"
        kinds = {document_kind(config, file) for file in files}
        identity |= {"document": sorted(kinds), **files_identity(base, files)}
        if "field" in kinds:
            identity["text_field"] = config.text_field
        else:
            n_bytes = identity["bytes"]
        if config.corpus == "text" and kinds == {"file"} and len(files) < FEW_FILES:
            split = "tail"

        def read() -> Iterator[str]:
            return read_files(files, config, mended)

    transform = None
    if config.transform:
        transform, digest = import_transform(config.transform)
        identity["transform"] = {"name": config.transform, "sha256": digest}
    split = split if config.split == "auto" else config.split
    name = short_name(name) or config.corpus
    return Source(name, describe, identity, split, mended, n_bytes, read, transform, config.max_documents)


def short_name(path: str) -> str:
    """The last part of a path that says something, fit for a directory's name: 'a/books/*.txt' is 'books'."""
    for part in reversed(path.replace("\\", "/").split("/")):
        word = re.sub(r"[^A-Za-z0-9]+", "-", part.split(".")[0]).strip("-")[:40].strip("-")
        if word:
            return word
    return ""


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
    return base, sorted(files, key=lambda file: file.relative_to(base).parts)


def text_files(path: str) -> tuple[Path, list[Path]]:
    """The common directory and the sorted files of a path or glob; raises BadInput if there is none."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        example = os.path.join(path, "**", "*.txt")
        raise BadInput(f"data.path={path!r} is a directory; name the files in it, as in --data.path='{example}'")
    if os.path.exists(path):
        found = [path]
    elif glob.has_magic(path):
        found = [name for name in glob.glob(path, recursive=True) if not os.path.isdir(name)]
        if not found:
            raise BadInput(f"no file matches data.path={path!r} (from {os.getcwd()}); check the pattern")
    else:
        here = os.path.dirname(path) or "."
        names = os.listdir(here) if os.path.isdir(here) else []
        near = difflib.get_close_matches(os.path.basename(path), names, 1, 0.6)
        hint = f"did you mean {os.path.join(os.path.dirname(path), near[0])!r}?" if near else "check data.path"
        raise BadInput(f"there is no file {path!r} (from {os.getcwd()}); {hint}")
    files = [Path(os.path.abspath(name)) for name in found]
    for file in files:
        if not file.is_file():
            raise BadInput(f"{file} is not a regular file; leave it out of data.path")
    base = Path(os.path.commonpath([file.parent for file in files]))
    return base, sorted(set(files), key=lambda file: file.relative_to(base).parts)


def files_identity(base: Path, files: list[Path]) -> dict[str, Any]:
    """Number, size and one hash of names (relative to ``base``), sizes and contents of ``files``."""
    total, listing = 0, hashlib.sha256()
    for file in files:
        try:
            with open(file, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
                size = os.fstat(handle.fileno()).st_size
        except OSError as problem:
            raise cannot_read(file, problem) from problem
        total += size
        listing.update(json.dumps([file.relative_to(base).as_posix(), size, digest]).encode())
    return {"files": len(files), "bytes": total, "sha256": listing.hexdigest()}


def cannot_read(file: Path, problem: OSError) -> BadInput:
    """The error for a file that the system does not let us read."""
    return BadInput(f"cannot read {file}: {problem.strerror or problem}; check its permissions, or leave it out")


def document_kind(config: Data, file: Path) -> str:
    """What a document is in ``file``: "file", "line" or "field"."""
    has_fields = file.suffix.lower() in (*JSON_LINES, ".parquet")
    if config.document == "auto":
        return "field" if has_fields else "file"
    if has_fields != (config.document == "field"):
        holds = "one document per row" if has_fields else "plain text, without fields"
        raise BadInput(f"data.document={config.document} does not fit {file}, which holds {holds}; set it to auto")
    return config.document


def read_files(files: list[Path], config: Data, mended: Mended) -> Iterator[str]:
    """The documents of local files, in order, mended."""
    for file in files:
        try:
            if file.suffix.lower() in JSON_LINES:
                yield from read_json_lines(file, config.text_field, mended)
            elif file.suffix.lower() == ".parquet":
                yield from read_parquet(file, config.text_field, mended)
            else:
                text = mended.mend_file(file.read_bytes(), file)
                if document_kind(config, file) == "line":
                    # Not splitlines(), which also breaks at form feeds and U+2028.
                    yield from text.removesuffix("\n").split("\n")
                else:
                    yield text
        except OSError as problem:
            raise cannot_read(file, problem) from problem


def read_json_lines(file: Path, field: str, mended: Mended) -> Iterator[str]:
    """The texts of one .jsonl file; lines without content are skipped."""
    with open(file, "rb") as handle:
        for number, raw in enumerate(handle, 1):
            line = raw.decode("utf-8", "surrogateescape")
            if number == 1 and line.startswith("\ufeff"):
                line = line[1:]
                mended.marks += 1
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise BadInput(f"{place} is not JSON ({problem}); mend the line or remove it") from problem
            if not isinstance(row, dict):
                raise BadInput(f"{place} is not a JSON object but a {type(row).__name__}; mend the line or remove it")
            yield field_of(row, field, place, mended)


def read_parquet(file: Path, field: str, mended: Mended) -> Iterator[str]:
    """The texts of one .parquet file, a thousand rows in memory at a time."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if field not in table.schema_arrow.names:
            raise missing_field(field, table.schema_arrow.names, str(file))
        row = 0
        for batch in table.iter_batches(batch_size=1000, columns=[field]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield field_of({field: value}, field, f"{file}, row {row}", mended)
    except pyarrow.ArrowException as problem:
        raise BadInput(f"{file} cannot be read as parquet ({problem}); make it anew or leave it out") from problem


def field_of(row: dict[str, Any], field: str, place: str, mended: Mended) -> str:
    """The mended text of one row; null counts as empty."""
    if field not in row:
        raise missing_field(field, list(row), place)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"field {field!r} of {place} is not text but {type(value).__name__}; set data.text_field")
    return mended.mend(value)


def missing_field(field: str, names: list[str], place: str) -> BadInput:
    """The error for a row without the text."""
    there = ", ".join(map(repr, names)) or "none"
    return BadInput(f"{place} has no field {field!r}; its fields are {there}: set data.text_field to one of them")


# ---------------------------------------------------------------------------------------------- transform


def import_transform(name: str) -> tuple[Callable[[str], Any], str]:
    """The function "module:function", found from the current directory too, and the sha256 of its module's source."""
    module_name, _, function_name = name.partition(":")
    added = os.getcwd()
    sys.path.append(added)
    try:
        module = importlib.import_module(module_name)
        source = inspect.getsource(module)
    except (OSError, TypeError) as problem:
        raise BadInput(f"data.transform={name}: {module_name} has no Python source to tell versions apart") from problem
    except Exception as problem:
        raise BadInput(
            f"data.transform={name}: cannot import {module_name} ({type(problem).__name__}: {problem}); "
            f"it is looked for in {added} and among the installed modules"
        ) from problem
    finally:
        sys.path.remove(added)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"data.transform={name}: {module.__file__} has no function {function_name!r}")
    return function, hashlib.sha256(source.encode()).hexdigest()
