"""A prepared corpus, checked when it is opened and read through a memory map.

Whatever differs from the manifest is refused before it is used: names that lead elsewhere, sizes, checksums,
headers. Only JSON and safetensors are read; nothing is ever unpickled.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import files
from config import BadInput, all_errors
from data.tokenizers import plain, vocabulary_size

Count = Annotated[int, Field(ge=0)]


class FileEntry(BaseModel, strict=True):
    """What the manifest says of a file; a shard has tokens and documents."""

    file: Any  # files.problem_of refuses what is not the name of a plain file
    size: Count
    sha256: str
    tokens: Count = 0
    documents: Count = 0


class SplitEntry(BaseModel, strict=True):
    """What the manifest says of a split."""

    bytes: Count
    tokens: Count
    documents: Count
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
        for name, split in self.splits.items():
            sums = [sum(shard.tokens for shard in split.shards), sum(shard.documents for shard in split.shards)]
            if sums != [split.tokens, split.documents]:
                raise ValueError(f"the counts of the shards of {name} do not add up to those of the split")
        if self.end_of_text >= self.vocab_size:
            raise ValueError("end_of_text is outside the vocabulary")
        return self


@dataclass(frozen=True)
class Shard:
    """One verified file: its ``tokens``, a slice of which reads them, are first..first + n_tokens of the split."""

    path: Path
    first: int
    n_tokens: int
    tokens: Any


@dataclass(frozen=True)
class Split:
    """A stream of ``n_tokens`` tokens. ``document_starts`` (int64, ascending, the first is 0) points at the
    end-of-text token that each document begins with. ``n_bytes`` is the UTF-8 size of the text."""

    name: str
    shards: tuple[Shard, ...]
    n_tokens: int
    n_bytes: int
    document_starts: np.ndarray
    vocab_size: int

    @property
    def n_documents(self) -> int:
        """Number of documents, the last of a head perhaps cut short."""
        return len(self.document_starts)

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
            if (unknown := np.flatnonzero(part >= self.vocab_size)).size:
                raise BadInput(
                    f"{shard.path} holds token {part[unknown[0]]} at offset {offset + unknown[0]}, but the vocabulary "
                    f"has only {self.vocab_size} entries; {way_out(shard.path.parent)}"
                )
            tokens[done : done + len(part)] = part
            done, index = done + len(part), index + 1
        return tokens

    def head(self, n_tokens: int) -> Split:
        """The first ``n_tokens`` tokens (all, if there are fewer). Its ``n_bytes`` is in proportion, not counted."""
        if n_tokens >= self.n_tokens:
            return self
        starts = self.document_starts[: int(np.searchsorted(self.document_starts, n_tokens))]
        n_bytes = round(self.n_bytes * n_tokens / self.n_tokens)
        return replace(self, n_tokens=n_tokens, n_bytes=n_bytes, document_starts=starts)


@dataclass(frozen=True)
class Corpus:
    """An opened corpus directory. ``fingerprint`` is a hash of its contents: tokenizer and tokens of all splits."""

    directory: Path
    manifest: dict[str, Any]
    fingerprint: str
    vocab_size: int
    end_of_text: int

    @classmethod
    def open(cls, directory: Path | str, verify: bool = True) -> Corpus:
        """Open ``directory`` and check all of its files against the manifest; raises BadInput if one differs.

        ``verify=False`` leaves out the checksums, which read every byte, for a process whose neighbour has
        verified the same files.
        """
        directory = Path(directory)
        file = directory / "manifest.json"
        if not file.is_file() or file.is_symlink():
            raise BadInput(f"{directory} is no corpus (it has no manifest.json); prepare one with scripts.prepare_data")
        try:
            manifest = Manifest.model_validate_json(file.read_bytes()).model_dump()
        except OSError as problem:
            raise BadInput(f"{file} cannot be read ({problem}); {way_out(directory)}") from problem
        except ValidationError as problem:
            raise BadInput(f"{file} is damaged ({all_errors(problem)}); {way_out(directory)}") from problem
        names = sorted(manifest["splits"])
        entries = [manifest["tokenizer"], *(shard for name in names for shard in manifest["splits"][name]["shards"])]
        for entry in entries:
            if problem_of_file := files.problem_of(directory, entry["file"], entry, verify):
                raise BadInput(f"{problem_of_file}; {way_out(directory)}")
        contents = [manifest[key] for key in ("vocab_size", "end_of_text", "dtype")]
        fingerprint = files.hash_of([*contents, names, *(entry["sha256"] for entry in entries)])[:16]
        return cls(directory, manifest, fingerprint, manifest["vocab_size"], manifest["end_of_text"])

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
        """The split "train", "val" or "test"; raises BadInput if there is none, or if its index is damaged."""
        if name not in self.manifest["splits"]:
            there = ", ".join(self.manifest["splits"])
            raise BadInput(f"{self.directory} has no {name} split, only {there}; see data.{name}_fraction")
        entry, dtype = self.manifest["splits"][name], self.manifest["dtype"]
        shards, starts, first = [], [np.zeros(0, np.int64)], 0
        for shard in entry["shards"]:
            path = self.directory / shard["file"]
            expected = {"document_starts": ["I64", shard["documents"]], "tokens": [dtype, shard["tokens"]]}
            try:
                handle: Any = safe_open(path, framework="np")  # checks the file's header and allocates nothing
                tensors = {key: handle.get_slice(key) for key in handle.offset_keys()}
                if {key: [tensor.get_dtype(), *tensor.get_shape()] for key, tensor in tensors.items()} != expected:
                    raise BadInput(f"the header of {path} does not fit its manifest; {way_out(self.directory)}")
                starts.append(handle.get_tensor("document_starts") + first)
            except (SafetensorError, OSError) as problem:
                raise BadInput(f"{path} cannot be read ({problem}); {way_out(self.directory)}") from problem
            shards.append(Shard(path, first, shard["tokens"], tensors["tokens"]))
            first += shard["tokens"]
        document_starts = np.concatenate(starts)
        ascending = len(document_starts) and document_starts[0] == 0 and bool((np.diff(document_starts) > 0).all())
        if not ascending or document_starts[-1] >= first:
            raise BadInput(f"document_starts of {self.directory / name}-* are out of order; {way_out(self.directory)}")
        return Split(name, tuple(shards), first, entry["bytes"], document_starts, self.vocab_size)


def way_out(directory: Path) -> str:
    """What to do with a damaged corpus."""
    return f"delete {directory} and prepare it again"
