"""What a start knows without reading text: which files are the same as before, and which corpora are there already."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import files
from config import BadInput, Data
from data.readers import files_identity

CACHE = ".sources.json"  # beside the corpora
ENTRIES = 50  # sources that are remembered, those read last
SETTLED = 2 * 10**9  # nanoseconds without a change after which a later change must show in a file's times


def identity_of(base: Path, paths: list[Path], root: Path | None) -> dict[str, Any]:
    """``files_identity`` of the files; what ``root`` remembers of it, while their names, sizes and times are the same.

    The times are those of the last change of contents and of the inode, of which nobody can set the second. Only where
    one of all these differs, or ``root`` is None, are the files read. Raises BadInput for one that cannot be.
    """
    stamp = None if root is None else stamp_of(base, paths)
    if root is None or stamp is None:
        return files_identity(base, paths)
    known = remembered(root)
    if stamp not in known:
        known[stamp] = files_identity(base, paths)
        with suppress(OSError):  # a root that cannot be written to is told of where that matters
            root.mkdir(parents=True, exist_ok=True)
            files.write_json(root / CACHE, dict(list(known.items())[-ENTRIES:]))
    identity: dict[str, Any] = known[stamp]
    return identity


def stamp_of(base: Path, paths: list[Path]) -> str | None:
    """A hash of names, sizes and times; None if a file was changed just now: the next change may have the same time.

    None also for files of a store, whose identity asks for none of their contents.
    """
    rows, newest = [], 0
    for path in paths:
        try:
            found = os.stat(path)
        except (OSError, TypeError):
            return None
        rows.append([str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns])
        newest = max(newest, found.st_mtime_ns, found.st_ctime_ns)
    return files.hash_of([str(base), rows]) if newest < time.time_ns() - SETTLED else None


def remembered(root: Path) -> dict[str, Any]:
    """What the cache of ``root`` holds; nothing if it is not there or makes no sense."""
    try:
        known = json.loads((root / CACHE).read_text())
        return {stamp: identity for stamp, identity in known.items() if identity.keys() == {"files", "bytes", "sha256"}}
    except (OSError, ValueError, AttributeError):
        return {}


def prepared(config: Data) -> Path | None:
    """The corpus that data.path itself names, for which no text is needed; None if it names something else.

    Raises BadInput for knobs of the preparation that are not those it was made with. Knobs that have their default
    values may differ: they were not set, and what the manifest says is what counts.
    """
    if config.corpus == "huggingface" or not config.path:
        return None
    directory = Path(config.path).expanduser()
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        source, tokenizer = dict(manifest.get("source", {})), dict(manifest["tokenizer"])
        split = manifest.get("split") or (None, None, None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return directory if (directory / "manifest.json").is_file() else None  # opening it tells what is wrong
    made = dict(zip(("split", "val_fraction", "test_fraction"), split, strict=True))
    made |= {name: source.get(name) for name in ("max_documents", "text_field", "subset", "source_split")}
    made |= {
        "tokenizer": tokenizer.get("name", tokenizer.get("kind")),
        "vocab_size": tokenizer.get("vocab_size"),
        "tokenizer_sample": tokenizer.get("sample"),
    }
    made |= {"transform": source.get("transform", {}).get("name"), "document": "/".join(source.get("document", []))}
    wrong = [
        f"data.{name} is {value}, and it was made with {made[name]}"
        for name, value in config
        if name in made and value not in (made[name], type(config).model_fields[name].default)
    ]
    if wrong:
        raise BadInput(
            f"data.path={config.path} is a prepared corpus: {'; '.join(wrong)}; leave that out, or name the text "
            "itself in data.path"
        )
    return directory
