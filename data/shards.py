"""A prepared corpus, checked when it is opened and read through a memory map.

Whatever differs from the manifest is refused before it is used: names that lead elsewhere, sizes, checksums,
headers. Only JSON and safetensors are read; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

import files
from config import BadInput
from data.tokenizers import plain, vocabulary_size

LARGEST_HEADER = 65_536  # bytes; two tensors need about 150
BYTES = {"U16": 2, "U32": 4, "I64": 8}


@dataclass(frozen=True)
class Shard:
    """One verified file: its tokens are first..first + n_tokens of the split."""

    path: Path
    first: int
    n_tokens: int
    handle: Any

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop of the shard, in the shard's own dtype."""
        return self.handle.get_slice("tokens")[start:stop]


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
        for shard in self.shards:
            first, last = max(start, shard.first), min(stop, shard.first + shard.n_tokens)
            if first < last:
                tokens[first - start : last - start] = shard.read(first - shard.first, last - shard.first)
        if len(tokens) and tokens.max() >= self.vocab_size:
            at = start + int(np.argmax(tokens >= self.vocab_size))
            shard = next(shard for shard in self.shards if shard.first <= at < shard.first + shard.n_tokens)
            raise BadInput(
                f"{shard.path} holds token {tokens[at - start]} at offset {at - shard.first}, but the vocabulary has "
                f"only {self.vocab_size} entries; {way_out(shard.path.parent)}"
            )
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
        manifest = read_manifest(directory)
        try:
            names = sorted(manifest["splits"])
            shards = [shard for name in names for shard in manifest["splits"][name]["shards"]]
            entries = [manifest["tokenizer"], *shards]
            for entry in entries:
                if problem := files.problem_of(directory, entry["file"], entry, verify):
                    raise BadInput(f"{problem}; {way_out(directory)}")
            for name in names:
                check_counts(directory, name, manifest["splits"][name])
            contents = [manifest["vocab_size"], manifest["end_of_text"], manifest["dtype"], names]
            contents += [entry["sha256"] for entry in entries]
            fingerprint = files.hash_of(contents)[:16]
            vocab_size, end_of_text = int(manifest["vocab_size"]), int(manifest["end_of_text"])
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise bad_manifest(
                directory, f"is not as it was written ({type(problem).__name__}: {problem})"
            ) from problem
        if not 0 <= end_of_text < vocab_size:
            raise bad_manifest(directory, "has an end_of_text outside its vocabulary")
        return cls(directory, manifest, fingerprint, vocab_size, end_of_text)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this corpus, set to take all text as text."""
        file = self.directory / self.manifest["tokenizer"]["file"]
        try:
            tokenizer = plain(Tokenizer.from_file(str(file)))
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
        entry = self.manifest["splits"][name]
        shards, starts, first = [], [np.zeros(0, np.int64)], 0
        for shard in entry["shards"]:
            path = self.directory / shard["file"]
            check_header(path, self.manifest["dtype"], shard)
            try:
                handle = safe_open(path, framework="np")
                starts.append(handle.get_tensor("document_starts") + first)
            except (SafetensorError, OSError) as problem:
                raise BadInput(f"{path} cannot be read ({problem}); {way_out(self.directory)}") from problem
            shards.append(Shard(path, first, shard["tokens"], handle))
            first += shard["tokens"]
        document_starts = np.concatenate(starts)
        ascending = len(document_starts) and document_starts[0] == 0 and bool((np.diff(document_starts) > 0).all())
        if not ascending or document_starts[-1] >= first:
            raise BadInput(f"document_starts of {self.directory / name}-* are out of order; {way_out(self.directory)}")
        return Split(name, tuple(shards), first, entry["bytes"], document_starts, self.vocab_size)


def way_out(directory: Path) -> str:
    """What to do with a damaged corpus."""
    return f"delete {directory} and prepare it again"


def bad_manifest(directory: Path, what: str) -> BadInput:
    """The error for a manifest that cannot be followed."""
    return BadInput(f"{directory / 'manifest.json'} {what}; {way_out(directory)}")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest as it stands. Raises BadInput if there is none, or it is no JSON object."""
    file = directory / "manifest.json"
    if not file.is_file() or file.is_symlink():
        raise BadInput(f"{directory} is no corpus (it has no manifest.json); prepare one with scripts.prepare_data")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise bad_manifest(directory, f"cannot be read ({problem})") from problem
    if not isinstance(manifest, dict):
        raise bad_manifest(directory, "holds no JSON object")
    return manifest


def check_counts(directory: Path, name: str, entry: dict[str, Any]) -> None:
    """The counts of a split are whole numbers, and those of its shards add up to them."""
    for key in ("tokens", "documents"):
        counts = [shard[key] for shard in entry["shards"]]
        whole = all(type(count) is int and count >= 0 for count in [*counts, entry["bytes"]])
        if not whole or sum(counts) != entry[key]:
            raise bad_manifest(directory, f"counts {key} of {name} that do not add up")


def check_header(path: Path, dtype: str, entry: dict[str, Any]) -> None:
    """The safetensors header says what the manifest says; checked by hand, so that nothing is allocated on its word."""
    expected = {"document_starts": ("I64", [entry["documents"]]), "tokens": (dtype, [entry["tokens"]])}
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            raise BadInput(f"{path} claims a header of {length} bytes; {way_out(path.parent)}")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            found = {key: (value["dtype"], value["shape"]) for key, value in header.items()}
            spans = sorted(tuple(value["data_offsets"]) for value in header.values())
            lengths = [stop - start for start, stop in spans]
            sizes = [BYTES[kind] * math.prod(shape) for kind, shape in found.values()]
            contiguous = [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), size - 8 - length]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise BadInput(f"{path} has a damaged header ({problem}); {way_out(path.parent)}") from problem
    if found != expected or not contiguous or sorted(sizes) != sorted(lengths):
        raise BadInput(f"the header of {path} does not fit its manifest; {way_out(path.parent)}")
