"""Batches: literal windows, every window once an epoch, and nothing that depends on who asks or when."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from threading import Event, current_thread

import numpy as np
import pytest
import torch

from config import BadInput, Data
from data.loader import Batch, Batches, EvaluationBatches, Shuffled, TrainingLoader
from data.permutation import Permutation
from data.shards import Shard, Split

END = 9_999


def split_of_documents(directory: Path, lengths: list[int]) -> Split:
    """Tokens 0, 1, 2, ... with END at the beginning of each document, so that a value tells its place."""
    n = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.arange(n, dtype=np.uint16)
    tokens[starts] = END
    return Split("train", (Shard(directory / "x", 0, n, 0, len(starts), tokens, starts),), n, n, END + 1)


def stream(directory: Path, n: int) -> Split:
    return split_of_documents(directory, [n])


def loader_of(split: Split, seed: int = 0, length: int = 4, batch: int = 3, **knobs: object) -> TrainingLoader:
    return TrainingLoader(split, Data(**knobs), seed, length, batch)  # type: ignore[arg-type]


def test_windows_worked_by_hand(tmp_path: Path) -> None:
    loader = loader_of(stream(tmp_path, 23))  # (23 - 1) // 4 - 1 = 4 windows of 5 tokens, stride 4
    assert (loader.windows_per_epoch, loader.steps_per_epoch, loader.epoch_at(2)) == (4, 4 / 3, 1.5)
    for epoch in range(3):
        batches = [loader.batch(step) for step in range(4 * epoch, 4 * epoch + 4)]  # 12 samples are 3 epochs
        for batch in batches:
            assert batch.tokens_BT.shape == batch.targets_BT.shape == (3, 4)
            assert (batch.tokens_BT[:, 1:] == batch.targets_BT[:, :-1]).all()
            assert batch.positions_BT is None and batch.documents_BT is None
    samples: dict[int, list[int]] = {}
    for step in range(4):
        batch = loader.batch(step)
        for row, sample in zip(batch.targets_BT.tolist(), batch.sample_ids_B.tolist(), strict=True):
            samples[sample] = row
    assert sorted(samples) == list(range(12))
    for epoch in range(3):
        offset = samples[4 * epoch][0] - 1
        assert 0 <= offset < 4
        for window in range(4):
            begin = offset + 4 * window
            assert samples[4 * epoch + window] == [begin + 1, begin + 2, begin + 3, begin + 4]


@pytest.mark.parametrize("n", [5, 6, 8, 9, 12, 13, 14, 40, 41])
def test_every_window_once_an_epoch_and_every_offset_fits(tmp_path: Path, n: int) -> None:
    loader = loader_of(stream(tmp_path, n), batch=1)
    windows = loader.windows_per_epoch
    assert windows == max(1, (n - 1) // 4 - 1)
    offsets = set()
    for epoch in range(60):
        batches = [loader.batch(epoch * windows + index) for index in range(windows)]
        assert sorted(int(batch.sample_ids_B[0]) for batch in batches) == [epoch * windows + w for w in range(windows)]
        targets = sorted(int(token) for batch in batches for token in batch.targets_BT.flatten())
        assert targets == list(range(targets[0], targets[0] + 4 * windows)) and targets[-1] < n
        offsets.add(targets[0] - 1)
    assert offsets == set(range(min(4, n - 4 * windows)))


def test_batches_do_not_depend_on_chunks_or_on_earlier_calls(tmp_path: Path) -> None:
    split = split_of_documents(tmp_path, [7, 30, 5, 60, 19])
    for knobs in ({}, {"shuffle": "documents"}, {"isolate_documents": True}):
        forward = [loader_of(split, batch=6, **knobs).batch(step) for step in range(30)]
        loader = loader_of(split, batch=6, **knobs)
        for step in reversed(range(30)):
            whole = forward[step]
            for count in (1, 2, 3, 6):
                parts = [loader.batch(step, first, count) for first in range(0, 6, count)]
                assert np.concatenate([part.sample_ids_B for part in parts]).tolist() == whole.sample_ids_B.tolist()
                for name in ("tokens_BT", "targets_BT", "positions_BT", "documents_BT"):
                    pieces = [getattr(part, name) for part in parts]
                    expected = getattr(whole, name)
                    assert (expected is None) == (pieces[0] is None)
                    if expected is not None:
                        assert [row for piece in pieces for row in piece.tolist()] == expected.tolist()
    # A process that computes the second and third of three micro-batches of two sequences, from step 5 on.
    coming = loader.batches(range(5, 8), range(1, 3), 2, torch.device("cpu"))
    ids = []
    for _ in range(6):
        ids.append(coming.current.sample_ids_B.tolist())
        coming.advance()
    assert ids == [forward[step].sample_ids_B[first : first + 2].tolist() for step in (5, 6, 7) for first in (2, 4)]
    with pytest.raises(IndexError):
        _ = coming.current
    with pytest.raises(IndexError):
        loader.batch(0, 4, 3)
    with pytest.raises(IndexError, match="no batch left"):
        coming.current  # noqa: B018


def test_orders_are_new_in_each_epoch_and_seed(tmp_path: Path) -> None:
    split = stream(tmp_path, 1000)

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        loader = loader_of(split, seed=seed, length=2, batch=499 - 1)
        ids = loader.batch(epoch).sample_ids_B - epoch * loader.windows_per_epoch
        assert sorted(ids.tolist()) == list(range(498))
        return tuple(ids.tolist())

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(4)}
    assert len(set(orders.values())) == 12  # in particular seed 0 epoch 1 is not seed 1 epoch 0
    assert orders[1, 2] == order(1, 2)
    assert not any(values == tuple(range(498)) for values in orders.values())
    ranks = np.array(list(orders.values()), dtype=float)
    correlations = np.corrcoef(ranks)[np.triu_indices(12, 1)]
    assert abs(correlations).max() < 5 / np.sqrt(498)  # five standard errors


def test_orders_of_many_windows(tmp_path: Path) -> None:
    """Computed in chunks, an order is still that of one permutation."""
    loader = loader_of(stream(tmp_path, 9000), length=2, batch=9)
    windows = loader.windows_per_epoch
    assert windows == 4498
    ids = [int(sample) for step in range(2 * windows // 9 + 1) for sample in loader.batch(step).sample_ids_B]
    for epoch in range(2):
        expected = Permutation.draw(windows, 0, "data order", epoch)(np.arange(windows)) + epoch * windows
        assert ids[epoch * windows : (epoch + 1) * windows] == expected[: len(ids) - epoch * windows].tolist()


def test_a_batch_may_straddle_epochs(tmp_path: Path) -> None:
    loader = loader_of(stream(tmp_path, 21), batch=10)  # 4 windows an epoch
    ids = [int(i) for step in range(2) for i in loader.batch(step).sample_ids_B]
    assert [i // 4 for i in ids] == [i // 4 for i in range(20)]
    assert sorted(ids) == list(range(20))


def test_shuffled_documents_are_whole(tmp_path: Path) -> None:
    lengths = [7, 30, 5, 60, 19, 1, 2]
    split = split_of_documents(tmp_path, lengths)
    starts = split.starts(0, split.n_tokens).tolist()
    documents = [split.read(s, s + n).tolist() for s, n in zip(starts, lengths, strict=True)]
    loader = loader_of(split, batch=1, shuffle="documents")
    firsts = set()
    for epoch in range(20):
        windows = {}
        for index in range(loader.windows_per_epoch):
            batch = loader.batch(epoch * loader.windows_per_epoch + index)
            windows[int(batch.sample_ids_B[0])] = [*batch.tokens_BT[0].tolist(), int(batch.targets_BT[0, -1])]
        ordered = [windows[sample] for sample in sorted(windows)]
        tokens = ordered[0] + [token for window in ordered[1:] for token in window[1:]]
        # Cut the stream at the ends of text: all complete pieces are documents, each at most once.
        cuts = [place for place, token in enumerate(tokens) if token == END]
        pieces = [tokens[a:b] for a, b in pairwise(cuts)]
        assert all(piece in documents for piece in pieces)
        assert len(pieces) == len({tuple(piece) for piece in pieces}) >= len(documents) - 5
        firsts.add(tuple(pieces[0]))
    assert len(firsts) > 2


def test_documents_change_places_with_those_of_their_stretch(tmp_path: Path) -> None:
    """Of 3,000 documents each is whole and there once, and stays among 1,024 neighbours, others in each epoch."""
    lengths = [1 + number * number % 5 for number in range(3000)]
    split = split_of_documents(tmp_path, lengths)
    begins = split.starts(0, split.n_tokens).tolist()
    documents = [split.read(begin, begin + n) for begin, n in zip(begins, lengths, strict=True)]
    number_of = {document[-1]: number for number, document in enumerate(documents) if len(document) > 1}
    borders = set()
    for epoch in range(4):
        stream = Shuffled(split, 7, epoch)
        tokens = stream.read(0, split.n_tokens)
        places = np.flatnonzero(tokens == END)
        assert stream.starts(0, split.n_tokens).tolist() == places.tolist()
        pieces = [tuple(piece) for piece in np.split(tokens, places[1:])]
        assert sorted(pieces) == sorted(map(tuple, documents))
        came_from = np.array([number_of.get(piece[-1], -1) for piece in pieces])
        place = np.arange(3000)[came_from >= 0]
        came_from = came_from[came_from >= 0]
        moved = came_from - place
        assert abs(moved).max() < 1024 and (moved == 0).mean() < 0.02
        # No document crosses the border of a stretch: before it are those that were before it.
        highest, lowest = np.maximum.accumulate(came_from), np.minimum.accumulate(came_from[::-1])[::-1]
        inside = [int(place[i + 1]) for i in np.flatnonzero(highest[:-1] < lowest[1:])]
        borders |= {border // 64 for border in inside if 100 < border < 2900}
        for begin, end in ((0, 1), (5, 900), (1023, 1025), (2000, split.n_tokens)):
            assert stream.read(begin, end).tolist() == tokens[begin:end].tolist()
            assert stream.starts(begin, end).tolist() == places[(begin <= places) & (places < end)].tolist()
    assert len(borders) >= 6  # two or three in each epoch


def test_the_documents_of_a_head_are_cut_with_it(tmp_path: Path) -> None:
    split = split_of_documents(tmp_path, [3, 4, 5, 6]).head(9)  # E 1 2 | E 4 5 6 | E 8
    stream = Shuffled(split, 0, 0)
    pieces = np.split(stream.read(0, 9), stream.starts(1, 9))
    assert sorted(piece.tolist() for piece in pieces) == [[END, 1, 2], [END, 4, 5, 6], [END, 8]]


def test_isolation_worked_by_hand(tmp_path: Path) -> None:
    split = split_of_documents(tmp_path, [3, 4, 1, 5])  # E 1 2 | E 4 5 6 | E | E 9 10 11 12
    first = EvaluationBatches(split, 6, 2, isolate_documents=True).batch(0)
    assert first.tokens_BT.tolist() == [[END, 1, 2, END, 4, 5], [6, END, END, 9, 10, 11]]
    assert first.targets_BT.tolist() == [[1, 2, END, 4, 5, 6], [END, END, 9, 10, 11, 12]]
    assert first.documents_BT is not None and first.positions_BT is not None
    assert first.documents_BT.tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 2, 2, 2]]
    assert first.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 2, 3]]


@pytest.mark.parametrize("shuffle", ["windows", "documents"])
def test_isolation_follows_the_ends_of_text(tmp_path: Path, shuffle: str) -> None:
    split = split_of_documents(tmp_path, [7, 30, 5, 60, 19, 1, 2])
    loader = loader_of(split, length=16, batch=8, shuffle=shuffle, isolate_documents=True)
    for step in range(10):
        batch = loader.batch(step)
        assert batch.documents_BT is not None and batch.positions_BT is not None
        for tokens, documents, positions in zip(
            batch.tokens_BT.tolist(), batch.documents_BT.tolist(), batch.positions_BT.tolist(), strict=True
        ):
            number, position = 0, 0
            for place, token in enumerate(tokens):
                if token == END and place > 0:
                    number, position = number + 1, 0
                assert (documents[place], positions[place]) == (number, position)
                position += 1


@pytest.mark.parametrize("n", [2, 3, 5, 9, 10, 12, 30, 33])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_covers_every_token_but_the_first_once(tmp_path: Path, n: int, batch_size: int) -> None:
    split = stream(tmp_path, n)
    evaluation = EvaluationBatches(split, 4, batch_size)
    batches = [evaluation.batch(index) for index in range(len(evaluation))]
    assert evaluation.n_targets == n - 1
    targets = [int(token) for batch in batches for token in batch.targets_BT.flatten()]
    assert targets == list(range(1, n))
    assert all(batch.tokens_BT.shape[0] <= batch_size for batch in batches)
    assert [batch.tokens_BT.shape[1] for batch in batches][:-1] == [4] * (len(batches) - 1)
    shared = [evaluation.batch(index) for index in reversed(range(len(evaluation)))]  # any rank may take any batch
    assert sorted(int(i) for batch in shared for i in batch.sample_ids_B) == list(range(-(-(n - 1) // 4)))


def test_evaluation_of_a_part(tmp_path: Path) -> None:
    batches = EvaluationBatches(stream(tmp_path, 100), 4, 3, max_tokens=10)
    targets = [batches.batch(index).targets_BT.tolist() for index in range(len(batches))]
    assert targets == [[[1, 2, 3, 4], [5, 6, 7, 8]], [[9]]] and batches.n_targets == 9
    with pytest.raises(IndexError):
        batches.batch(2)
    with pytest.raises(BadInput, match="two are needed"):
        EvaluationBatches(stream(tmp_path, 1), 4, 3)


@pytest.mark.fault(31)
def test_too_little_text_is_refused_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"has 4 tokens, fewer than the 5 .*lower model.context_length"):
        loader_of(stream(tmp_path, 4))
    with pytest.raises(BadInput, match=r"data.train_tokens is 3"):
        loader_of(stream(tmp_path, 40), train_tokens=3)


def test_train_tokens_limits_what_is_seen(tmp_path: Path) -> None:
    split = split_of_documents(tmp_path, [10, 10, 80])
    for shuffle in ("windows", "documents"):
        loader = loader_of(split, train_tokens=25, shuffle=shuffle)
        assert loader.windows_per_epoch == 5
        seen = {int(token) for step in range(50) for token in loader.batch(step).targets_BT.flatten()} - {END}
        assert seen <= set(range(25))
        if shuffle == "windows":  # offsets 0..3 and 20 targets: 1..23, of which 10 and 20 are END
            assert seen == set(range(1, 24)) - {10, 20}


def test_the_next_batch_is_read_while_this_one_is_trained_on(tmp_path: Path) -> None:
    """By a thread: the second is not waited for before the first is used. What reading raises is raised in its turn."""
    loader, begun, may_read = loader_of(stream(tmp_path, 23)), Event(), Event()

    def slow_disk() -> Iterator[Batch]:
        yield loader.batch(0)
        begun.set()
        assert may_read.wait(10) and current_thread().name.startswith("batches")
        yield loader.batch(1)
        raise BadInput("token 99 is not in the vocabulary")

    batches = Batches(slow_disk(), torch.device("cpu"))
    assert begun.wait(10)  # nobody has asked for it
    assert torch.equal(batches.current.tokens_BT, loader.batch(0).tokens_BT)
    may_read.set()
    batches.advance()
    assert torch.equal(batches.current.tokens_BT, loader.batch(1).tokens_BT)
    with pytest.raises(BadInput, match="token 99"):
        batches.advance()
    assert torch.equal(batches.current.tokens_BT, loader.batch(1).tokens_BT)


def test_after_the_last_batch_there_is_none(tmp_path: Path) -> None:
    batches = loader_of(stream(tmp_path, 23)).batches(range(1), range(1), 3, torch.device("cpu"))
    batches.advance()
    with pytest.raises(IndexError, match="no batch left"):
        _ = batches.current
