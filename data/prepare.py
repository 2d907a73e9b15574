"""Text becomes a corpus: split, tokenized, written once, found again by its fingerprint.

corpora/<name>-<fingerprint>/
    manifest.json                     what the corpus was made from, and the size and sha256 of every file
    tokenizer.json                    and tokenizer_config.json, which names its end-of-text token
    train-00000.safetensors ...       tokens (U16 or U32) and document_starts (I64, relative to the shard)

Every document begins with the end-of-text token. The directory appears by one rename, complete and on disk, or
not at all. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise, tee
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import files
from config import BadInput, Data
from data.encoding import encode_documents
from data.readers import HELD_OUT
from data.sources import Source, open_source
from data.tokenizers import (
    CONFIG,
    TOKENIZER,
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    tokenizer_identity,
    train_bpe,
    vocabulary_size,
)

FORMAT = 1  # raise it when the same input would give other bytes
TRANSFORM_FORMAT = 2  # the same for text with a data.transform
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 50_000_000

progress_bar = partial(tqdm, unit="B", unit_scale=True, leave=False)


def prepare(config: Data, root: Path | str = "corpora", quiet: bool = False, shard_tokens: int = SHARD_TOKENS) -> Path:
    """The directory of the corpus that ``config`` describes, made under ``root`` if it is not there yet.

    Processes that prepare the same corpus at the same time do the work once; the others wait. Memory holds one
    document and one shard per split at a time. Raises BadInput for text that cannot be read, is empty, or leaves
    a split empty; nothing is left behind then.
    """
    source = open_source(config)
    if not quiet:
        print(f"data       {source.describe}", flush=True)
    identity = {
        "format": TRANSFORM_FORMAT if config.transform else FORMAT,
        "source": source.identity,
        "tokenizer": tokenizer_identity(config.tokenizer, config.vocab_size),
        "split": [source.split, config.val_fraction, config.test_fraction],
        "shard_tokens": shard_tokens,
    }
    fingerprint = files.hash_of(identity)[:12]
    directory = Path(root) / f"{source.name}-{fingerprint}"
    if directory.is_dir():  # it was renamed into place, so it was complete
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with lock(directory, quiet):
            if directory.is_dir():
                return directory
            sweep(directory.parent)
            unfinished = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)  # the lock is ours, so whoever made it is dead
            try:
                unfinished.mkdir()
                summary = write_corpus(unfinished, source, config, {"fingerprint": fingerprint, **identity}, quiet)
                if open_source(config).identity != source.identity:
                    raise BadInput(f"{source.describe} changed while it was read; start again")
                files.sync(unfinished)
                unfinished.rename(directory)
                files.sync(directory.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as problem:
        raise BadInput(
            f"cannot write the corpus {directory}: {problem.strerror or problem}; "
            "check permissions and free space there"
        ) from problem
    if not quiet:
        print(f"{summary}\n{directory}", flush=True)
    return directory


def write_corpus(directory: Path, source: Source, config: Data, identity: dict[str, Any], quiet: bool) -> str:
    """Read, split, tokenize and write everything into ``directory``; returns a summary of a few lines."""
    splits = Splits(source, config)
    tokenizer, end = make_tokenizer(splits, config, quiet)
    tokenizer_file = directory / TOKENIZER
    tokenizer.save(str(tokenizer_file))
    files.write_json(directory / CONFIG, {"eos_token": tokenizer.id_to_token(end)})
    vocab_size = vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    names = SPLITS if config.test_fraction > 0 else SPLITS[:2]
    writers = {name: SplitWriter(directory, name, dtype, end, int(identity["shard_tokens"])) for name in names}
    named_texts, texts = tee(splits.texts())
    encoded = encode_documents(tokenizer, (text for _, text in texts))
    with progress_bar(desc="tokenizing", total=source.n_bytes, disable=quiet or None) as bar:
        for (name, text), tokens in zip(named_texts, encoded, strict=True):
            n_bytes = len(text.encode())
            writers[name].add(tokens, n_bytes)
            bar.update(n_bytes)
    entries = {name: writer.finish() for name, writer in writers.items()}
    for name, entry in entries.items():
        if not entry["documents"]:
            raise empty_split(name, source, sum(other["documents"] for other in entries.values()))
    manifest = {
        **identity,
        "name": source.name,
        "describe": source.describe,
        "replaced": source.mended.summary(),
        "tokenizer": {**identity["tokenizer"], "file": tokenizer_file.name, **files.entry_of(tokenizer_file)},
        "vocab_size": vocab_size,
        "end_of_text": end,
        "dtype": {2: "U16", 4: "U32"}[dtype.itemsize],
        "splits": entries,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in directory.iterdir():
        files.sync(file)
    return describe(manifest)


def describe(manifest: dict[str, Any]) -> str:
    """What a corpus holds, in a few lines of text."""
    lines = [f"{manifest['describe']}: {manifest['vocab_size']:,} vocabulary entries; replaced: {manifest['replaced']}"]
    for name, split in manifest["splits"].items():
        documents, n_bytes, tokens = split["documents"], split["bytes"], split["tokens"]
        lines.append(
            f"{name + ':':6} {documents:>9,} documents {n_bytes:>14,} bytes {tokens:>13,} tokens "
            f"({n_bytes / tokens:.2f} bytes per token)"
        )
    return "\n".join(lines)


def make_tokenizer(splits: Splits, config: Data, quiet: bool) -> tuple[Tokenizer, int]:
    """The tokenizer that the config names, and its end-of-text; bpe is trained on the training split alone."""
    if config.tokenizer == "byte":
        tokenizer = byte_tokenizer()
        return tokenizer, end_of_text(tokenizer)
    if config.tokenizer != "bpe":
        return load_tokenizer(config.tokenizer)
    with progress_bar(desc="training the tokenizer", total=splits.source.n_bytes, disable=quiet or None) as bar:

        def texts() -> Iterator[str]:
            for name, text in splits.texts():
                bar.update(len(text))
                if name == "train":
                    yield text

        tokenizer = train_bpe(texts(), config.vocab_size, quiet)
        return tokenizer, end_of_text(tokenizer)


# ---------------------------------------------------------------------------------------------- splits


class Splits:
    """The texts of a source with the split to which each belongs.

    The source is split before the transform, and each part is transformed by itself: all that is made of one part
    stays in its split. But two documents of different splits may become the same text, and one may become the other.
    Such a text belongs to test before val before train; it is left out of the other splits, and counted.
    """

    def __init__(self, source: Source, config: Data) -> None:
        self.source, self.config = source, config
        self.ends: list[int] | None = None  # of train, val and test, in characters, if the tail is held out
        self.owners: dict[int, str] = {}  # hashes of texts, and the only split that may have each
        self._check_transform()
        if source.split == "tail":
            n, test, held_out = sum(map(len, source.documents())), config.test_fraction, config.val_fraction
            self.ends = [round(n * (1 - held_out - test)), round(n * (1 - test)), n]
        elif source.transform:
            for name, document in self._parts():
                if name != "train":
                    # About 100 bytes for each text, before and after the transform.
                    for text in (document, *source.transformed(document)):
                        if self.owners.get(hash_of(text)) != "test":
                            self.owners[hash_of(text)] = name

    def texts(self) -> Iterator[tuple[str, str]]:
        """The name of its split and every text, as the transform gives it, in the source's order."""
        for name, part in self._parts():
            for text in self.source.transformed(part):
                if not self.owners or self.owners.get(hash_of(text), name) == name:
                    yield name, text
                else:
                    self.source.mended[HELD_OUT] += 1

    def _parts(self) -> Iterator[tuple[str, str]]:
        """The name of its split and every document before its transform; a document across two splits is cut."""
        position = 0
        for document in self.source.documents():
            if self.ends is None:
                yield split_of(document, self.config.val_fraction, self.config.test_fraction), document
                continue
            for name, (start, stop) in zip(SPLITS, pairwise([0, *self.ends]), strict=True):
                part = document[max(0, start - position) : max(0, stop - position)]
                if part:
                    yield name, part
            position += len(document)
        if self.ends and position != self.ends[-1]:
            raise BadInput(
                f"{self.source.describe} gave {self.ends[-1]:,} characters at first and {position:,} the second time; "
                "is it being written to?"
            )

    def _check_transform(self) -> None:
        """Raises BadInput if the transform does not give the same for the first document twice."""
        source = self.source
        first = next(source.documents(), None) if source.transform else None
        if first is not None and source.transformed(first) != source.transformed(first):
            raise BadInput(
                f"data.transform {self.config.transform} gave two results for the document that begins {first[:60]!r}; "
                "the same text must always give the same: give a random one a seed made of the text"
            )


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(document: str, val_fraction: float, test_fraction: float) -> str:
    """The split into which a document falls by the hash of its text, whatever the seed of the run."""
    fraction = hash_of(document) / 2**64
    if fraction < test_fraction:
        return "test"
    return "val" if fraction < test_fraction + val_fraction else "train"


