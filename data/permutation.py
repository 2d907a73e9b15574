"""A random order of n things, computed where it is asked for and never stored.

A Feistel network turns a pair (left, right) into (right, left + F(right)), again and again with another F each time.
Each round can be undone whatever F is, so the whole is a permutation of the pairs, and a few rounds make it look like
a random one (Luby & Rackoff 1988). Numbers below side², side being the root of n rounded up, are such pairs of digits;
one that lands at n or above is sent through again until it is below, as Black & Rogaway (2002) do for any n. Few are,
as side² exceeds n by 2 side at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np

from randomness import numpy_generator

ROUNDS = 8


@dataclass(frozen=True)
class Permutation:
    """An order of 0..n, n at most 2^62; ``keys`` (uint64) make the F of each round."""

    n: int
    keys: np.ndarray

    @classmethod
    def draw(cls, n: int, seed: int, purpose: str, *indices: int) -> Permutation:
        """The order for one purpose at one place of the run."""
        return cls(n, numpy_generator(seed, purpose, *indices).integers(2**64, size=ROUNDS, dtype=np.uint64))

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """What stands at these places, int64; the places are below n."""
        return self._walk(places, self._forth)

    def places_of(self, things: np.ndarray) -> np.ndarray:
        """The places at which these things stand, int64: the inverse."""
        return self._walk(things, self._back)

    @property
    def _side(self) -> np.uint64:
        return np.uint64(isqrt(self.n - 1) + 1)

    def _walk(self, numbers: np.ndarray, network: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        numbers = network(np.asarray(numbers, dtype=np.uint64))
        while len(outside := np.flatnonzero(numbers >= self.n)):
            numbers[outside] = network(numbers[outside])
        return numbers.astype(np.int64)

    def _forth(self, numbers: np.ndarray) -> np.ndarray:
        side = self._side
        left, right = np.divmod(numbers, side)
        for key in self.keys:
            left, right = right, (left + mix(right + key) % side) % side
        return left * side + right

    def _back(self, numbers: np.ndarray) -> np.ndarray:
        side = self._side
        left, right = np.divmod(numbers, side)
        for key in self.keys[::-1]:
            left, right = (right + side - mix(left + key) % side) % side, left
        return left * side + right


def mix(numbers: np.ndarray) -> np.ndarray:
    """Other numbers (uint64) that show no pattern: SplitMix64's last step (Steele 2014), itself a permutation."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixed
