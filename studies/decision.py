"""What may be claimed, and how sure: pure functions over {point: {seed: value}}, which all else words and draws.

The search explores and claims nothing. One claim is made, of the point that did best there, from fresh seeds on which
nothing was chosen: the mean of its differences to the baseline, paired by seed, so that what a seed brings to both (an
easy initialisation, a kind order of the data) drops out. The spread is the pair's own, for that of regularizers differs
a hundredfold: the squares of the search's differences and of the fresh ones, each around their own mean, with S + F - 2
degrees of freedom. The winner is chosen by means alone, and with Gaussian noise a mean says nothing about the squares
around it, so that Student's t holds whatever the variances and correlations of the points are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from statistics import fmean

from scipy import optimize, special, stats

ALPHA = 0.05  # the share of studies that may claim something false, all their looks together
POWER = 0.8
MOST_SEEDS = 10_000

Values = Mapping[str, Mapping[int, float]]  # point -> seed -> value; NaN: the run failed

WHY_NOT = {
    "nothing to compare": "no point can be compared with the baseline yet",
    "nothing leads": "no point did better than the baseline in the search",
    "not run": "the winner was not run on fresh seeds",
    "unfinished": "runs on fresh seeds are not finished",
    "a run failed": "a run on a fresh seed failed",
    "one pair": "one pair of runs shows no spread",
    "luck": "luck alone brings such a difference",
}


@dataclass(frozen=True)
class Difference:
    """A point minus the baseline on the seeds of both. It claims nothing."""

    point: str
    mean: float
    sd: float | None  # of the paired differences; None with one seed
    seeds: int
    failed: tuple[int, ...] = ()  # seeds on which the point's run failed
    unchanged: bool = False  # the very numbers of the baseline on every seed

    @property
    def may_win(self) -> bool:
        """Not a point that failed on a seed, which is not to be recommended, nor one that changes nothing."""
        return not self.failed and not self.unchanged


@dataclass(frozen=True)
class Decision:
    """What is claimed, of which point, and why nothing is; its numbers are of fresh seeds, point minus baseline."""

    claim: str | None = None  # "better"; "worse" only where two groups are judged; None
    point: str | None = None
    difference: float | None = None
    low: float | None = None  # the ends of the interval of confidence 1 - alpha
    high: float | None = None
    p: float | None = None  # two-sided
    why_not: str = ""  # a key of WHY_NOT; empty with a claim
    seeds: int = 0  # pairs of runs
    sd: float | None = None  # of one pair's difference
    degrees: float = 0
    alpha: float = ALPHA
    failed: tuple[tuple[str, int], ...] = ()  # points and seeds of the runs that forbid a claim
    search: Difference | None = None  # the point where it was chosen, which flatters it


def compare(search: Values, baseline: str, minimize: bool = True) -> list[Difference]:
    """Every point against the baseline, the best first; what the search took to more seeds stands before the rest."""
    rows = []
    for name, runs in search.items():
        differences = paired(runs, search.get(baseline, {}))
        if name == baseline or not differences:
            continue
        count = len(differences)
        failed = tuple(seed for seed, value in runs.items() if not math.isfinite(value))
        sd = math.sqrt(squares(differences) / (count - 1)) if count > 1 else None
        rows.append(Difference(name, fmean(differences), sd, count, failed, not any(differences)))
    sign = 1 if minimize else -1
    return sorted(rows, key=lambda row: (not row.may_win, -row.seeds, sign * row.mean))


def decide(search: Values, fresh: Values, baseline: str, minimize: bool = True, alpha: float = ALPHA) -> Decision:
    """The one claim of a study: that its best point is better than the baseline, or None and why.

    Args:
        search: the runs by which the winner is chosen.
        fresh: runs on seeds by which nothing was chosen. Those of winner and baseline must all be finished.
        baseline: the point that the others are compared with.
        minimize: whether a smaller value is the better one.
        alpha: level of the two-sided test. Only a gain is claimed, so that a false claim has half of this chance.
    """
    best = next((row for row in compare(search, baseline, minimize) if row.may_win), None)
    if best is None:
        return Decision(why_not="nothing to compare", alpha=alpha)
    sign = 1 if minimize else -1
    undecided = Decision(point=best.point, alpha=alpha, search=best)
    if sign * best.mean >= 0:
        return replace(undecided, why_not="nothing leads")
    mine, its = fresh.get(best.point, {}), fresh.get(baseline, {})
    runs = [(best.point, mine), (baseline, its)]
    failed = tuple((name, seed) for name, held in runs for seed, value in held.items() if not math.isfinite(value))
    if failed:
        return replace(undecided, why_not="a run failed", failed=failed)
    if not mine or set(mine) != set(its):
        return replace(undecided, why_not="unfinished" if mine else "not run")
    decision = judge_pairs(paired(mine, its), paired(search[best.point], search[baseline]), alpha)
    better = decision.claim is not None and sign * (decision.difference or 0.0) < 0
    why_not = "" if better else decision.why_not or "luck"
    return replace(decision, claim="better" if better else None, why_not=why_not, point=best.point, search=best)


def judge_pairs(differences: list[float], earlier: list[float], alpha: float) -> Decision:
    """Student's t on the mean of paired differences; the squares of ``earlier`` ones, around their mean, count in.

    The claim is "lower" or "higher": the caller knows which is better.
    """
    count = len(differences)
    degrees = max(0, len(earlier) - 1) + count - 1
    if not count or degrees < 1:
        return Decision(why_not="one pair", seeds=count, alpha=alpha)
    sd = math.sqrt((squares(earlier) + squares(differences)) / degrees)
    return judge_mean(fmean(differences), sd / math.sqrt(count), degrees, alpha, seeds=count, sd=sd)


def judge_groups(mine: Collection[float], its: Collection[float], alpha: float) -> Decision:
    """Welch's t on the difference of two means, for runs that share no seeds. The claim is "lower" or "higher".

    ``sd`` is that of one run of mine minus one of its, ``seeds`` the size of the smaller group.
    """
    count = min(len(mine), len(its))
    if count < 2:
        return Decision(why_not="one pair", seeds=count, alpha=alpha)
    variances = [squares(values) / (len(values) - 1) for values in (mine, its)]
    shares = [variance / len(values) for variance, values in zip(variances, (mine, its), strict=True)]
    parts = sum(share**2 / (len(values) - 1) for share, values in zip(shares, (mine, its), strict=True))
    degrees = sum(shares) ** 2 / parts if parts else count - 1
    sd = math.sqrt(sum(variances))
    return judge_mean(fmean(mine) - fmean(its), math.sqrt(sum(shares)), degrees, alpha, seeds=count, sd=sd)


def judge_mean(difference: float, error: float, degrees: float, alpha: float, seeds: int, sd: float) -> Decision:
    """Student's t for a difference with a standard error."""
    reach = error * float(special.stdtrit(degrees, 1 - alpha / 2))
    if error > 0:
        p = 2 * float(special.stdtr(degrees, -abs(difference) / error))
    else:  # no noise at all
        p = 0.0 if difference else 1.0
    claim = None if p >= alpha else "lower" if difference < 0 else "higher"
    why_not = "" if claim else "luck"
    return Decision(
        claim, None, difference, difference - reach, difference + reach, p, why_not, seeds, sd, degrees, alpha
    )