def empty_split(name: str, source: Source, documents: int) -> BadInput:
    """The error for a split without a document."""
    if not documents:
        return BadInput(f"there is no text in {source.describe}; check data.path")
    way_out = "give more text" if name == "train" else f"raise data.{name}_fraction, or give more text"
    if source.split == "documents":
        way_out += ", or split the text itself with --data.split=tail"
    if name == "test":
        way_out += ", or do without it: --data.test_fraction=0"
    return BadInput(f"the {name} split of {source.describe} came out empty (documents in all: {documents}); {way_out}")


# ---------------------------------------------------------------------------------------------- files


class SplitWriter:
    """Writes the documents of one split into shards of exactly ``capacity`` tokens, the last one shorter."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, end_of_text: int, capacity: int) -> None:
        self.directory, self.name, self.end_of_text = directory, name, end_of_text
        self.buffer = np.empty(capacity, dtype)  # the system gives memory only for what is written to
        self.filled = self.bytes = 0
        self.starts = array("q")
        self.shards: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray, n_bytes: int) -> None:
        """Append one document, its end-of-text token before it; it may go on in the next shard."""
        self.bytes += n_bytes
        self.starts.append(self.filled)
        rest = np.insert(tokens, 0, self.end_of_text)
        while len(rest):
            fits, rest = np.split(rest, [len(self.buffer) - self.filled])
            self.buffer[self.filled : self.filled + len(fits)] = fits
            self.filled += len(fits)
            if self.filled == len(self.buffer):
                self._write_shard()

    def finish(self) -> dict[str, Any]:
        """Write what is left; returns what the manifest says of this split."""
        if self.filled:
            self._write_shard()
        counts = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents")}
        return {"bytes": self.bytes, **counts, "shards": self.shards}

    def _write_shard(self) -> None:
        file = self.directory / f"{self.name}-{len(self.shards):05d}.safetensors"
        starts = np.array(self.starts, dtype=np.int64)
        save_file({"tokens": self.buffer[: self.filled], "document_starts": starts}, file)
        counts = {"tokens": self.filled, "documents": len(starts)}
        self.shards.append({"file": file.name, **files.entry_of(file), **counts})
        self.filled, self.starts = 0, array("q")


def lock(directory: Path, quiet: bool) -> TextIO:
    """Hold the lock of one corpus until what is returned is closed. Its small file stays."""
    path = directory.with_name(f".{directory.name}.lock")
    try:
        return files.lock(path)
    except BlockingIOError:
        if not quiet:
            print(f"another process is preparing {directory}; waiting for it", flush=True)
        return files.lock(path, wait=True)


def sweep(root: Path) -> None:
    """Remove what killed preparations left in ``root``: partial directories whose lock nobody holds."""
    for unfinished in root.glob(".*.partial"):
        with suppress(BlockingIOError), files.lock(unfinished.with_suffix(".lock")):
            shutil.rmtree(unfinished, ignore_errors=True)
