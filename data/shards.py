"""A prepared corpus, read through memory maps: opening it reads its manifest and no shard, whatever its size.

Whatever differs from the manifest is refused before it is used. Names that lead elsewhere and sizes are, when the
corpus is opened. Contents are, when they are first read: the manifest has a hash for each 256 KiB of a shard, and the
first to read there in a process compares it. So a start costs nothing, all of a file is checked that is used, and no
process waits for another. (A check of everything at the start takes minutes for a large corpus, and one in the
background may come after the step that reads what was edited.) The price is that a window of a kilobyte makes 256 be
read when it is the first: about 0.2 ms on one core each, until all is read once, by the thread that reads ahead.

Only JSON and safetensors are read; nothing is ever unpickled.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import files
from config import BadInput, Source, all_errors
from data.tokenizers import plain, vocabulary_size

Count = Annotated[int, Field(ge=0)]
DIGITS = 16  # of the hash of a block
DTYPES = {"U16": "<u2", "U32": "<u4", "I64": "<i8"}  # safetensors' names and NumPy's


class FileEntry(BaseModel, strict=True):
    """What the manifest says of a file; a shard has tokens and documents, and blocks, unless it is an old one."""

    file: Any  # files.problem_of refuses what is not the name of a plain file
    size: Count
    sha256: str
    blocks: str = ""
    tokens: Count = 0
    documents: Count = 0


class SplitEntry(BaseModel, strict=True):
    """What the manifest says of a split."""

    bytes: Count
    tokens: Count
    documents: Count
    copies: Count = 0
    shards: list[FileEntry]


class Manifest(BaseModel, strict=True):
    """The part of manifest.json that is needed to open a corpus and to describe it."""

    describe: str
    replaced: str
    tokenizer: FileEntry
    vocab_size: Count
    end_of_text: Count
    dtype: Literal["U16", "U32"]
    splits: dict[str, SplitEntry]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for entry in self.entries():
            if entry.blocks and len(entry.blocks) != DIGITS * -(-entry.size // files.BLOCK):
                raise ValueError(f"the blocks of {entry.file} are not those of {entry.size:,} bytes")
        for name, split in self.splits.items():
            sums = [sum(shard.tokens for shard in split.shards), sum(shard.documents for shard in split.shards)]
            if sums != [split.tokens, split.documents]:
                raise ValueError(f"the counts of the shards of {name} do not add up to those of the split")
            if split.shards and not split.shards[0].documents:
                raise ValueError(f"no document begins in the first shard of {name}")
        if self.end_of_text >= self.vocab_size:
            raise ValueError("end_of_text is outside the vocabulary")
        return self

    def entries(self) -> list[FileEntry]:
        """The tokenizer, and the shards of all splits by name."""
        return [self.tokenizer, *(shard for name in sorted(self.splits) for shard in self.splits[name].shards)]


@dataclass(frozen=True)
class Shard:
    """Tokens first..first + n_tokens of a split, and those of its documents, from first_document on, that begin there.

    Slices of ``tokens`` and ``index`` (where the documents begin, from the shard's own first token) read them.
    """

    path: Path
    first: int
    n_tokens: int
    first_document: int
    n_documents: int
    tokens: Any
    index: Any

    @cached_property
    def starts(self) -> np.ndarray:
        """The whole ``index``, int64 [n_documents], checked when it is first used; raises BadInput if it is damaged."""
        starts: np.ndarray = self.index[: self.n_documents]
        inside = not len(starts) or (starts[0] >= 0 and starts[-1] < self.n_tokens)
        late = self.first == 0 and starts[0] != 0  # the first document begins with the split
        if late or not inside or not (starts[1:] > starts[:-1]).all():
            raise BadInput(f"document_starts of {self.path} are out of order; {way_out(self.path.parent)}")
        return starts


class ShardFile:
    """One file of a corpus, opened when it is first read, each block compared with its hash before it is used."""

    def __init__(self, directory: Path, entry: dict[str, Any], dtype: str) -> None:
        self.path, self.size, self.blocks = directory / entry["file"], entry["size"], entry["blocks"]
        self.expected = {"document_starts": ["I64", entry["documents"]], "tokens": [dtype, entry["tokens"]]}
        self.compared: set[int] = set()

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements start..stop of a tensor, a view of the memory map; raises BadInput if the file is damaged there."""
        begin, tensor = self.tensors[name]
        self._compare(begin + start * tensor.itemsize, begin + stop * tensor.itemsize)
        return tensor[start:stop]

    def _compare(self, begin: int, end: int) -> None:
        for number in range(begin // files.BLOCK, -(-end // files.BLOCK)):
            if number not in self.compared and self.blocks:
                first = number * files.BLOCK
                digits = self.blocks[number * DIGITS : (number + 1) * DIGITS]
                if files.hash_of_block(self.contents[first : first + files.BLOCK]) != digits:
                    raise BadInput(
                        f"{self.path} is damaged: its bytes from {first:,} on differ from the manifest's hash; "
                        f"{way_out(self.path.parent)}"
                    )
                self.compared.add(number)

    @cached_property
    def contents(self) -> np.ndarray:
        """The memory map of the whole file."""
        import torch

        try:
            # NumPy's memory map would keep the file open, and a process may open only some hundred.
            return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8).numpy()
        except (OSError, RuntimeError) as problem:
            raise self._unreadable(problem) from problem

    @cached_property
    def tensors(self) -> dict[str, tuple[int, np.ndarray]]:
        """By name, the byte at which each begins, and a view of it that nothing was compared of yet."""
        self._compare(0, 1)  # the header
        try:
            header: Any = safe_open(self.path, framework="np")  # checks that the tensors fill the file without holes
            found = {key: header.get_slice(key) for key in header.offset_keys()}
            described = {key: [tensor.get_dtype(), *tensor.get_shape()] for key, tensor in found.items()}
        except (SafetensorError, OSError) as problem:
            raise self._unreadable(problem) from problem
        if described != self.expected:
            raise BadInput(f"the header of {self.path} does not fit its manifest; {way_out(self.path.parent)}")
        types = {key: np.dtype(DTYPES[kind]) for key, (kind, _) in self.expected.items()}
        sizes = [types[key].itemsize * self.expected[key][1] for key in found]
        borders = np.cumsum([self.size - sum(sizes), *sizes]).tolist()
        return {
            key: (begin, self.contents[begin:end].view(types[key]))
            for key, (begin, end) in zip(found, pairwise(borders), strict=True)
        }

    def _unreadable(self, problem: Exception) -> BadInput:
        return BadInput(f"{self.path} cannot be read ({problem}); {way_out(self.path.parent)}")


@dataclass(frozen=True)
class Part:
    """One tensor of a file, a slice of which reads it."""

    file: ShardFile
    name: str

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.file.read(self.name, part.start or 0, part.stop)


@dataclass(frozen=True)
class Split:
    """A stream of ``n_tokens`` tokens, its documents end to end; ``n_bytes`` is the UTF-8 size of their text.

    Opening one reads no file. A document begins with its end-of-text token.
    """

    name: str
    shards: tuple[Shard, ...]
    n_tokens: int
    n_bytes: int
    vocab_size: int

    @property
    def n_documents(self) -> int:
        """Number of documents, the last of a head perhaps cut short."""
        return self.documents_before(self.n_tokens)

    def documents_before(self, token: int) -> int:
        """How many documents begin before ``token``."""
        if token <= 0:
            return 0
        shard = self.shards[bisect_right(self.shards, token - 1, key=attrgetter("first")) - 1]
        return shard.first_document + int(np.searchsorted(shard.starts, token - shard.first))

    def document_starts(self, first: int, last: int) -> np.ndarray:
        """The tokens that documents first..last begin with, int64 [last - first], ascending."""
        parts = [np.zeros(0, np.int64)]
        index = bisect_right(self.shards, first, key=attrgetter("first_document")) - 1
        while first < last:
            shard = self.shards[index]
            part = shard.starts[first - shard.first_document : last - shard.first_document] + shard.first
            parts.append(part)
            first, index = first + len(part), index + 1
        return np.concatenate(parts)

    def starts(self, begin: int, end: int) -> np.ndarray:
        """Where documents begin among tokens begin..end, int64, ascending."""
        return self.document_starts(self.documents_before(begin), self.documents_before(end))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop as int64 of shape [stop - start].

        Raises IndexError outside the split, BadInput for an id that the vocabulary does not have.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(f"tokens {start}..{stop} of the {self.name} split, which has {self.n_tokens}")
        tokens = np.empty(stop - start, dtype=np.int64)
        done, index = 0, bisect_right(self.shards, start, key=attrgetter("first")) - 1
        while done < len(tokens):
            shard = self.shards[index]
            offset = start + done - shard.first
            part = shard.tokens[offset : min(stop - shard.first, shard.n_tokens)]
            if part.max(initial=0) >= self.vocab_size:
                place = int(np.flatnonzero(part >= self.vocab_size)[0])
                raise BadInput(
                    f"{shard.path} holds token {part[place]} at offset {offset + place}, but the vocabulary "
                    f"has only {self.vocab_size} entries; {way_out(shard.path.parent)}"
                )
            tokens[done : done + len(part)] = part
            done, index = done + len(part), index + 1
        return tokens

    def head(self, n_tokens: int) -> Split:
        """The first ``n_tokens`` tokens (all, if there are fewer). Its ``n_bytes`` is in proportion, not counted."""
        if n_tokens >= self.n_tokens:
            return self
        return replace(self, n_tokens=n_tokens, n_bytes=round(self.n_bytes * n_tokens / self.n_tokens))


@dataclass(frozen=True)
class Corpus:
    """An opened corpus directory. ``fingerprint`` is a hash of its contents: tokenizer and tokens of all splits."""

    directory: Path
    manifest: dict[str, Any]
    fingerprint: str
    vocab_size: int
    end_of_text: int
    sources: tuple[tuple[Source, Corpus], ...] = ()
    """Of a mixture each source and its corpus. The directory and the manifest are then those of the first: what is
    asked of them is the tokenizer, and that is the same in all."""

    @classmethod
    def open(cls, directory: Path | str, verify: bool = True) -> Corpus:
        """Open ``directory``; raises BadInput if a file is not there or not as large as the manifest says.

        What shards hold is compared with the manifest when it is read. Of corpora that were prepared before manifests
        had hashes of blocks, and of the tokenizer, every byte is compared here; ``verify=False`` leaves that out, for a
        process whose neighbour has verified the same files.
        """
        directory = Path(directory)
        file = directory / "manifest.json"
        if not file.is_file() or file.is_symlink():
            raise BadInput(f"{directory} is no corpus (it has no manifest.json); prepare one with scripts.prepare_data")
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
        except OSError as problem:
            raise BadInput(f"{file} cannot be read ({problem}); {way_out(directory)}") from problem
        except ValidationError as problem:
            raise BadInput(f"{file} is damaged ({all_errors(problem)}); {way_out(directory)}") from problem
        entries = [entry.model_dump() for entry in manifest.entries()]
        for entry in entries:
            check_file(directory, entry, verify and not entry["blocks"])
        contents = [manifest.vocab_size, manifest.end_of_text, manifest.dtype, sorted(manifest.splits)]
        fingerprint = files.hash_of([*contents, *(entry["sha256"] for entry in entries)])[:16]
        return cls(directory, manifest.model_dump(), fingerprint, manifest.vocab_size, manifest.end_of_text)

    def verify(self) -> None:
        """Compare every byte of every file with the manifest; raises BadInput for the first file that differs."""
        for entry in Manifest.model_validate(self.manifest).entries():
            check_file(self.directory, entry.model_dump(), verify=True)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this corpus, set to take all text as text."""
        file = self.directory / self.manifest["tokenizer"]["file"]
        try:
            tokenizer = plain(Tokenizer.from_file(str(file)), self.end_of_text)
        except Exception as problem:  # the library raises plain Exception
            raise BadInput(f"{file} is no tokenizer ({problem}); {way_out(self.directory)}") from problem
        if vocabulary_size(tokenizer) != self.vocab_size:
            raise BadInput(f"{file} does not have {self.vocab_size} entries; {way_out(self.directory)}")
        return tokenizer

    def bytes_per_token(self, split: Split, n_tokens: int | None = None) -> float:
        """UTF-8 bytes of text per target of ``split``, or of its first ``n_tokens``, which are decoded and counted.

        All tokens are targets but the first, the end-of-text token before the first document, which stands for no
        text. So loss in nats per token / ln 2 / this is the bits of all targets by the bytes of their text.
        """
        if n_tokens is None or n_tokens >= split.n_tokens:
            return split.n_bytes / (split.n_tokens - 1)
        return len(self.tokenizer().decode(split.read(0, n_tokens).tolist()).encode()) / (n_tokens - 1)

    def split(self, name: str) -> Split:
        """The split "train", "val" or "test", of which nothing is read yet; raises BadInput if there is none.

        Of a mixture there is no such thing: ``portions`` has its splits.
        """
        if self.sources:
            names = ", ".join(str(source.name) for source, _ in self.sources)
            raise BadInput(f"this cannot be done with a mixture ({names}) yet; take a run of one corpus")
        if name not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise BadInput(f"{self.directory} has no {name} split, only {there}; see data.{name}_fraction")
        entry, shards, first, document = self.manifest["splits"][name], list[Shard](), 0, 0
        for shard in entry["shards"]:
            file = ShardFile(self.directory, shard, self.manifest["dtype"])
            place = first, shard["tokens"], document, shard["documents"]
            shards.append(Shard(file.path, *place, Part(file, "tokens"), Part(file, "document_starts")))
            first, document = first + shard["tokens"], document + shard["documents"]
        return Split(name, tuple(shards), first, entry["bytes"], self.vocab_size)

    @property
    def split_names(self) -> list[str]:
        """The splits that there are; in a mixture those that any source has."""
        corpora = [corpus for _, corpus in self.sources] or [self]
        return sorted({name for corpus in corpora for name in corpus.manifest["splits"]})

    def portions(self, name: str) -> list[Portion]:
        """The split ``name`` of each source of a mixture, or of this corpus, whose source has no name then.

        Sources without a test split are left out of "test" if others have one. Raises BadInput as ``split`` does.
        """
        return [
            Portion(corpus, corpus.split(name), *((source.name, source.weight, source.epochs) if source else ()))
            for source, corpus in self.sources or ((None, self),)
            if name != "test" or name in corpus.manifest["splits"] or name not in self.split_names
        ]


@dataclass(frozen=True)
class Portion:
    """A split of one source: what it gives to a mixture. A corpus by itself is the only source, and has no name."""

    corpus: Corpus
    split: Split
    name: str | None = None
    weight: float = 1.0
    epochs: float | None = None


def check_file(directory: Path, entry: dict[str, Any], verify: bool) -> None:
    """Raises BadInput if a file of ``directory`` is not what its entry says, to the last byte if we ``verify``."""
    if problem := files.problem_of(directory, entry["file"], entry, verify):
        raise BadInput(f"{problem}; {way_out(directory)}")


def way_out(directory: Path) -> str:
    """What to do with a damaged corpus."""
    return f"delete {directory} and prepare it again"
