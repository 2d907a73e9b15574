"""Times of things done in turn, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

from tqdm import tqdm


def in_turn(works: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds that each work took, once per round; ``warmup`` rounds before are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_ in tqdm(range(-warmup, rounds), disable=None, leave=False, desc="rounds"):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the quartiles below and above it."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return median(values), low, high


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Median and quartiles of the ratio, round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])
