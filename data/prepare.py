"""Text becomes a corpus: split, tokenized, written once, found again by its fingerprint.

corpora/<name>-<fingerprint>/
    manifest.json                     what the corpus was made from, and the size and sha256 of every file
    tokenizer.json                    and tokenizer_config.json, which names its end-of-text token
    train-00000.safetensors ...       tokens (U16 or U32) and document_starts (I64, relative to the shard)

Every document begins with the end-of-text token. The directory appears by one rename, complete and on disk, or
not at all. The same input gives the same bytes, however often the work was interrupted and whoever shared it.

corpora/.<name>-<fingerprint>.partial/   while it is made; what goes on from it after a kill finds
    state.json                        what it is made for, and what is known of the text so far
    tokenizer.json ...
    block-000000.safetensors ...      the tokens of so much text (data/blocks.py)
    corpus/                           the directory that will be renamed
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import files
from config import BadInput, Data
from data import blocks
from data.blocks import BLOCK, Block, Place
from data.copies import Copies, copies_in_train
from data.encoding import Encoder
from data.known import prepared
from data.pieces import Piece, cut, hash_of
from data.readers import COPIES, HELD_OUT, Mended
from data.sources import Source, open_source
from data.tokenizers import (
    CONFIG,
    TOKENIZER,
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    plain,
    tokenizer_identity,
    train_bpe,
    vocabulary_size,
)

FORMAT = 3  # raise it when the same input would give other bytes
SPLITS = ("train", "val", "test")
SHARD_TOKENS = 50_000_000
TRAINING_PIECE = 65_536  # characters of which the sample for a tokenizer is made
FORGOTTEN = 7 * 86_400  # seconds
TELL_EVERY = 30.0  # seconds, where there is no terminal


def prepare(
    config: Data,
    root: Path | str = "corpora",
    quiet: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    block_bytes: int = BLOCK,
    job: tuple[int, int] | None = None,
    merge: bool = False,
) -> Path:
    """The directory of the corpus that ``config`` names or describes, made under ``root`` if it is not there yet.

    Processes that prepare the same corpus at the same time do the work once; the others wait. One that was killed
    goes on where it was, but for the block at work. ``job`` (i, n) makes every n-th block alone, beside the other jobs
    of an array, and returns a directory that is not there yet; ``merge`` makes the corpus of what the jobs have left
    and refuses to do their work. Memory holds some megabytes of text and one shard, whatever the size of the text.

    Raises BadInput for text that cannot be read, is empty, or leaves a split empty, and for a disk that is full.
    """
    if (directory := prepared(config)) is not None:
        return directory
    source = open_source(config, Path(root))
    if not quiet:
        print(f"data       {source.describe}", flush=True)
    identity = {
        "format": FORMAT,
        "source": source.identity,
        "tokenizer": tokenizer_identity(config.tokenizer, config.vocab_size, config.tokenizer_sample),
        "split": [source.split, config.val_fraction, config.test_fraction],
        "copies": config.copies,
        "shard_tokens": shard_tokens,
    }
    fingerprint = files.hash_of(identity)[:12]
    directory = Path(root) / f"{source.name}-{fingerprint}"
    if directory.is_dir():  # it was renamed into place, so it was complete
        return directory
    unfinished = directory.with_name(f".{directory.name}.partial")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with lock(directory, quiet, shared=job is not None):
            if directory.is_dir():
                return directory
            if merge:
                refuse_gaps(unfinished)
            if job is None:
                sweep(directory.parent)
            with nullcontext() if job else clearing(unfinished):
                work = Work(unfinished, source, config, {"fingerprint": fingerprint, **identity}, block_bytes, quiet)
                summary = work.share(job) if job else work.finish(directory)
    except OSError as problem:
        raise BadInput(
            f"cannot write the corpus {directory}: {problem.strerror or problem}; check permissions and free space "
            "there, and start again: it will go on where it was"
        ) from problem
    if not quiet:
        print(summary, flush=True)
    return directory


class Work:
    """A corpus in the making. What is known of it is in ``state``, and in its directory for whoever goes on."""

    def __init__(
        self, directory: Path, source: Source, config: Data, identity: dict[str, Any], block_bytes: int, quiet: bool
    ) -> None:
        """Begin, or find what another has begun: where the splits end, and the tokenizer."""
        self.directory, self.source, self.identity = directory, source, identity
        self.block_bytes, self.quiet = block_bytes, quiet
        directory.mkdir(exist_ok=True)
        with files.lock(directory / "lock", wait=True):  # jobs begin together: one makes, the others find
            state_file, made_for = directory / "state.json", {**identity, "block_bytes": block_bytes}
            state = json.loads(state_file.read_text()) if state_file.is_file() else {}
            if state.get("made_for") != made_for:
                for file in directory.glob("block-*"):
                    file.unlink()
                state = {"made_for": made_for}
            self.splits = Splits(source, config, state.get("ends"), quiet)
            if "end_of_text" in state:
                end = int(state["end_of_text"])
                self.tokenizer = plain(Tokenizer.from_file(str(directory / TOKENIZER)), end)
            else:
                self.tokenizer, end, trained_on = make_tokenizer(self.splits, config, quiet)
                files.write_text(directory / TOKENIZER, self.tokenizer.to_str(pretty=True))
                state |= {"ends": self.splits.ends, "end_of_text": end, "trained_on": trained_on}
                files.write_json(state_file, state)
        self.state: dict[str, Any] = state
        self.end_of_text, self.vocab_size = end, vocabulary_size(self.tokenizer)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.names = SPLITS if config.test_fraction > 0 else SPLITS[:2]

    def share(self, job: tuple[int, int]) -> str:
        """Make the blocks of one job; returns what to do next."""
        self._encode(*job)
        return f"job {job[0]} of {job[1]} is done; when all are, put their work together with --merge"

    def finish(self, directory: Path) -> str:
        """Make all that is missing and let the corpus appear at ``directory``; returns a summary of a few lines."""
        self._encode(0, 1)
        summary = self._join()
        (self.directory / "corpus").rename(directory)
        files.sync(directory.parent)
        shutil.rmtree(self.directory)
        return f"{summary}\n{directory}"

    def _encode(self, index: int, jobs: int) -> None:
        """Make every block that is not there yet, of ``jobs`` jobs those of one. The text is read in any case."""
        done = blocks.there(self.directory)
        if "blocks" in self.state and done >= set(range(index, self.state["blocks"], jobs)):
            return
        encoder = Encoder(self.tokenizer)
        count = n_tokens = 0

        def missing() -> Iterator[tuple[Piece, Place]]:
            nonlocal count
            texts = self.splits.texts(encoder.in_pieces or self.source.in_pieces)
            for piece, place in blocks.placed(texts, self.block_bytes):
                count = place.block + 1
                if place.block % jobs == index and place.block not in done:
                    yield piece, place
                bar.update(place.n_bytes)

        block: Block | None = None
        with progress_bar("tokenizing", self.splits.n_bytes, self.quiet) as bar:
            for place, ids in encoder.stream(missing()):
                if block is None or place.block != block.number:
                    if block:
                        block.write(self.directory)
                        bar.set_postfix_str(f"{n_tokens / 1e6:,.1f}M tokens", refresh=False)
                    block = Block(place.block, self.end_of_text, self.dtype)
                block.add(place, ids)
                n_tokens += len(ids)
            if block:
                block.write(self.directory)
        self.state |= {"blocks": count, "replaced": self.splits.replaced()}
        files.write_json(self.directory / "state.json", self.state)

    def _join(self) -> str:
        """Put the blocks together to a whole corpus, in a directory below; returns a summary of a few lines."""
        source, directory = self.source, self.directory / "corpus"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        entries = {name: self._join_split(name, directory) for name in self.names}
        for name, entry in entries.items():
            if not entry["documents"]:
                raise empty_split(name, source, sum(other["documents"] for other in entries.values()))
        for name, copies in copies_in_train(self.directory, self.state["blocks"], self.names[1:]).items():
            entries[name]["copies"] = copies
        if open_source(self.splits.config).identity != source.identity:
            raise BadInput(f"{source.describe} changed while it was read; start again")
        tokenizer_file = directory / TOKENIZER
        shutil.copy(self.directory / TOKENIZER, tokenizer_file)
        files.write_json(directory / CONFIG, {"eos_token": self.tokenizer.id_to_token(self.end_of_text)})
        trained = {} if self.state["trained_on"] is None else {"trained_on": self.state["trained_on"]}
        entry = {**self.identity["tokenizer"], **trained, "file": TOKENIZER, **files.entry_of(tokenizer_file)}
        manifest = {
            **self.identity,
            "name": source.name,
            "describe": source.describe,
            "replaced": self.state["replaced"],
            "tokenizer": entry,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "dtype": {2: "U16", 4: "U32"}[self.dtype.itemsize],
            "splits": entries,
        }
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in (*directory.iterdir(), directory):
            files.sync(file)
        return describe(manifest)

    def _join_split(self, name: str, directory: Path) -> dict[str, Any]:
        """Write the shards of one split; returns what the manifest says of it."""
        writer = SplitWriter(directory, name, self.dtype, self.identity["shard_tokens"])
        with progress_bar(f"joining {name}", self.state["blocks"], self.quiet, " blocks") as bar:
            for number in range(self.state["blocks"]):
                if part := blocks.read(self.directory, number, name):
                    writer.add(*part)
                bar.update()
        return writer.finish()


@contextmanager
def clearing(unfinished: Path) -> Iterator[None]:
    """Where text is refused, leave nothing behind.

    But blocks are kept if the text was not read to its end: it may be the network that failed.
    """
    try:
        yield
    except BadInput:
        state = unfinished / "state.json"
        if not blocks.there(unfinished) or "replaced" in json.loads(state.read_text()):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def refuse_gaps(unfinished: Path) -> None:
    """Raises BadInput if the jobs of an array have left blocks to be made."""
    file = unfinished / "state.json"
    total = json.loads(file.read_text()).get("blocks") if file.is_file() else None
    way_out = "let each job of --shard i/n end first, or leave out --merge to make the rest here"
    if total is None:
        raise BadInput(f"no job has come to the end of the text yet (in {unfinished}); {way_out}")
    if gaps := sorted(set(range(total)) - blocks.there(unfinished)):
        numbers = ", ".join(map(str, gaps[:10])) + (", ..." if len(gaps) > 10 else "")
        raise BadInput(f"{len(gaps)} of {total} blocks are missing in {unfinished} (numbers {numbers}); {way_out}")


def describe(manifest: dict[str, Any]) -> str:
    """What a corpus holds, in a few lines of text."""
    lines = [f"{manifest['describe']}: {manifest['vocab_size']:,} vocabulary entries; replaced: {manifest['replaced']}"]
    for name, split in manifest["splits"].items():
        documents, n_bytes, tokens = split["documents"], split["bytes"], split["tokens"]
        lines.append(
            f"{name + ':':6} {documents:>9,} documents {n_bytes:>14,} bytes {tokens:>13,} tokens "
            f"({n_bytes / tokens:.2f} bytes per token)"
        )
        if copies := split.get("copies", 0):
            lines[-1] += f"; {copies:,} of the documents are in train, too (data.copies=drop takes them out there)"
    return "\n".join(lines)


def make_tokenizer(splits: Splits, config: Data, quiet: bool) -> tuple[Tokenizer, int, int | None]:
    """The tokenizer that the config names, its end-of-text, and on how many characters it was trained, if it was.

    A bpe is trained on the training split alone, on a sample of it that is drawn evenly.
    """
    if config.tokenizer == "byte":
        tokenizer = byte_tokenizer()
        return tokenizer, end_of_text(tokenizer), None
    if config.tokenizer != "bpe":
        return *load_tokenizer(config.tokenizer), None
    tokenizer, trained_on = train_on_sample([splits], config.vocab_size, config.tokenizer_sample, quiet)
    return tokenizer, end_of_text(tokenizer), trained_on


def train_on_sample(sources: Sequence[Splits], vocab_size: int, limit: int, quiet: bool) -> tuple[Tokenizer, int]:
    """A bpe trained on ``limit`` characters of the training splits, or all if there are fewer, and their number."""
    sizes = [splits.source.n_bytes for splits in sources]
    n_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    total = taken = seen = 0

    def training_texts() -> Iterator[str]:
        for name, piece in chain.from_iterable(splits.texts() for splits in sources):
            bar.update(len(piece.text))
            if name == "train":
                yield from (part.text for part in cut([(piece.text, True)], TRAINING_PIECE))

    def sample() -> Iterator[str]:
        nonlocal taken, seen
        for text in training_texts():
            if taken * max(total, limit) <= seen * limit:  # always, where there is no more than the limit
                taken += len(text)
                yield text
            seen += len(text)

    if n_bytes is None or n_bytes > limit:
        with progress_bar("counting", n_bytes, quiet) as bar:
            total = sum(map(len, training_texts()))
    with progress_bar("training the tokenizer", n_bytes, quiet) as bar:
        tokenizer = train_bpe(sample(), vocab_size, quiet)
    if taken < seen and not quiet:
        print(f"tokenizer  trained on {taken:,} of {seen:,} characters, drawn evenly; see data.tokenizer_sample")
    return tokenizer, taken


class Lines:
    """Where there is no terminal, each state of a progress bar becomes a line on standard error."""

    def write(self, text: str) -> None:
        """Print what there is to see."""
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr)

    def flush(self) -> None:
        """Let it be seen at once."""
        sys.stderr.flush()


@contextmanager
def progress_bar(what: str, total: int | None, quiet: bool, unit: str = "B") -> Iterator[tqdm[Any]]:
    """How much is done, how fast, and the time left; without a terminal a line each half minute, whatever happens."""
    form: dict[str, Any] = {}
    if not sys.stderr.isatty():
        line = "{desc}: {n_fmt}{unit} of {total_fmt}{unit} in {elapsed}, {rate_fmt}, {remaining} left{postfix}"
        form = {"file": Lines(), "bar_format": line, "mininterval": math.inf, "delay": 1}
    over = threading.Event()
    with tqdm(desc=what, total=total, disable=quiet, unit=unit, unit_scale=True, leave=False, **form) as bar:

        def tell() -> None:
            while not over.wait(TELL_EVERY):
                bar.refresh()

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield bar
        finally:
            over.set()
            thread.join()


# ---------------------------------------------------------------------------------------------- splits


class Splits:
    """The texts of a source with the split to which each belongs.

    The source is split before the transform, and each part is transformed by itself: all that is made of one part
    stays in its split. But two documents of different splits may become the same text, and one may become the other.
    Such a text belongs to test before val before train; it is left out of the other splits, and counted.
    """

    def __init__(self, source: Source, config: Data, ends: list[int] | None = None, quiet: bool = True) -> None:
        """``ends`` are those of an earlier reading: without them, the text of a tail split is read to be counted."""
        self.source, self.config = source, config
        self.val_fraction = 0.0 if source.held_out else config.val_fraction
        self.ends = ends  # of train, val and test, in characters, if the tail is held out
        self.owners: dict[int, str] = {}  # hashes of texts, and the only split that may have each
        self.held_out: Copies | None = None
        self._check_transform()
        if source.split == "tail" and ends is None:
            n, test, held_out = 0, config.test_fraction, self.val_fraction
            with progress_bar("counting", source.n_bytes, quiet) as bar:
                for piece in source.pieces():
                    n += len(piece.text)
                    bar.update(len(piece.text))
            self.ends = [round(n * (1 - held_out - test)), round(n * (1 - test)), n]
        elif source.split != "tail" and source.transform:
            for name, document in whole_documents(self._parts()):
                if name != "train":
                    # About 100 bytes for each text, before and after the transform.
                    for text in (document, *source.transformed(document)):
                        if self.owners.get(hash_of(text)) != "test":
                            self.owners[hash_of(text)] = name
        if config.copies != "keep":
            firsts = (piece.text for name, piece in self._parts() if piece.first and name != "train")
            self.held_out = Copies(firsts, near=config.copies == "drop_near")

    def texts(self, in_pieces: bool = True) -> Iterator[tuple[str, Piece]]:
        """The name of its split and every text, as the transform gives it, in the source's order; or whole texts."""
        if in_pieces and not self.source.transform:
            yield from self._kept()
            return
        for name, part in whole_documents(self._kept()):
            for text in self.source.transformed(part):
                if self.owners and self.owners.get(hash_of(text), name) != name:
                    self.source.mended[HELD_OUT] += 1
                elif in_pieces:
                    yield from ((name, piece) for piece in cut([(text, True)]))
                else:
                    yield name, Piece(text)

    @property
    def n_bytes(self) -> int | None:
        """The size of what is read, where it is known beforehand."""
        sizes = [source.n_bytes for source in (self.source, self.source.held_out) if source]
        return None if None in sizes else sum(sizes)  # type: ignore[arg-type]

    def replaced(self) -> str:
        """What was done to the text on the way, in a line."""
        held_out = self.source.held_out
        return (Mended(self.source.mended + held_out.mended) if held_out else self.source.mended).summary()

    def _kept(self) -> Iterator[tuple[str, Piece]]:
        """The name of its split and every piece, but for documents of train that are copies, if these are dropped."""
        if self.held_out is None:
            yield from self._parts()
            return
        is_copy = False
        for name, piece in self._parts():
            if piece.first:
                is_copy = name == "train" and piece.text in self.held_out
                self.source.mended[COPIES] += is_copy
            if not is_copy:
                yield name, piece

    def _parts(self) -> Iterator[tuple[str, Piece]]:
        """The name of its split and every piece of a document; a document across two splits becomes two.

        Behind all comes the text to validate on, if it was given.
        """
        position, name = 0, ""
        for piece in self.source.pieces():
            if self.ends is None:
                if piece.first:
                    name = split_of(piece.text, self.val_fraction, self.config.test_fraction)
                yield name, piece
                continue
            end = position + len(piece.text)
            for name, (start, stop) in zip(SPLITS, pairwise([0, *self.ends]), strict=True):
                a, b = max(start, position), min(stop, end)
                if a < b:
                    first, last = a == start or (piece.first and a == position), b == stop or (piece.last and b == end)
                    yield name, Piece(piece.text[a - position : b - position], first, last)
            position = end
        if self.ends and position != self.ends[-1]:
            raise BadInput(
                f"{self.source.describe} gave {self.ends[-1]:,} characters at first and {position:,} the second time; "
                "is it being written to?"
            )
        if self.source.held_out:
            yield from (("val", piece) for piece in self.source.held_out.pieces())

    def _check_transform(self) -> None:
        """Raises BadInput if the transform does not give the same for the first document twice."""
        source = self.source
        first = next(source.documents(), None) if source.transform else None
        if first is not None and source.transformed(first) != source.transformed(first):
            raise BadInput(
                f"data.transform {self.config.transform} gave two results for the document that begins {first[:60]!r}; "
                "the same text must always give the same: give a random one a seed made of the text"
            )


