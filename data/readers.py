"""How text is read: files of text, JSON lines or Parquet, and Hugging Face datasets, mended and counted on the way.

Code that comes with a dataset is never run; the datasets library (>= 4) has no way to do so any more.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from config import BadInput, Data
from files import sha256

JSON_LINES = (".jsonl", ".ndjson")
NOT_STDLIB_TEXT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
LARGEST_SHARE_REPLACED = 0.1  # a file with more invalid bytes than this is no text


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
            size, digest = file.stat().st_size, sha256(file)
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


# ---------------------------------------------------------------------------------------------- datasets


def dataset_identity(config: Data) -> dict[str, Any]:
    """What tells one dataset from another: the knobs, and for a local directory the contents of its files."""
    identity = {"subset": config.subset, "source_split": config.source_split, "text_field": config.text_field}
    directory = Path(str(config.path))
    if not directory.is_dir():
        return {"path": config.path, **identity}
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {**identity, **files_identity(directory, files)}


def read_dataset(config: Data, mended: Mended) -> Iterator[str]:
    """The texts of the dataset's rows, mended. Raises BadInput if it cannot be found or read."""
    import datasets  # type: ignore[import-untyped]

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    what = f"dataset {config.path!r}"
    try:
        rows = datasets.load_dataset(
            str(config.path), config.subset, split=config.source_split, streaming=config.streaming
        )
        if config.text_field in (rows.column_names or []):
            rows = rows.select_columns([config.text_field])
        for number, row in enumerate(rows):
            yield field_of(row, config.text_field, f"{what}, row {number}", mended)
    except BadInput:
        raise
    except Exception as problem:  # the library and its file systems raise what they like
        reason = " ".join(str(problem).split())
        raise BadInput(
            f"cannot read {what} (subset {config.subset}, split {config.source_split}): {type(problem).__name__}: "
            f"{reason}; check data.path, data.subset, data.source_split and the network, "
            "or give a local directory of .jsonl or .parquet files"
        ) from problem
