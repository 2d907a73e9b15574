"""Which runs a study asks for, given what those so far came to: the search, equal learning rates, fresh seeds.

1. search: by halving (Karnin 2013), all points on few seeds, the best third on one more, the best two on another
2. tuning: the best two and the baseline, each at several multiples of its learning rate, on seeds of their own
3. fresh: the winner and the baseline, each at its own rate, on seeds by which nothing was chosen

Nothing is remembered: the directories of the runs say how far it is, whoever trained them and however often it was
interrupted. A stage chooses by the seeds of the stages before it and by no others, so that what it chose stands.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from studies.decision import Values, compare
from studies.results import Result, is_finished, read_result
from studies.space import Point, Study

MOST_EXTENSIONS = 3  # of the multiples that are tried, when the best of one contender lies at the edge


@dataclass
class Design:
    """A study as far as it is known."""

    study: Study
    points: list[Point]
    stage: str = "search"  # the one that is not over yet, or "done"
    wanted: list[tuple[Point, int]] = field(default_factory=list)  # all runs up to that stage
    results: dict[tuple[str, int], Result] = field(default_factory=dict)
    finalists: list[Point] = field(default_factory=list)  # the search's best two, as far as they lead
    tried: list[float] = field(default_factory=list)  # multiples of the tuned knob, on which all contenders were run
    chosen: dict[str, float] = field(default_factory=dict)  # contender -> the multiple that suited it best
    own: list[Point] = field(default_factory=list)  # the contenders at their own rate, the baseline first
    winner: Point | None = None  # at its own rate; None: nothing leads

    @property
    def baseline(self) -> Point:
        """What the winner is compared with, at its own rate."""
        return self.own[0] if self.own else self.points[0]

    def result(self, point: Point, seed: int) -> Result:
        """What a run came to so far."""
        key = point.name, seed
        if key not in self.results:
            self.results[key] = read_result(self.study, point, seed)
        return self.results[key]

    def values(self, points: list[Point], seeds: list[int]) -> dict[str, dict[int, float]]:
        """Point -> seed -> value of the runs that are over; NaN: it failed."""
        found: dict[str, dict[int, float]] = {}
        for point in points:
            runs = [self.result(point, seed) for seed in seeds]
            over = {run.seed: math.nan if run.value is None else run.value for run in runs if run.over}
            found[point.name] = over
        return found

    def search(self) -> dict[str, dict[int, float]]:
        """All runs on the search's seeds, also where an earlier version of the study took a point further."""
        return self.values(self.points, self.study.seeds)

    def contest(self) -> dict[str, dict[int, float]]:
        """The runs by which the winner was chosen: each at its own rate, or, untuned, those of the search."""
        return self.values(self.own, self.study.tuning_seeds) if self.own else self.search()

    def fresh(self) -> dict[str, dict[int, float]]:
        """The runs of winner and baseline on fresh seeds, once all of them are over."""
        if self.stage != "done" or self.winner is None or not self.study.fresh_seeds:
            return {}
        return self.values([self.winner, self.baseline], self.study.fresh_seeds)

    def ask(self, points: list[Point], seeds: list[int]) -> bool:
        """Want these runs; returns whether all of them are over."""
        pairs = [(point, seed) for point in points for seed in seeds]
        self.wanted += [pair for pair in pairs if pair not in self.wanted]
        return all(self.result(*pair).over for pair in pairs)

    def best(self, values: Values, points: list[Point], leading: bool = False) -> list[Point]:
        """Those that may win, the best first; ``leading``: that did better than the baseline."""
        sign = 1 if self.study.minimize else -1
        rows = compare(values, self.baseline.name, self.study.minimize)
        by_name = {point.name: point for point in points}
        chosen = [row for row in rows if row.may_win and (sign * row.mean < 0 or not leading)]
        return [by_name[row.point] for row in chosen if row.point in by_name]