def whole_documents(parts: Iterator[tuple[str, Piece]]) -> Iterator[tuple[str, str]]:
    """The name of its split and the whole text of every document."""
    texts: list[str] = []
    for name, piece in parts:
        texts.append(piece.text)
        if piece.last:
            yield name, "".join(texts)
            texts = []


def split_of(document: str, val_fraction: float, test_fraction: float) -> str:
    """The split into which a document falls by the hash of its text, whatever the seed of the run.

    White space around it does not count; of a document longer than a piece (2^20 characters) the first piece does.
    """
    fraction = hash_of(document.strip()) / 2**64
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
    """Writes the tokens of one split into shards of exactly ``capacity`` tokens, the last one shorter."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype, capacity: int) -> None:
        self.directory, self.name = directory, name
        self.buffer = np.empty(capacity, dtype)  # the system gives memory only for what is written to
        self.filled = self.bytes = 0
        self.starts: list[np.ndarray] = []
        self.shards: list[dict[str, Any]] = []

    def add(self, tokens: np.ndarray, starts: np.ndarray, n_bytes: int) -> None:
        """Append tokens, with documents that begin at ``starts``; they may go on in the next shard."""
        self.bytes += n_bytes
        done = 0
        while done < len(tokens):
            fits = tokens[done : done + len(self.buffer) - self.filled]
            self.buffer[self.filled : self.filled + len(fits)] = fits
            self.starts.append(starts[(starts >= done) & (starts < done + len(fits))] - done + self.filled)
            self.filled += len(fits)
            done += len(fits)
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
        starts = np.concatenate(self.starts)
        blocks.save({"tokens": self.buffer[: self.filled], "document_starts": starts}, file)
        counts = {"tokens": self.filled, "documents": len(starts)}
        self.shards.append({"file": file.name, **files.entry_in_blocks(file), **counts})
        self.filled, self.starts = 0, []


def lock(directory: Path, quiet: bool, shared: bool) -> TextIO:
    """Hold the lock of one corpus until what is returned is closed, with others if ``shared``. Its small file stays."""
    path = directory.with_name(f".{directory.name}.lock")
    try:
        return files.lock(path, shared=shared)
    except BlockingIOError:
        if not quiet:
            print(f"another process is preparing {directory}; waiting for it", flush=True)
        return files.lock(path, wait=True, shared=shared)


def sweep(root: Path) -> None:
    """Remove what preparations left in ``root`` that nobody has gone on with for a week."""
    for unfinished in root.glob(".*.partial"):
        with suppress(OSError), files.lock(unfinished.with_suffix(".lock")):
            if time.time() - unfinished.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(unfinished, ignore_errors=True)
