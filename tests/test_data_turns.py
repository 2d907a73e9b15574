"""Whose turn it is in a mixture: all shares within one window at every place, each source's samples without a gap."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations_with_replacement, product

import numpy as np
import pytest

from data.turns import PERIOD, Turns, order_of, whole_shares


def test_worked_by_hand() -> None:
    """0.6, 0.3, 0.1: the windows of the first must have come by 2, 4, 5, 7, 9, 10, of the second by 4, 7, 10.

    Neither may run ahead: the third of the first not before 4, when its share is 2.4; the second of the second not
    before 4, either (1.2). At a tie the one named first comes first.
    """
    turns = Turns([0.6, 0.3, 0.1], [None] * 3)
    assert [turns(place) for place in range(12)] == [
        *[(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (0, 3), (0, 4), (1, 2), (0, 5), (2, 0)],
        *[(0, 6), (0, 7)],
    ]


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5])
def test_all_shares_within_one_window_at_every_place_exhaustively(sources: int) -> None:
    """Every mixture of so many sources with whole weights up to 7."""
    for weights in combinations_with_replacement(range(1, 8 if sources < 5 else 5), sources):
        for shares in {weights, weights[::-1]}:
            order = order_of(shares)
            given = (order[:, None] == np.arange(sources)).cumsum(0)
            due = np.outer(np.arange(1, len(order) + 1), shares)  # times the period
            assert (abs(given * len(order) - due) < len(order)).all()
            assert given[-1].tolist() == list(shares)


@pytest.mark.parametrize(
    "weights", [[0.6, 0.3, 0.1], [1, 1, 1], [0.3333, 0.6667], [0.123456789, 3.3, 0.77], [1e-4, 1], [2.5]]
)
def test_any_weights_over_long_runs(weights: list[float]) -> None:
    """Beyond several periods, too; where shares were rounded they are within 1 / PERIOD of what was asked for."""
    shares = whole_shares(weights)
    period, turns = sum(shares), Turns(weights, [None] * len(weights))
    assert period <= PERIOD
    for share, weight in zip(shares, weights, strict=True):
        assert abs(Fraction(share, period) - Fraction(weight) / sum(map(Fraction, weights))) < Fraction(1, PERIOD)
    places = sorted({*range(300), *range(period - 1, period + 3), *range(10 * period - 3, 10 * period + 3), 10**12})
    for place in places:
        given = turns.given_before(place).tolist()
        assert sum(given) == place
        for count, share in zip(given, shares, strict=True):
            assert abs(count - Fraction(place * share, period)) < 1
        source, number = turns(place)
        assert number == given[source]  # the next of its own, without a gap
        given[source] += 1
        assert turns.given_before(place + 1).tolist() == given


def test_exact_where_it_can_be() -> None:
    assert whole_shares([0.6, 0.3, 0.1]) == [6, 3, 1]
    assert whole_shares([3, 1.5]) == [2, 1]
    assert whole_shares([0.1, 0.2, 0.00001]) == [10000, 20000, 1]
    assert sum(whole_shares([0.123456789, 1.1, 7.7])) == PERIOD


@pytest.mark.parametrize("limits", [*product([1, 3, 8, None], repeat=3)])
def test_a_source_that_is_used_up_is_left_out(limits: tuple[int | None, ...]) -> None:
    """Each gives its own samples in order, none more than its limit; who is left keeps the shares among themselves."""
    weights = [0.5, 0.3, 0.2]
    turns = Turns(weights, limits)
    length = turns.length
    assert length == (None if None in limits else sum(limit or 0 for limit in limits))
    given, begin, left = [0, 0, 0], [0, 0, 0], {0, 1, 2}
    started = 0
    for place in range(length or 60):
        assert turns.given_before(place).tolist() == given
        source, number = turns(place)
        assert source in left and number == given[source]
        given[source] += 1
        share_of_all = sum(weights[one] for one in left)
        for one in left:
            due = (place + 1 - started) * weights[one] / share_of_all
            assert abs(given[one] - begin[one] - due) < 1 + 1e-9
        if given[source] == limits[source]:
            left.discard(source)
            begin, started = list(given), place + 1
    if length is not None:
        assert tuple(given) == limits
        assert {turns(length + place) for place in range(10)} == {
            *((0, given[0] + more) for more in range(5)),
            *((1, given[1] + more) for more in range(3)),
            *((2, given[2] + more) for more in range(2)),
        }  # the end of the last step is filled as if there were no limits