def design(study: Study, results: dict[tuple[str, int], Result] | None = None) -> Design:
    """How far the study is, as the directories of its runs say; those in ``results`` are not read again."""
    known = Design(study, study.points(), results=dict(results or {}))
    if not search(known):
        return known
    known.winner = next(iter(known.finalists), None)
    if known.winner and study.confirm_seeds:
        if study.tune:
            known.stage = "tuning"
            if not tune(known):
                return known
        if known.winner:
            known.stage = "fresh"
            if not known.ask([known.baseline, known.winner], study.fresh_seeds):
                return known
    known.stage = "done"
    return known


def runs_of(study: Study, others: int) -> dict[str, int]:
    """Runs of each stage with so many points besides the baseline, if one leads and no rate does best at an edge."""
    others = study.trials or others
    sizes = [min(others, size) for size in (others, *further(others))]
    new = [len(rung) - len(before) for rung, before in zip(study.rungs, [[], *study.rungs], strict=False)]
    tried = len(next(iter(study.tune.values()))) if study.tune and study.confirm_seeds else 0
    return {
        "search": sum((1 + size) * seeds for size, seeds in zip(sizes, new, strict=True)),
        "tuning": (1 + min(2, others)) * tried * len(study.tuning_seeds),
        "fresh": 2 * study.confirm_seeds,
    }


def forecast(known: Design) -> int:
    """About how many runs are left until the study is done, if its search finds something to confirm."""
    done = sum(is_finished(path.parent) for path in known.study.directory.glob("*-seed*/summary.json"))
    left = sum(runs_of(known.study, len(known.points) - 1).values()) - done
    return max(left, sum(not known.result(*pair).over for pair in known.wanted))


def search(known: Design) -> bool:
    """Halving; returns whether it is over."""
    study, (baseline, *left) = known.study, known.points
    rungs = study.rungs
    if all(known.result(point, seed).over for point in known.points for seed in study.seeds):
        rungs = rungs[-1:] * 3  # an earlier version ran all points on all seeds: then all of them count
    for seeds, size in zip(rungs, [len(left), *further(len(left))], strict=True):
        left = left[:size]
        if not known.ask([baseline, *left], seeds):
            return False
        left = known.best(known.values([baseline, *left], seeds), left)
    known.finalists = known.best(known.values([baseline, *left], study.seeds), left, leading=True)
    return True


def further(others: int) -> tuple[int, int]:
    """Of so many points the best third goes on to one more seed, and the best two to another."""
    return max(2, round(others / 3)), 2


def tune(known: Design) -> bool:
    """Baseline and finalists at multiples of their rate, at more of them for all when one does best at the edge.

    Returns whether that is over; then the winner is chosen anew, each at its own rate.
    """
    study, contenders = known.study, [known.points[0], *known.finalists]
    (multiples,) = (study.tune or {}).values()
    for _ in range(MOST_EXTENSIONS + 1):
        if not known.ask([study.tuned(point, one) for point in contenders for one in multiples], study.tuning_seeds):
            return False
        known.tried = multiples
        known.chosen = {point.name: one for point in contenders if (one := best_multiple(known, point)) is not None}
        best = known.chosen.values()
        lower = [multiples[0] ** 2 / multiples[1]] if multiples[0] in best else []
        higher = [multiples[-1] ** 2 / multiples[-2]] if multiples[-1] in best else []
        if not lower and not higher:
            break
        multiples = [*lower, *multiples, *higher]
    if known.points[0].name not in known.chosen:  # all its runs failed
        known.winner = None
        return True
    known.own = [study.tuned(point, known.chosen[point.name]) for point in contenders if point.name in known.chosen]
    known.winner = next(iter(known.best(known.contest(), known.own, leading=True)), None)
    return True


def best_multiple(known: Design, point: Point) -> float | None:
    """The multiple with the best mean, of those at which no run failed, and of equal ones the nearest to 1; or None."""
    means = {}
    for one in known.tried:
        ((_, runs),) = known.values([known.study.tuned(point, one)], known.study.tuning_seeds).items()
        if all(map(math.isfinite, runs.values())):
            means[one] = fmean(runs.values())
    sign = 1 if known.study.minimize else -1
    return min(means, key=lambda one: (sign * means[one], abs(math.log(one)))) if means else None
