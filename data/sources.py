"""Where the text comes from: Python's own standard library, your files, or a Hugging Face dataset.

A Source yields its documents as often as it is asked, always in the same order, in pieces of text that can be
written as UTF-8: invalid bytes have become U+FFFD, CRLF has become LF, a leading byte-order mark is gone, and each
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
from pathlib import Path
from typing import Any

from config import BadInput, Data
from data import known, readers
from data.pieces import Piece, cut, whole
from data.readers import Mended
from data.token_files import read_tokens

IdentityOf = Callable[[Path, list[Path]], dict[str, Any]]
HUB_NAME = re.compile(r"([\w-]+)/[\w-][\w.-]*")  # of a dataset, its owner first
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
    read: Callable[[Mended], Iterator[Any]]
    """Fragments of documents; pieces, if ``in_pieces``."""
    max_documents: int | None = None
    min_characters: int = 0
    transform: Callable[[str], Any] | None = None
    in_pieces: bool = False
    held_out: Source | None = None
    """The text to validate on, if it is given."""
    mended: Mended = field(default_factory=Mended)

    def pieces(self) -> Iterator[Piece]:
        """Every document that is not empty, in pieces, before the transform, at most ``max_documents`` of them.

        A document longer than a piece is never empty.
        """
        self.mended = Mended()
        documents = 0
        for piece in self.read(self.mended) if self.in_pieces else cut(self.read(self.mended)):
            if piece.first and piece.last and len(text := piece.text.strip()) < max(1, self.min_characters):
                self.mended[readers.SHORT if text else readers.EMPTY] += 1
                continue
            yield piece
            documents += piece.last
            if documents == self.max_documents:
                return

    def documents(self) -> Iterator[str]:
        """The same documents, each as one text, which must fit into memory."""
        return whole(self.pieces())

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
    corpus, identity_of = kind_of(config), partial(known.identity_of, root=root)
    if corpus == "huggingface":
        source = open_dataset(config, identity_of)
    elif corpus == "tokens":
        source = open_tokens(config, identity_of)
    else:
        source = open_files(config, corpus, identity_of)
    source.identity |= {"corpus": corpus, "max_documents": config.max_documents}
    if config.split != "auto":
        source.split = config.split
    if config.transform:
        source.transform, digest = import_transform(config.transform)
        source.identity["transform"] = {"name": config.transform, "sha256": digest}
    if config.min_characters:
        source.identity["min_characters"] = config.min_characters
    if config.val_path or config.val_split:
        only = {"path": config.val_path or config.path, "source_split": config.val_split or config.source_split}
        held_out = open_source(config.model_copy(update=only | {"val_path": None, "val_split": None}), root)
        source.held_out, source.identity["val"] = held_out, held_out.identity
        source.describe += f"; validation on {held_out.describe}"
    return source


def open_dataset(config: Data, identity_of: IdentityOf) -> Source:
    """A Hugging Face dataset."""
    name = str(config.path)
    if os.path.isfile(name):
        raise BadInput(f"data.path={name} is a file and no dataset; leave data.corpus at auto, and it is read")
    if config.document not in ("auto", "field") or config.separator:
        raise BadInput(f"data.document={config.document} does not fit a dataset, made of rows; use auto")
    describe = f"dataset {name}, {config.subset + ', ' if config.subset else ''}split {config.source_split}"
    identity, read = readers.dataset_identity(config, identity_of), partial(readers.read_dataset, config)
    limits = config.max_documents, config.min_characters
    return Source(short_name(name) or "huggingface", describe, identity, "documents", None, read, *limits)


def open_tokens(config: Data, identity_of: IdentityOf) -> Source:
    """Files of tokens that others have made."""
    wrong = [name for name, value in (("transform", config.transform), ("separator", config.separator)) if value]
    if wrong or config.split == "tail" or config.document != "auto":
        what = wrong or ["document" if config.document != "auto" else "split=tail"]
        raise BadInput(f"data.{what[0]} does not fit {config.path}, whose text is tokenized already; leave it out")
    if config.tokenizer == "bpe":
        raise BadInput(f"{config.path} is tokenized already; name its tokenizer in data.tokenizer (a tokenizer.json)")
    base, files = readers.text_files(str(config.path))
    indices = [index for file in files if (index := file.with_suffix(".idx")).is_file()]
    identity = {"document": ["tokens"], **identity_of(base, [*files, *indices])}
    describe = f"{config.path} ({len(files)} file{'s' if len(files) > 1 else ''} of tokens)"
    read, limits = partial(read_tokens, files, config.tokenizer), (config.max_documents, config.min_characters)
    name = short_name(str(config.path)) or "tokens"
    return Source(name, describe, identity, "documents", None, lambda _: read(), *limits, in_pieces=True)


def open_files(config: Data, corpus: str, identity_of: IdentityOf) -> Source:
    """Files, or the standard library's."""
    if corpus == "stdlib":
        base, files = readers.stdlib_files()
        name, describe = "stdlib", f"the standard library of Python {platform.python_version()}"
    else:
        base, files = readers.text_files(str(config.path))
        name, describe = str(config.path), f"{config.path} ({len(files)} file{'s' if len(files) > 1 else ''})"
    kinds = {readers.document_kind(config, file) for file in files}
    identity = {"document": sorted(kinds), **identity_of(base, files)}
    if "field" in kinds:
        identity["text_field"] = config.text_field
    if "separated" in kinds:
        identity["separator"] = config.separator
    is_known = "field" not in kinds and not any(map(readers.is_compressed, files))
    n_bytes = identity["bytes"] if is_known else None
    split = "tail" if corpus == "text" and kinds == {"file"} and len(files) < FEW_FILES else "documents"
    read, limits = partial(readers.read_files, config, files), (config.max_documents, config.min_characters)
    return Source(short_name(name) or "text", describe, identity, split, n_bytes, read, *limits)


def kind_of(config: Data) -> str:
    """What data.corpus=auto means: "stdlib", "text", "tokens" or "huggingface".

    A path is that of text, but for .bin, for the directory of a saved dataset, and for owner/name where no such
    directory is.
    """
    if config.corpus != "auto":
        return config.corpus
    if not config.path:
        return "stdlib"
    name = HUB_NAME.fullmatch(config.path)
    is_dataset = readers.is_saved_dataset(config.path) or (name and not os.path.isdir(name[1]))
    return "huggingface" if is_dataset else "tokens" if config.path.endswith(".bin") else "text"


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
