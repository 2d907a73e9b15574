"""From a stream of tokens to the batches of a run.

A split is one long stream of tokens, its documents end to end. Training reads it through windows of T + 1 tokens,
T being the context length: the first T are the input, the last T the targets. Neighbouring windows share one token,
so each token inside the windowed stretch is a target exactly once an epoch:

    stream    a b c d e f g h i j k
    offset 1    [b c d e]                 T = 3: window 0 predicts c d e from b c d,
                      [e f g h]                  window 1 predicts f g h from e f g

Every epoch e draws an offset below T, so that the cuts fall elsewhere each time, and a permutation of its windows,
both from (seed, purpose, e). The permutation is computed, not stored (see permutation.py), so memory does not grow with
the corpus. All epochs have the same number of windows, one less than would fit without an offset.

With data.shuffle=documents the documents change places first, and the stream is theirs. They do so in stretches of
1,024 neighbours, each put in an order of its own; where the stretches begin is drawn for each epoch, so that in the
long run a document goes far. What stands far apart is mixed by the permutation of the windows, which goes over the
whole corpus. (A single order of all documents would need the lengths of all that come before a position to find what
is there; here its stretch is enough, and memory does not grow with the corpus.)

Thus there is an endless list of samples: sample i is window order_e[i mod W] of epoch e = i div W. Sequence k of
step s is sample s * global_batch_size + k. This is arithmetic, not state: there is nothing to save, a resumed run
asks for step s and gets it, and a process that is given sequences first..first + count of a step gets just these,
whatever the other processes do. A batch may straddle two epochs.

Evaluation needs no chance: windows without overlap from the first token to the last, each token but the first a
target exactly once, whatever the batch size.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from config import BadInput, Data
from data.permutation import Permutation, mix
from data.shards import Portion, Split
from data.turns import Turns
from hardware import moved
from randomness import numpy_generator

DATA_ORDER = 2  # raise it when the same config would see other samples; runs that began with another are refused
STRETCH = 1024  # documents that change places with each other
CHUNK = 1024  # windows whose order is computed together


@dataclass(frozen=True)
class Batch:
    """Sequences for the model.

    tokens_BT, targets_BT: int64. positions_BT, documents_BT: int64, or None unless documents are isolated: the
    position in the document (as far as the window shows it) and the number of the document in the window, both
    from 0. sample_ids_B: int64 NumPy, epoch * windows_per_epoch + number of the window in the epoch's stream.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor | None
    documents_BT: torch.Tensor | None
    sample_ids_B: np.ndarray

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: moved(value, device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def padded(self, rows: int, time: int) -> Batch:
        """The same batch with zeros behind each sequence, and below them all, up to ``rows`` sequences of ``time``.

        What a model that sees no future predicts at the places that were there before is not changed by these.
        """
        missing = (0, time - self.tokens_BT.shape[1], 0, rows - len(self.tokens_BT))
        filled = {
            name: torch.nn.functional.pad(value, missing)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **filled)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stretch:
    """Neighbouring documents in another order: where each begins now, where the last ends, and by how much each moved.

    begins, moved: int64 [documents]; the tokens of document i are begins[i] + moved[i] and so on of the split.
    """

    begins: np.ndarray
    end: int
    moved: np.ndarray


class Shuffled:
    """A split whose documents have changed places with others of their stretch, in the way of one epoch."""

    def __init__(self, split: Split, seed: int, epoch: int) -> None:
        self.split, self.seed, self.epoch = split, seed, epoch
        self.n_documents = split.n_documents
        # The first stretch is shorter; where one is enough it holds all documents.
        borders = numpy_generator(seed, "document stretches", epoch)
        self.missing = int(borders.integers(STRETCH)) if self.n_documents > STRETCH else 0
        self._stretch = lru_cache(maxsize=512)(self._draw_stretch)  # 8 MB at most

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin..end of the new stream, int64."""
        parts = []
        while begin < end:
            stretch = self._stretch_at(begin)
            index = int(np.searchsorted(stretch.begins, begin, side="right")) - 1
            while begin < min(end, stretch.end):
                ends = stretch.begins[index + 1] if index + 1 < len(stretch.begins) else stretch.end
                stop, moved = min(int(ends), end), int(stretch.moved[index])
                parts.append(self.split.read(begin + moved, stop + moved))
                begin, index = stop, index + 1
        return np.concatenate(parts)

    def starts(self, begin: int, end: int) -> np.ndarray:
        """Where documents begin among tokens begin..end of the new stream, int64, ascending."""
        parts = [np.zeros(0, np.int64)]
        while begin < end:
            stretch = self._stretch_at(begin)
            parts.append(stretch.begins[slice(*np.searchsorted(stretch.begins, (begin, end)))])
            begin = stretch.end
        return np.concatenate(parts)

    def _stretch_at(self, token: int) -> Stretch:
        """The one with ``token``, in the old stream as in the new: no document leaves its stretch."""
        return self._stretch((self.split.documents_before(token + 1) - 1 + self.missing) // STRETCH)

    def _draw_stretch(self, number: int) -> Stretch:
        first, last = (min(max(0, (number + i) * STRETCH - self.missing), self.n_documents) for i in range(2))
        borders = self.split.document_starts(first, min(last + 1, self.n_documents))
        if last == self.n_documents:
            borders = np.append(borders, self.split.n_tokens)
        order = numpy_generator(self.seed, "document order", self.epoch, number).permutation(last - first)
        ends = borders[0] + np.cumsum(np.diff(borders)[order])
        begins = np.concatenate((borders[:1], ends[:-1]))
        return Stretch(begins, int(borders[-1]), borders[order] - begins)


@dataclass(frozen=True)
class Epoch:
    """One pass: where its windows begin, in which order they come, and the stream of which they are windows."""

    offset: int
    order: Permutation  # of windows_per_epoch
    stream: Split | Shuffled


class Samples:
    """The endless samples of one training split, as the essay above tells. Holds no state but small caches.

    Raises BadInput if the split (its first data.train_tokens tokens, if that is set) is shorter than one window.
    """

    def __init__(self, split: Split, config: Data, seed: int, context_length: int) -> None:
        self.split = split.head(config.train_tokens or split.n_tokens)
        self.shuffle_documents = config.shuffle == "documents"
        self.seed = seed
        self.context_length = context_length
        n = self.split.n_tokens
        if n < context_length + 1:
            limit = f"; data.train_tokens is {config.train_tokens}" if config.train_tokens else ""
            raise BadInput(
                f"the {split.name} split has {n} tokens, fewer than the {context_length + 1} of one window "
                f"(model.context_length + 1){limit}: give more text, or lower model.context_length"
            )
        self.windows_per_epoch = max(1, (n - 1) // context_length - 1)
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._windows = lru_cache(maxsize=4)(self._order_windows)

    def sample(self, number: int) -> tuple[Split | Shuffled, int, int]:
        """Sample ``number``: the stream, where its window begins there, and its id."""
        epoch_number, index = divmod(number, self.windows_per_epoch)
        epoch = self._epoch(epoch_number)
        window = int(self._windows(epoch_number, index // CHUNK)[index % CHUNK])
        return epoch.stream, epoch.offset + window * self.context_length, epoch_number * self.windows_per_epoch + window

    def _draw_epoch(self, number: int) -> Epoch:
        split = self.split
        slack = split.n_tokens - 1 - self.windows_per_epoch * self.context_length
        offsets = min(self.context_length, slack + 1)
        offset = int(numpy_generator(self.seed, "data offset", number).integers(offsets))
        order = Permutation.draw(self.windows_per_epoch, self.seed, "data order", number)
        return Epoch(offset, order, Shuffled(split, self.seed, number) if self.shuffle_documents else split)

    def _order_windows(self, epoch_number: int, chunk: int) -> np.ndarray:
        """A CHUNK of an epoch's order: many windows at once cost little more than one."""
        places = np.arange(chunk * CHUNK, min((chunk + 1) * CHUNK, self.windows_per_epoch))
        return self._epoch(epoch_number).order(places)


class TrainingLoader:
    """The batches of a training split, or of the portions of a mixture, whose samples are interleaved.

    In a mixture sample i is the next of the source whose turn it is (see turns.py), and has the id
    id of the source's own sample * number of sources + number of the source. An epoch is as many windows as all sources
    have together. ``splits`` are the parts of the splits that are trained on, ``n_tokens`` is how many tokens they are.

    Raises BadInput if a split (its first data.train_tokens tokens, if that is set) is shorter than one window.
    """

    def __init__(
        self, text: Split | Sequence[Portion], config: Data, seed: int, context_length: int, global_batch_size: int
    ) -> None:
        splits = [text] if isinstance(text, Split) else [portion.split for portion in text]
        self.sources = [Samples(split, config, seed, context_length) for split in splits]
        self.isolate_documents = config.isolate_documents
        self.context_length = context_length
        self.global_batch_size = global_batch_size
        self.splits = [samples.split for samples in self.sources]
        self.n_tokens = sum(split.n_tokens for split in self.splits)
        self.windows_per_epoch = sum(samples.windows_per_epoch for samples in self.sources)
        self.steps_per_epoch = self.windows_per_epoch / global_batch_size
        shares = [(1.0, None)] if isinstance(text, Split) else [(portion.weight, portion.epochs) for portion in text]
        limits = [
            None if epochs is None else max(1, round(epochs * samples.windows_per_epoch))
            for samples, (_, epochs) in zip(self.sources, shares, strict=True)
        ]
        self.turns = Turns([weight for weight, _ in shares], limits)

    def windows_read(self, steps: int) -> list[int]:
        """How many windows of each source are read in so many steps."""
        given: list[int] = self.turns.given_before(steps * self.global_batch_size).tolist()
        return given

    def epoch_at(self, step: int) -> float:
        """Passes over the data that are complete before ``step``."""
        return step / self.steps_per_epoch

    def batch(self, step: int, first: int = 0, count: int | None = None) -> Batch:
        """Sequences first..first + count of the global batch of ``step`` (all of them by default).

        Raises IndexError for sequences that the step does not have, BadInput for a token outside the vocabulary.
        """
        count = self.global_batch_size - first if count is None else count
        if step < 0 or first < 0 or count < 1 or first + count > self.global_batch_size:
            raise IndexError(f"sequences {first}..{first + count} of step {step}: a step has {self.global_batch_size}")
        windows, ids = [], []
        for sample in range(step * self.global_batch_size + first, step * self.global_batch_size + first + count):
            source, number = self.turns(sample)
            stream, begin, own_id = self.sources[source].sample(number)
            windows.append((stream, begin))
            ids.append(own_id * len(self.sources) + source)
        return make_batch(windows, self.context_length, ids, self.isolate_documents)

    def batches(self, steps: Sequence[int], micro_batches: Iterable[int], size: int, device: torch.device) -> Batches:
        """Of one step after the other these micro-batches, of ``size`` sequences each, on ``device``.

        Raises BadInput if all sources are used up before the last of the steps.
        """
        last, length = steps[-1] if steps else 0, self.turns.length
        if length is not None and last * self.global_batch_size >= length:
            raise BadInput(
                f"the run is to have {last + 1:,} steps, and after {-(-length // self.global_batch_size):,} all "
                "data.sources are read as often as their epochs say; make it shorter, or leave epochs out of one"
            )
        return Batches((self.batch(step, index * size, size) for step in steps for index in micro_batches), device)


class Batches:
    """Batches in their order, on ``device``: ``current`` is the next to be trained on; a thread reads the one after it.

    So a slow disk is waited for while the machine computes.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._rest, self._device = batches, device
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._read_ahead()
        self.advance()

    @property
    def current(self) -> Batch:
        """The next batch; raises IndexError after the last."""
        if self._current is None:
            raise IndexError("there is no batch left")
        return self._current

    def advance(self) -> None:
        """Take the next batch; raises what reading it raised."""
        batch = self._coming.result()
        self._current = None if batch is None else batch.to(self._device)
        self._read_ahead()

    def _read_ahead(self) -> None:
        self._coming = self._reader.submit(next, self._rest, None)


class EvaluationBatches:
    """The batches of ``split`` (its first ``max_tokens`` tokens): each token but the first is a target once.

    The last, shorter window is a batch of its own. Raises BadInput for fewer than two tokens.
    """

    def __init__(
        self,
        split: Split,
        context_length: int,
        batch_size: int,
        max_tokens: int | None = None,
        isolate_documents: bool = False,
    ) -> None:
        self.split = split.head(max_tokens or split.n_tokens)
        if self.split.n_tokens < 2:
            raise BadInput(f"the {split.name} split has {self.split.n_tokens} tokens, two are needed; give more text")
        self.context_length, self.batch_size = context_length, batch_size
        self.isolate_documents = isolate_documents
        self.n_targets = self.split.n_tokens - 1
        self.full_windows, self.rest = divmod(self.n_targets, context_length)

    def __len__(self) -> int:
        return -(-self.full_windows // self.batch_size) + (self.rest > 0)

    def batch(self, index: int) -> Batch:
        """Batch number ``index``; only the last can have fewer sequences, or one shorter sequence.

        Raises IndexError for a batch that there is not, BadInput for a token outside the vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        first = index * self.batch_size
        ids, length = list(range(first, min(first + self.batch_size, self.full_windows))), self.context_length
        if not ids:
            ids, length = [self.full_windows], self.rest
        windows = [(self.split, window * self.context_length) for window in ids]
        return make_batch(windows, length, ids, self.isolate_documents)


def fingerprint(first_sample: int, sample_ids_B: np.ndarray) -> int:
    """A number below 2^62 for "the run's samples first_sample, first_sample + 1, ... were these".

    The sum of the numbers of all parts stands for all samples of a run, however they were shared out into
    micro-batches and processes.
    """
    position = np.arange(first_sample, first_sample + len(sample_ids_B), dtype=np.uint64)
    mixed = mix(
        position * np.uint64(0x9E3779B97F4A7C15) + sample_ids_B.astype(np.uint64) * np.uint64(0xD1342543DE82EF95)
    )
    return int(sum(mixed.tolist()) % 2**62)


def make_batch(
    windows: Sequence[tuple[Split | Shuffled, int]], length: int, ids: list[int], isolate_documents: bool
) -> Batch:
    """A Batch of sequences of ``length`` tokens: for each the stream, where its window begins, and its sample id."""
    window_BT = np.stack([stream.read(begin, begin + length + 1) for stream, begin in windows])
    positions_BT = documents_BT = None
    if isolate_documents:
        is_start_BT = np.zeros((len(windows), length), dtype=np.int64)
        for row, (stream, begin) in zip(is_start_BT, windows, strict=True):
            # The first document shown is number 0, whether it begins here or was cut.
            row[stream.starts(begin + 1, begin + length) - begin] = 1
        index_T = np.arange(length)
        positions_BT = torch.from_numpy(index_T - np.maximum.accumulate(is_start_BT * index_T, axis=1))
        documents_BT = torch.from_numpy(np.cumsum(is_start_BT, axis=1))
    # Copied by NumPy: torch would start threads of its own for the thread that reads ahead.
    tokens_BT, targets_BT = (torch.from_numpy(part.copy()) for part in (window_BT[:, :-1], window_BT[:, 1:]))
    return Batch(tokens_BT, targets_BT, positions_BT, documents_BT, np.array(ids, dtype=np.int64))
