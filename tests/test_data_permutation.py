"""An order that is computed: every number once, undone by its inverse, and not to be told from a random one."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import chisquare

from data.permutation import Permutation

LEAST = 1e-4  # how rare chance may make it; seeds are fixed, so the tests always give the same


def test_each_number_comes_once() -> None:
    for n in range(1, 400):
        for seed in range(3):
            order = Permutation.draw(n, seed, "test", n)
            things = order(np.arange(n))
            assert sorted(things.tolist()) == list(range(n))
            assert order.places_of(things).tolist() == list(range(n))
            assert things[n // 2] == order(np.array([n // 2]))[0]


@pytest.mark.parametrize("n", [10**6, 10**9, 10**9 + 7, 2**31, 2**32 + 1, 3 * 10**12 + 1, 2**62])
def test_large_orders_are_undone_by_their_inverse(n: int) -> None:
    """Different places have different things, then, as each thing leads back to its place."""
    order = Permutation.draw(n, 5, "test")
    places = np.random.default_rng(0).integers(n, size=10_000)
    places = np.concatenate([np.arange(1000), np.arange(n - 1000, n), places])
    things = order(places)
    assert things.min() >= 0 and things.max() < n and not (things == places).all()
    assert order.places_of(things).tolist() == places.tolist()
    assert len(np.unique(things)) == len(np.unique(places))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_all_orders_of_a_few_are_as_likely(n: int) -> None:
    counts = dict.fromkeys(permutations(range(n)), 0)
    for epoch in range(1500):
        counts[tuple(Permutation.draw(n, 0, "test", epoch)(np.arange(n)).tolist())] += 1
    assert chisquare(list(counts.values())).pvalue > LEAST


def in_classes(numbers: list[int], size: int) -> float:
    """The p-value of "these are drawn evenly from 0..size", by up to 12 classes of almost equal size."""
    classes = min(size, 12)
    found = np.bincount([number * classes // size for number in numbers], minlength=classes)
    borders = [-(-number * size // classes) for number in range(classes + 1)]
    return float(chisquare(found, np.diff(borders) / size * len(numbers)).pvalue)


@pytest.mark.parametrize("n", [7, 12, 100, 1_000_003])
def test_what_comes_first_and_what_follows_is_uniform(n: int) -> None:
    pairs = [Permutation.draw(n, 1, "test", epoch)(np.arange(2)).tolist() for epoch in range(1200)]
    assert in_classes([first for first, _ in pairs], n) > LEAST
    assert in_classes([(second - first) % n - 1 for first, second in pairs], n - 1) > LEAST


def test_within_one_order_neighbours_have_nothing_in_common() -> None:
    n = 200_000
    things = Permutation.draw(n, 2, "test")(np.arange(n))
    for lag in (1, 2, 447, 448):  # 448 is the side of the network
        steps = (things[lag:] - things[:-lag]) % n
        assert chisquare(np.bincount(steps * 50 // n, minlength=50)).pvalue > LEAST
    # Where a tenth of the epoch comes from, and by how much order and place go together (5 standard errors).
    assert chisquare(np.bincount(things[: n // 10] * 50 // n, minlength=50)).pvalue > LEAST
    assert abs(np.corrcoef(things, np.arange(n))[0, 1]) < 5 / np.sqrt(n)


def test_seeds_purposes_and_epochs_have_orders_of_their_own() -> None:
    keys = [(seed, purpose, epoch) for seed in range(3) for purpose in "ab" for epoch in range(3)]
    orders = [Permutation.draw(5000, *key)(np.arange(5000)) for key in keys]
    ranks = np.corrcoef(np.array(orders, dtype=float))[np.triu_indices(len(keys), 1)]
    assert abs(ranks).max() < 5 / np.sqrt(5000)
    assert max((one == other).sum() for i, one in enumerate(orders) for other in orders[:i]) < 12  # 1 is expected


def test_numbers_worked_out_in_plain_python() -> None:
    """The same by integers that never overflow, for squares and for what is sent through twice."""

    def mixed(number: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            number = (number ^ (number >> shift)) * factor % 2**64
        return number ^ (number >> 31)

    keys = [2**64 - 1 - 3**number for number in range(8)]
    for n, side in ((82, 10), (10_000, 100), (10**12 - 10**6, 10**6)):
        numbers, expected = range(0, min(n, 1000), 7), []
        for number in numbers:
            left, right = divmod(number, side)
            while True:
                for key in keys:
                    left, right = right, (left + mixed((right + key) % 2**64) % side) % side
                if left * side + right < n:
                    break
            expected.append(left * side + right)
        order = Permutation(n, np.array(keys, dtype=np.uint64))
        assert order(np.array(numbers)).tolist() == expected


def test_a_literal_order() -> None:
    """Runs go on with the order that they began with, on every platform and in later versions."""
    assert Permutation.draw(10, 0, "data order", 0)(np.arange(10)).tolist() == [8, 0, 1, 9, 5, 7, 6, 4, 2, 3]