def paired(mine: Mapping[int, float], its: Mapping[int, float]) -> list[float]:
    """Mine minus its on the seeds on which both have a number."""
    return [value - its[seed] for seed, value in mine.items() if math.isfinite(value - its.get(seed, math.nan))]


def squares(values: Collection[float]) -> float:
    """The sum of squares around the mean; what is rounding counts as none."""
    if not values:
        return 0.0
    middle = fmean(values)
    total = math.fsum((value - middle) ** 2 for value in values)
    return total if total > len(values) * (1e-12 * max(map(abs, values))) ** 2 else 0.0


def level(look: int) -> float:
    """The level of the ``look``-th look (from 1) at fresh results: all looks together claim falsely in 5% of studies.

    A look may spend ALPHA/(look·(look + 1)) on false claims. A test that only claims gains spends half of its level,
    so that the first has the usual 5% and its interval the usual 95%.
    """
    return 2 * ALPHA / (look * (look + 1))


# ---------------------------------------------------------------------------------------------- planning


def power_of(effect: float, sd: float, fresh: int, degrees: float, alpha: float = ALPHA) -> float:
    """The chance that a true ``effect`` is claimed from ``fresh`` pairs whose difference varies by ``sd``."""
    if sd == 0:
        return float(effect != 0)
    threshold = special.stdtrit(degrees, 1 - alpha / 2)
    missed = special.nctdtr(degrees, abs(effect) / sd * math.sqrt(fresh), threshold)  # noncentral t
    return 1.0 - float(missed) if math.isfinite(missed) else 1.0


def smallest_visible(sd: float, fresh: int, degrees: float, alpha: float = ALPHA) -> float:
    """The smallest true effect that is claimed in four studies of five."""
    if sd == 0:
        return 0.0
    highest = 2 * float(special.stdtrit(degrees, 1 - alpha / 2)) + 5  # in standard errors, more than enough
    lacking = lambda errors: power_of(errors, 1.0, 1, degrees, alpha) - POWER  # noqa: E731
    return sd / math.sqrt(fresh) * float(optimize.brentq(lacking, 0.0, highest))


def seeds_needed(effect: float, sd: float, earlier: int = 0, alpha: float = ALPHA) -> int | None:
    """Pairs on fresh seeds that claim a true ``effect`` in four studies of five; None: above 10,000, or no effect.

    ``earlier``: degrees of freedom that other pairs bring to the spread.
    """

    def enough(count: int) -> bool:
        return power_of(effect, sd, count, earlier + count - 1, alpha) >= POWER

    if not effect or not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def exaggeration(decision: Decision) -> float | None:
    """The mean of what such claims say over the true effect, were it the one measured (Gelman and Carlin 2014)."""
    if not decision.difference or not decision.sd:
        return None
    error = decision.sd / math.sqrt(decision.seeds)
    truth = abs(decision.difference) / error
    threshold = special.stdtrit(decision.degrees, 1 - decision.alpha / 2)
    beyond = stats.norm.pdf(threshold - truth) / stats.norm.sf(threshold - truth)
    return float((truth + beyond) / truth)


def once_in(p: float) -> str:
    """How often a gain this large comes by luck alone, in words: half of a two-sided p."""
    studies = 2 / max(p, 1e-9)
    if studies >= 10_000:
        return "less than once in 10,000 studies"
    digits = 1 if studies >= 20 else 0
    rounded = round(studies, -digits if studies < 1000 else -2)
    return f"about once in {rounded:,.0f} studies"
