"""How much a point differs from the baseline, and how sure one can be: pure functions over numbers.

The model of a study is value[point, seed] = point + seed + error. The seed's share (an easy initialisation, a kind
order of the data) is common to all points that were run on it, so it drops out of every difference to the baseline.
The error is what is left; its size is estimated from all points at once, because a study has few seeds and many
points. Runs that are missing are allowed: everything is least squares on the runs that there are. With two points
and no missing run all of this is the paired t test.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95  # of the intervals; a claim needs an adjusted p below the rest of it
POWER = 0.8
UNEVEN = 0.01  # about the chance that a study whose points are all equally noisy is said to have a noisier one
MOST_SEEDS = 10_000  # a study that would need more is told so

Values = Mapping[str, Mapping[int, float]]  # point → seed → value; only runs that have a finite one


@dataclass(frozen=True)
class Noise:
    """The spread of a run around point + seed: a sum of squared residuals and its degrees of freedom."""

    squares: float = 0.0
    degrees: int = 0

    @property
    def variance(self) -> float | None:
        """Residual variance; None without degrees of freedom (one seed)."""
        return self.squares / self.degrees if self.degrees > 0 else None

    @property
    def sd(self) -> float | None:
        """Standard deviation of one run, in the unit of the values."""
        return math.sqrt(self.variance) if self.variance is not None else None

    def __add__(self, other: Noise) -> Noise:
        return Noise(self.squares + other.squares, self.degrees + other.degrees)


@dataclass(frozen=True)
class Effect:
    """A point minus the baseline, in the unit of the values. Without an error there is no interval and no p."""

    difference: float
    seeds: int  # on which both the point and the baseline were run
    error: float | None = None  # standard error of the difference
    degrees: int = 0
    low: float | None = None  # the ends of the interval
    high: float | None = None
    p: float | None = None  # two-sided, of this point alone
    adjusted_p: float | None = None  # Holm over all points of the study
    pooled: bool = True  # False: the error is from this point's and the baseline's runs alone

    @property
    def claimed(self) -> bool:
        """Whether the difference, in either direction, is distinguishable from noise, all points considered."""
        return self.adjusted_p is not None and self.adjusted_p < 1 - CONFIDENCE


@dataclass(frozen=True)
class Analysis:
    """All points against the baseline. Points with no way to compare them (no run, no common seed) have no effect."""

    effects: dict[str, Effect]
    noise: Noise
    uneven: list[str]  # points much noisier than the others, kept out of the noise

    @property
    def smallest(self) -> float | None:
        """The smallest true difference that a study like this finds with 80% power.

        None without an error, and when no point is compared by the common noise (the baseline has its own).
        """
        if self.noise.sd is None or not any(effect.pooled for effect in self.effects.values()):
            return None
        seeds = max(effect.seeds for effect in self.effects.values())
        return smallest_detectable(self.noise.sd, self.noise.degrees, max(1, seeds), len(self.effects))


def analyse(values: Values, baseline: str, known: Noise | None = None) -> Analysis:
    """Compare every point with the baseline, paired by seed.

    ``known`` is noise that other runs of the same kind have shown; it is pooled with that of these runs. (A
    confirmation on a few fresh seeds uses that of the search: residuals say nothing about which point won.)
    """
    known = known or Noise()
    values = {name: seeds for name, seeds in values.items() if seeds}
    if baseline not in values:
        return Analysis({}, known, [])
    uneven = uneven_points(values)
    even = {name: seeds for name, seeds in values.items() if name not in uneven}
    effects, noise = {}, known
    if even:
        differences, own = fit(even, baseline if baseline in even else None)
        noise = known + own
        for name, (difference, leverage) in differences.items():
            effects[name] = _effect(difference, leverage, noise, _common(values, name, baseline))
    for name in values:
        if name != baseline and (name in uneven or baseline in uneven):
            differences, own = fit({baseline: values[baseline], name: values[name]}, baseline)
            if name in differences:
                effect = _effect(*differences[name], own, _common(values, name, baseline))
                effects[name] = replace(effect, pooled=False)
    effects = {name: effects[name] for name in values if name in effects}
    tested = [name for name in effects if effects[name].p is not None]
    for name, adjusted in zip(tested, holm([effects[name].p or 0.0 for name in tested]), strict=True):
        effects[name] = replace(effects[name], adjusted_p=adjusted)
    return Analysis(effects, noise, sorted(uneven, key=list(values).index))


def fit(values: Values, baseline: str | None) -> tuple[dict[str, tuple[float, float]], Noise]:
    """Least squares of value = point + seed on the runs there are.

    Returns, for each point that the runs can compare with the baseline, the difference to it and the difference's
    variance in units of the noise variance (2/seeds when no run is missing), and the noise.
    """
    points = list(values)
    seeds = sorted({seed for runs in values.values() for seed in runs})
    cells = [(row, seeds.index(seed), value) for row, name in enumerate(points) for seed, value in values[name].items()]
    design = np.zeros((len(cells), len(points) + len(seeds)))
    target = np.array([value for _, _, value in cells])
    for number, (row, column, _) in enumerate(cells):
        design[number, [row, len(points) + column]] = 1.0
    middle = target.mean()  # taken away for the rounding's sake; every point shares it
    gram = np.linalg.pinv(design.T @ design, rcond=1e-10, hermitian=True)
    solution = gram @ (design.T @ (target - middle))
    residuals = target - middle - design @ solution
    rank = round(float(np.trace(gram @ (design.T @ design))))
    squares = float(residuals @ residuals)
    if squares < len(cells) * (1e-12 * np.abs(target).max()) ** 2:
        squares = 0.0  # rounding is no noise
    differences = {}
    for row, name in enumerate(points):
        if baseline is None or name == baseline:
            continue
        contrast = np.zeros(design.shape[1])
        contrast[[row, points.index(baseline)]] = 1.0, -1.0
        if np.allclose(gram @ (design.T @ (design @ contrast)), contrast, atol=1e-8):  # else no chain of seeds
            difference = float(contrast @ solution)
            difference = 0.0 if abs(difference) < 1e-12 * np.abs(target).max() else difference
            differences[name] = (difference, float(contrast @ gram @ contrast))
    return differences, Noise(squares, len(cells) - rank)


def uneven_points(values: Values) -> set[str]:
    """Points so much noisier than the others that pooling them would drown every difference (a run diverged, say).

    A point's share of the residual squares is compared with that of the others (the F test of Chow 1960 for added
    observations). The noisiest is taken out, and the next is looked at without it, until half are gone; the last one
    that was too noisy settles how many are, so that two cannot hide each other (generalized ESD, Rosner 1983).
    """
    left = list(values)
    order: list[str] = []
    found = 0
    while len(left) > 2 and len(order) < (len(values) - 1) // 2:
        everything, *without = noise_without_each({name: values[name] for name in left})
        ratios, degrees = {}, {}
        for name, others in zip(left, without, strict=True):
            own = Noise(max(0.0, everything.squares - others.squares), everything.degrees - others.degrees)
            if own.variance is not None and others.variance is not None:
                exact = math.inf if own.variance else 0.0  # the others show no noise at all
                ratios[name] = own.variance / others.variance if others.variance else exact
                degrees[name] = (own.degrees, others.degrees)
        if not ratios:
            break
        logs = stats.f.logsf(list(ratios.values()), *zip(*degrees.values(), strict=True))
        chances = dict(zip(ratios, logs.tolist(), strict=True))
        noisiest = min(chances, key=chances.__getitem__)
        order.append(noisiest)
        if chances[noisiest] < math.log(UNEVEN / len(left)):
            found = len(order)
        left.remove(noisiest)
    return set(order[:found])


def noise_without_each(values: Values) -> list[Noise]:
    """The noise of all points, as ``fit`` finds it, and then without the first, without the second, and so on.

    Once a point's own mean is taken away, what it adds to the normal equations of the seeds (a matrix [seeds, seeds],
    a right side [seeds], squares) simply adds up over points, so that no new fit is needed.
    """
    seeds = sorted({seed for runs in values.values() for seed in runs})
    held_PS = np.array([[seed in runs for seed in seeds] for runs in values.values()], dtype=float)
    centred_PS = np.zeros_like(held_PS)
    for row, runs in enumerate(values.values()):
        middle = mean(runs.values())
        centred_PS[row] = [runs[seed] - middle if seed in runs else 0.0 for seed in seeds]
    runs_P = held_PS.sum(1)
    matrix_PSS = (
        held_PS[:, :, None] * np.eye(len(seeds)) - held_PS[:, :, None] * held_PS[:, None] / runs_P[:, None, None]
    )
    # The rows of kept say which points count. (Taking a diverged one away from a sum would leave its rounding.)
    kept_KP = np.vstack([np.ones(len(values)), 1 - np.eye(len(values))])
    matrix_KSS = np.einsum("kp,pst->kst", kept_KP, matrix_PSS)
    side_KS, squares_K = kept_KP @ centred_PS, kept_KP @ np.square(centred_PS).sum(1)
    inverse_KSS = np.linalg.pinv(matrix_KSS, rcond=1e-10, hermitian=True)
    left_K = squares_K - np.einsum("ks,kst,kt->k", side_KS, inverse_KSS, side_KS)
    left_K = np.where(left_K > 1e-12 * squares_K, left_K, 0.0)  # rounding is no noise
    rank_K = np.einsum("kst,kts->k", inverse_KSS, matrix_KSS).round()
    degrees_K = kept_KP @ (runs_P - 1) - rank_K
    return [Noise(squares, int(degrees)) for squares, degrees in zip(left_K.tolist(), degrees_K.tolist(), strict=True)]


def holm(ps: list[float]) -> list[float]:
    """Adjusted p values (Holm 1979): below 0.05 for any false one in at most 5% of studies."""
    adjusted, highest = [0.0] * len(ps), 0.0
    for place, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = max(highest, min(1.0, (len(ps) - place) * ps[index]))
        adjusted[index] = highest
    return adjusted


# ---------------------------------------------------------------------------------------------- planning


def power_of(effect: float, error: float, degrees: float, comparisons: int) -> float:
    """Chance that a two-sided t test, at a level shared by ``comparisons`` points (Bonferroni), finds ``effect``."""
    if error == 0:
        return 1.0
    threshold = stats.t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, degrees)
    shift = abs(effect) / error
    # The wrong side counts for less than 1e-6 from 5 errors on, where scipy's value of it can be nan.
    wrong_side = stats.nct.cdf(-threshold, degrees, shift) if shift < 5 else 0.0
    return float(stats.nct.sf(threshold, degrees, shift) + wrong_side)


def smallest_detectable(sd: float, degrees: int, seeds: int, comparisons: int) -> float:
    """Smallest true difference to the baseline that a study of this noise and size finds with 80% power."""
    error = sd * math.sqrt(2 / seeds)
    if error == 0:
        return 0.0
    # In units of the error the answer is near the threshold of the test; twice as much is always enough.
    highest = 2 * float(stats.t.ppf(1 - (1 - CONFIDENCE) / comparisons / 2, degrees)) + 5
    lost = lambda ratio: power_of(ratio, 1.0, degrees, comparisons) - POWER  # noqa: E731
    return error * float(optimize.brentq(lost, 1e-6, highest, xtol=1e-6))


def seeds_needed(effect: float, sd: float, comparisons: int) -> int | None:
    """Seeds for 80% power to see a true ``effect`` in one of ``comparisons`` points; None: above 10,000, or no effect.

    With one comparison it is the paired t test's; with more, the level is shared and the noise is pooled.
    """
    if effect == 0:
        return None

    def enough(seeds: int) -> bool:
        return power_of(effect, sd * math.sqrt(2 / seeds), comparisons * (seeds - 1), comparisons) >= POWER

    low, high = 1, 2
    while not enough(high):  # doubling, then halving: the power only grows with the seeds
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _common(values: Values, name: str, baseline: str) -> int:
    return len(set(values[name]) & set(values[baseline]))


def _effect(difference: float, leverage: float, noise: Noise, seeds: int) -> Effect:
    if noise.sd is None:
        return Effect(difference, seeds)
    error = noise.sd * math.sqrt(leverage)
    reach = error * float(stats.t.ppf((1 + CONFIDENCE) / 2, noise.degrees))
    if error > 0:
        p = float(2 * stats.t.sf(abs(difference) / error, noise.degrees))
    else:  # no noise at all: the same bits, or a difference beyond doubt
        p = 1.0 if difference == 0 else 0.0
    return Effect(difference, seeds, error, noise.degrees, difference - reach, difference + reach, p)


def mean(values: Collection[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)
