"""Where the text comes from: Python's own standard library, your files, or a Hugging Face dataset.

A Source yields its documents as often as it is asked, always in the same order, as text that can be written
as UTF-8: invalid bytes have become U+FFFD, CRLF has become LF, a leading byte-order mark is gone, and each
of these has been counted. Nothing here knows of tokens or splits.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from config import BadInput, Data
from data import known, readers
from data.readers import Mended

FEW_FILES = 100  # below this many files the hash of a document splits too coarsely, and the tail is held out


@dataclass
class Source:
    """Text that can be read again and again.

    ``name`` is short and fit for a directory's name; ``identity`` is JSON-able and changes whenever the documents
    do; ``split`` is "documents" or "tail"; ``n_bytes`` the size of what is read, where it is known beforehand;
    ``mended`` counts what was changed in the text when it was last read.
    """

    name: str
    describe: str
    identity: dict[str, Any]
    split: str
    n_bytes: int | None
    read: Callable[[Mended], Iterator[str]]
    transform: Callable[[str], Any] | None
    max_documents: int | None
    mended: Mended = field(default_factory=Mended)

    def documents(self) -> Iterator[str]:
        """Every document that is not empty, before the transform, at most ``max_documents`` of them."""
        self.mended = Mended()
        return islice(self._not_empty(), self.max_documents)

    def _not_empty(self) -> Iterator[str]:
        for text in self.read(self.mended):
            if text.strip():
                yield text
            else:
                self.mended[readers.EMPTY] += 1

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


def open_source(config: Data, root: Path | None = None) -> Source:
    """The source that the config describes; local files are hashed, but nothing is decoded yet.

    With a ``root`` of corpora they are not even hashed if it knows them (see ``known.identity_of``).

    Raises BadInput for a path that holds nothing readable, or a transform that cannot be imported.
    """
    identity_of = partial(known.identity_of, root=root)
    identity: dict[str, Any] = {"corpus": config.corpus, "max_documents": config.max_documents}
    split, n_bytes, name = "documents", None, str(config.path)
    read: Callable[[Mended], Iterator[str]]
    if config.corpus == "huggingface":
        if config.document not in ("auto", "field"):
            raise BadInput(f"data.document={config.document} does not fit a dataset, made of rows; use auto")
        describe = f"dataset {name}, {config.subset + ', ' if config.subset else ''}split {config.source_split}"
        identity |= readers.dataset_identity(config, identity_of)
        read = partial(readers.read_dataset, config)
    else:
        if config.corpus == "stdlib":
            base, files = readers.stdlib_files()
            name, describe = "stdlib", f"the standard library of Python {platform.python_version()}"
        else:
            base, files = readers.text_files(name)
            describe = f"{name} ({len(files)} file{'s' if len(files) > 1 else ''})"
        kinds = {readers.document_kind(config, file) for file in files}
        identity |= {"document": sorted(kinds), **identity_of(base, files)}
        if "field" in kinds:
            identity["text_field"] = config.text_field
        else:
            n_bytes = identity["bytes"]
        if config.corpus == "text" and kinds == {"file"} and len(files) < FEW_FILES:
            split = "tail"
        read = partial(readers.read_files, config, files)
    transform = None
    if config.transform:
        transform, digest = import_transform(config.transform)
        identity["transform"] = {"name": config.transform, "sha256": digest}
    split = split if config.split == "auto" else config.split
    name = short_name(name) or config.corpus
    return Source(name, describe, identity, split, n_bytes, read, transform, config.max_documents)


def short_name(path: str) -> str:
    """The last part of a path that says something, fit for a directory's name: 'a/books/*.txt' is 'books'."""
    for part in reversed(path.replace("\\", "/").split("/")):
        word = re.sub(r"[^A-Za-z0-9]+", "-", part.split(".")[0]).strip("-")[:40].strip("-")
        if word:
            return word
    return ""


# ---------------------------------------------------------------------------------------------- transform


def import_transform(name: str) -> tuple[Callable[[str], Any], str]:
    """The function "module:function", found from the current directory too, and the sha256 of its module's source."""
    module_name, _, function_name = name.partition(":")
    added = os.getcwd()
    sys.path.append(added)
    try:
        module = importlib.import_module(module_name)
    except Exception as problem:
        raise BadInput(
            f"data.transform={name}: cannot import {module_name} ({type(problem).__name__}: {problem}); "
            f"it is looked for in {added} and among the installed modules"
        ) from problem
    finally:
        sys.path.remove(added)
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError) as problem:
        raise BadInput(f"data.transform={name}: {module_name} has no Python source to tell versions apart") from problem
    function = getattr(module, function_name, None)
    if not callable(function):
        raise BadInput(f"data.transform={name}: {module.__file__} has no function {function_name!r}")
    return function, hashlib.sha256(source.encode()).hexdigest()
