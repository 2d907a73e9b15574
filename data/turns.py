"""Which source each window of a mixture comes from: whose turn it is.

Let the sources have shares p_k of all windows. Among the first n windows, source k should have n·p_k, and it always has
n·p_k rounded down or up. For that its j-th window (from 1) may not come before the first n with n·p_k > j − 1, and must
have come at the first n with n·p_k ≥ j. Of all sources that may have a window, the next one is that of the source whose
window must come first ("earliest deadline first", which meets all deadlines if anything does; that it can be done is
the theorem of Balinski and Young on quotas, 1975, and of Baruah and others on fair schedules, 1996).

The shares are whole numbers over a common denominator. After so many windows all counts are exact and the turns
repeat: what is stored is one period, and any place of the endless sequence is found by a division.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm

import numpy as np

PERIOD = 100_000  # windows after which turns repeat, at most; finer shares are rounded to 1 / this


class Turns:
    """Of the sources of a mixture, whose turn it is at each place of the endless sequence of samples.

    Args:
        weights: of each source; its share is this over the sum of all.
        limits: how many windows each may give; None for one without a limit.

    A source that has given all it may is left out, and the others share its weight. ``length`` is how many windows
    there are until all are used up (None: no end); from there on it is as if there were no limits.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]) -> None:
        self.length = None if None in limits else sum(limit or 0 for limit in limits)
        self._phases: list[Phase] = []
        begin, given = 0, np.zeros(len(weights), np.int64)
        left = list(range(len(weights)))
        while left:
            phase = Phase(begin, given, left, [weights[source] for source in left])
            self._phases.append(phase)
            ends = [(phase.place_of(source, limit), source) for source in left if (limit := limits[source]) is not None]
            if not ends:
                return
            last, used_up = min(ends)
            begin, given = last + 1, phase.given_before(last + 1)
            left = [source for source in left if source != used_up]
        self._phases.append(Phase(begin, given, list(range(len(weights))), weights))

    def __call__(self, place: int) -> tuple[int, int]:
        """The source of the sample at ``place``, and which of its own samples it is, from 0."""
        return self._phase_at(place).turn(place)

    def given_before(self, place: int) -> np.ndarray:
        """How many samples each source has given before ``place``, int64 [sources]."""
        return self._phase_at(place).given_before(place)

    def _phase_at(self, place: int) -> Phase:
        return next(phase for phase in reversed(self._phases) if phase.begin <= place)


class Phase:
    """Turns of the sources ``left`` from the place ``begin`` on, before which ``given`` samples came from each."""

    def __init__(self, begin: int, given: np.ndarray, left: list[int], weights: Sequence[float]) -> None:
        self.begin, self.given, self.left = begin, given, left
        self.shares = whole_shares(weights)
        self.order = order_of(self.shares)
        self.places = [np.flatnonzero(self.order == number) for number in range(len(left))]
        self.rank = np.empty(len(self.order), np.int64)  # how many of the same source come before in the period
        for places in self.places:
            self.rank[places] = np.arange(len(places))

    def turn(self, place: int) -> tuple[int, int]:
        """As ``Turns`` has it."""
        periods, rest = divmod(place - self.begin, len(self.order))
        number = int(self.order[rest])
        source = self.left[number]
        return source, int(self.given[source] + periods * self.shares[number] + self.rank[rest])

    def place_of(self, source: int, count: int) -> int:
        """Where the source gives the ``count``-th of all its samples."""
        number = self.left.index(source)
        periods, rest = divmod(count - int(self.given[source]) - 1, self.shares[number])
        return self.begin + periods * len(self.order) + int(self.places[number][rest])

    def given_before(self, place: int) -> np.ndarray:
        """As ``Turns`` has it."""
        periods, rest = divmod(place - self.begin, len(self.order))
        given = self.given.copy()
        for source, share, places in zip(self.left, self.shares, self.places, strict=True):
            given[source] += periods * share + int(np.searchsorted(places, rest))
        return given


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Shares as whole numbers: exactly those of the weights as they are written if their sum is PERIOD at most.

    Else the shares are rounded so that their sum is PERIOD.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    exact = [weight / sum(exact) for weight in exact]
    period = lcm(*(share.denominator for share in exact))
    if period <= PERIOD:
        return [int(share * period) for share in exact]
    return [end - start for start, end in pairwise([0, *(round(share * PERIOD) for share in accumulate(exact))])]


def order_of(shares: Sequence[int]) -> np.ndarray:
    """Whose turn it is in one period, sum(shares) long, as the essay above tells: numbers of sources, int64."""
    period, given = sum(shares), [0] * len(shares)
    order = np.empty(period, np.int64)
    for n in range(1, period + 1):
        may = [source for source, share in enumerate(shares) if share * n > period * given[source]]
        order[n - 1] = source = min(may, key=lambda one: -(-period * (given[one] + 1) // shares[one]))
        given[source] += 1
    return order
