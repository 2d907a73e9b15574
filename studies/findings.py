"""What a study says, in plain words: what won, by how much, how sure one can be, and what to do where one cannot."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from config import BadInput, Config
from studies import decision as deciding
from studies.decision import Decision, Difference
from studies.design import Design, design
from studies.record import deviations, look
from studies.results import Result
from studies.space import Point, Study

FAR = 20  # times the usual deviation of a run from the median of its point: beyond it a run is told to be far off
UNITS = {
    "val/loss": "nats per token",
    "train/loss": "nats per token",
    "gap/loss": "nats per token",
    "val/entropy": "nats per token",
    "val/bits_per_byte": "bits per byte",
}


@dataclass(frozen=True)
class Findings:
    """All that the report rests on. Differences are point minus baseline, in the metric's own unit."""

    study: Study
    design: Design
    results: list[Result]  # every run that is wanted or there
    rows: list[Difference]  # the search, the best first
    decision: Decision
    test: Decision | None  # test/loss of winner and baseline on the fresh seeds; nothing is claimed of it
    look: int  # at fresh results, from 1
    bits: float | None  # bits per byte in one unit of the metric

    @property
    def points(self) -> list[Point]:
        """The baseline first."""
        return self.design.points

    @property
    def unit(self) -> str:
        """Unit of the metric, in words."""
        name = self.study.metric.removeprefix("best ")
        return UNITS.get(name, name)

    @property
    def sign(self) -> int:
        """1 if a smaller metric is better, else -1."""
        return 1 if self.study.minimize else -1

    @property
    def winner(self) -> Point | None:
        """The point of the study, at the base's learning rate, that won; else the one that came nearest."""
        name = self.decision.point
        origin = {point.name: point.origin for point in self.design.own}.get(name or "") or name
        return next((point for point in self.points if point.name == origin), None)

    @property
    def claimed(self) -> bool:
        """Whether the study claims that its winner is better."""
        return self.decision.claim is not None

    def row(self, point: Point | None) -> Difference | None:
        """The point against the baseline in the search."""
        return next((row for row in self.rows if point is not None and row.point == point.name), None)

    def better(self, difference: float | None) -> bool:
        """Whether the difference is in the good direction."""
        return difference is not None and self.sign * difference < 0

    def of(self, point: Point, stage: str = "search") -> list[Result]:
        """The runs of a point that count."""
        return [
            run for run in self.results if run.point.name == point.name and run.stage == stage and run.value is not None
        ]

    def amount(self, value: float) -> str:
        """A size with its unit."""
        return f"{abs(value):.4f} {self.unit}"

    def interval(self, of: Decision, bits: bool = False) -> str:
        """The interval of a difference, its direction taken as the positive one; and its size in bits."""
        if of.low is None or of.high is None or of.difference is None:
            return "no interval"
        ends = sorted((of.low, of.high) if of.difference > 0 else (-of.low, -of.high))
        also = f"; {abs(of.difference) * self.bits:.4f} bits per byte" if self.bits and bits else ""
        return f"{confidence(of)} interval {number(ends[0])} to {number(ends[1])}{also}"


def find(study: Study) -> Findings:
    """Read the runs of a study and decide. A look at fresh results is recorded once all of them are there.

    Raises BadInput when no run is finished yet.
    """
    known = design(study)
    results = results_of(known)
    if not any(result.value is not None for result in results):
        raise BadInput(nothing_finished(study, results))
    number_of_look = look(known)
    fresh, level = known.fresh(), deciding.level(number_of_look)
    decision = deciding.decide(known.contest(), fresh, known.baseline.name, study.minimize, level)
    test = judge_test(known, results, level) if fresh else None
    rows = deciding.compare(known.search(), known.points[0].name, study.minimize)
    return Findings(study, known, results, rows, decision, test, number_of_look, bits_per_unit(study.metric, results))


def results_of(known: Design) -> list[Result]:
    """The runs that are wanted, and those that an earlier version of the study left on the search's seeds."""
    study = known.study
    left = [(point, seed) for point in known.points for seed in study.seeds]
    left = [(point, seed) for point, seed in left if study.run_directory(point, seed).exists()]
    pairs = {(point.name, seed): point for point, seed in [*known.wanted, *left]}
    names = list(dict.fromkeys(name for name, _ in pairs))
    keys = sorted(pairs, key=lambda pair: (names.index(pair[0]), pair[1]))
    return [known.result(pairs[key], key[1]) for key in keys]


def nothing_finished(study: Study, results: list[Result]) -> str:
    """The message when there is nothing to report on."""
    states = [result.status for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "no runs at all"
    reasons = [f"; the first failed with: {result.reason}" for result in results if result.status == "failed"]
    return (
        f"no finished run in {study.directory} ({counts}){''.join(reasons[:1])}; "
        "start the study, or let it go on: python -m scripts.study run YOUR_STUDY.yaml"
    )


def judge_test(known: Design, results: list[Result], level: float) -> Decision:
    """test/loss of the winner's and the baseline's best checkpoints, on the fresh seeds, as the metric is judged."""

    def losses(point: Point | None, fresh: bool) -> dict[int, float]:
        runs = [run for run in results if point and run.point.name == point.name and (run.stage == "fresh") == fresh]
        return {run.seed: loss for run in runs if (loss := run.number("test/loss")) is not None}

    differences, earlier = (
        deciding.paired(losses(known.winner, fresh), losses(known.baseline, fresh)) for fresh in (True, False)
    )
    return deciding.judge_pairs(differences, earlier, level)


def bits_per_unit(metric: str, results: list[Result]) -> float | None:
    """Bits per byte in a nat per token; None when the metric is no loss or the runs differ in their tokens."""
    if UNITS.get(metric.removeprefix("best ")) != "nats per token":
        return None
    ratios = []
    for result in results:
        loss, bits = result.number("val/loss"), result.number("val/bits_per_byte")
        if result.value is not None and loss and bits:
            ratios.append(bits / loss)
    if not ratios or max(ratios) > min(ratios) * (1 + 1e-4):
        return None
    return fmean(ratios)


# ---------------------------------------------------------------------------------------------- in words


def short(name: str) -> str:
    """A knob or a point's name without the names of config's sections, with room to break the line."""
    for section in Config.model_fields:
        name = name.replace(f"{section}.", "")
    return name.replace(",", ", ")


def number(value: float) -> str:
    """Four digits after the point, with a real minus."""
    return f"{value:.4f}".replace("-", "−")


def counted(count: int, what: str) -> str:
    """So many of them, in words."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def confidence(of: Decision) -> str:
    """How often such an interval holds the truth."""
    return f"{100 * (1 - of.alpha):.3g}%"


def answer(findings: Findings) -> list[str]:
    """What helps, by how much and how sure, and what to do about what is not sure. The first sentence says all."""
    decision, best = findings.decision, findings.winner
    if best is None or decision.search is None:
        return [
            "No point can be compared with the baseline yet.",
            "It takes finished runs of both on a common seed; python -m scripts.study run goes on where it stopped.",
        ]
    if decision.why_not == "nothing leads":
        return nothing_leads(findings, best)
    if decision.why_not in ("not run", "unfinished"):
        return not_confirmed(findings, best)
    if decision.why_not == "a run failed":
        return fresh_run_failed(findings, best)
    sentences = claim(findings, best) if decision.claim else luck(findings, best)
    return [*sentences, *rates(findings, best), *tested(findings), *looked(findings)]


def claim(findings: Findings, best: Point) -> list[str]:
    """The answer of a study that found something."""
    decision, verb = findings.decision, "lowers" if findings.study.minimize else "raises"
    assert decision.difference is not None and decision.p is not None
    return [
        f"{short(best.name)} {verb} {findings.study.metric} by {findings.amount(decision.difference)} against the "
        f"baseline ({findings.interval(decision, bits=True)}).",
        f"This was measured on {counted(decision.seeds, 'fresh seed')} by which nothing was chosen: in a world where "
        f"it does nothing, a gain this large would appear {deciding.once_in(decision.p)}.",
    ]


def luck(findings: Findings, best: Point) -> list[str]:
    """The answer when fresh seeds show no more than luck could."""
    decision, name = findings.decision, short(best.name)
    if decision.difference is None or decision.sd is None:
        return [f"One pair of runs cannot tell {name} from luck.", "Give the study more fresh seeds: confirm_seeds: 8."]
    way = "better" if findings.better(decision.difference) else "worse"
    visible = deciding.smallest_visible(decision.sd, decision.seeds, decision.degrees, decision.alpha)
    plan = f"Such a study sees a true gain from {findings.amount(visible)} on in four cases of five."
    if way == "better" and not far_off(findings):
        level = deciding.level(findings.look + 1)
        needed = deciding.seeds_needed(
            decision.difference, decision.sd, int(decision.degrees) - decision.seeds + 1, level
        )
        if needed is None or needed > 2 * decision.seeds * 10:
            plan += " If the gain is as small as it looks, no reasonable number of seeds would show it."
        else:
            plan += f" If the gain is what it looks like, {needed} fresh seeds would: confirm_seeds: {needed}."
    return [
        f"No gain here is distinguishable from luck: the best, {name}, ends {findings.amount(decision.difference)} "
        f"{way} than the baseline on {counted(decision.seeds, 'fresh seed')} ({findings.interval(decision)}).",
        plan,
    ]


def nothing_leads(findings: Findings, best: Point) -> list[str]:
    """The answer when the baseline is best."""
    if findings.design.own:
        led, tried = findings.rows[0], counted(len(findings.study.tuning_seeds), "seed")
        rate = times(findings.design.chosen[findings.points[0].name])
        return [
            "No point did better than the baseline once each had its own learning rate.",
            f"At one rate for all {short(led.point)} led by {findings.amount(led.mean)}; on the {tried} on which rates "
            "were tried nothing is left of that, so that no fresh seeds were run. "
            f"Keep the baseline, at {rate} learning rate.",
        ]
    nearest = ""
    if findings.decision.search is not None:
        worse = findings.decision.search.mean
        nearest = f": the nearest, {short(best.name)}, ended {findings.amount(worse)} worse" if worse else ""
    return [
        f"No point did better than the baseline in the search{nearest}.",
        "Keep the baseline: there is no gain that fresh seeds could confirm.",
    ]


def not_confirmed(findings: Findings, best: Point) -> list[str]:
    """The answer while there are no results of fresh seeds."""
    study, row = findings.study, findings.row(best)
    lead = f" by {findings.amount(row.mean)}" if row else ""
    first = f"Nothing is claimed yet: {short(best.name)} leads the search{lead}, on the seeds on which it was chosen."
    if not study.confirm_seeds:
        return [
            first,
            "The study has no fresh seeds (confirm_seeds: 0); with them the same command confirms it, or not.",
        ]
    done = sum(result.stage == "fresh" and result.over for result in findings.results)
    return [
        first,
        f"The study is at its {findings.design.stage}, {done} of {2 * study.confirm_seeds} fresh runs are over; "
        "the same command goes on: python -m scripts.study run.",
    ]


def fresh_run_failed(findings: Findings, best: Point) -> list[str]:
    """The answer when a run that a claim would rest on failed."""
    name, seed = findings.decision.failed[0]
    others = len(findings.decision.failed) - 1
    more = f" and {others} more" if others else ""
    result = next(run for run in findings.results if run.point.name == name and run.seed == seed)
    return [
        f"Not confirmed: a run failed, {short(name)} on the fresh seed {seed}{more} ({result.reason}).",
        f"{short(best.name)} won the search, but what fails on a seed cannot be recommended, and leaving the run out "
        "would flatter one side; mend the cause and give the same command again, or leave out a point that diverges.",
    ]


def rates(findings: Findings, best: Point) -> list[str]:
    """What the learning rates were, and what the gain was at one rate for all."""
    study, known, row = findings.study, findings.design, findings.row(best)
    if not study.tune:
        return ["Both ran at the base's learning rate: how much of a gain another rate would bring alone is not known."]
    knob = next(iter(study.tune)).rsplit(".", 1)[-1]
    mine, its = (times(known.chosen[point.name]) for point in (best, known.points[0]))
    at_one = f" At one {knob} for all it led the search by {findings.amount(row.mean)}." if row else ""
    if mine == its:
        return [f"Each had its own best {knob}: {mine} for both.{at_one}"]
    return [f"Each had its own best {knob}: {mine}, and for the baseline {its}.{at_one}"]


def times(multiple: float) -> str:
    """A multiple of the base's learning rate, in words."""
    return "the base's" if multiple == 1 else f"{multiple:g} times the base's"


def tested(findings: Findings) -> list[str]:
    """What the test says."""
    test = findings.test
    if test is None or test.difference is None:
        return []
    way = "lower" if test.difference < 0 else "higher"
    return [f"test/loss is {abs(test.difference):.4f} {way} on these seeds ({findings.interval(test)})."]


def looked(findings: Findings) -> list[str]:
    """What earlier looks at fresh results cost this one."""
    if findings.look == 1:
        return []
    sure = confidence(findings.decision)
    return [
        f"This is look {findings.look} at fresh results; earlier ones spent part of the 5%, so that this needs {sure}."
    ]


def cautions(findings: Findings) -> list[str]:
    """What a reader should know before believing the answer."""
    study, results = findings.study, findings.results
    lines = list(study.warnings())
    failed = [result for result in results if result.status == "failed"]
    open_ones = [result for result in results if not result.over]
    if failed:
        names = ", ".join(dict.fromkeys(short(result.point.name) for result in failed))
        lines.append(f"{len(failed)} of {len(results)} runs failed ({names}); they are listed with their reason")
    if open_ones:
        lines.append(f"{len(open_ones)} of {len(results)} runs are not finished; the numbers will still move")
    unchanged = [short(row.point) for row in findings.rows if row.unchanged]
    if unchanged:
        lines.append(f"changed nothing, to the last digit of {study.metric}: {'; '.join(unchanged)}")
    lines += [f"not as registered: {line}" for line in deviations(study)]
    lines += [*edges(findings), *far_off(findings)]
    if findings.claimed and (factor := deciding.exaggeration(findings.decision)) and factor >= 1.05:
        lines.append(
            "what passes a test looks larger than it is: were the true gain the one measured, studies that claim it "
            f"would on average measure {factor:.1f} times as much"
        )
    for what in ("versions", "hardware"):
        if len({repr(result.summary.get(what)) for result in results if result.value is not None}) > 1:
            lines.append(f"the runs differ in their {what}, see the end of the report; differences may be theirs")
    return lines


def settings(findings: Findings) -> dict[str, dict[str, Any]]:
    """Point -> the knobs in which any two points differ -> value, in the order of config.py."""
    study = findings.study
    flat = {point.name: study.config(point, 0).flat() for point in findings.points}
    first = flat[findings.points[0].name]
    aside = ("run.", "tracking.", "checkpoint.")  # sections that say nothing about what a point is
    differing = [
        knob
        for knob in first
        if not knob.startswith(aside) and any(values[knob] != first[knob] for values in flat.values())
    ]
    return {name: {knob: values[knob] for knob in differing} for name, values in flat.items()}


def edges(findings: Findings) -> list[str]:
    """Where the winner lies at the edge of the values that were tried, in its knobs and in its learning rate."""
    best, lines = findings.winner, []
    if best is None or not findings.better(findings.decision.difference):
        return []
    chosen = settings(findings)
    for knob, value in chosen[best.name].items():
        tried = {values[knob] for values in chosen.values() if is_number(values[knob]) and values[knob]}
        if is_number(value) and value and len(tried) > 2 and value in (min(tried), max(tried)):
            way, beyond = ("largest", "larger") if value == max(tried) else ("smallest", "smaller")
            lines.append(f"{short(knob)}={value:g} is the {way} value tried; the best may be {beyond}")
    for name, multiple in findings.design.chosen.items():
        if multiple in (findings.design.tried[0], findings.design.tried[-1]):
            lines.append(f"{short(name)} did best at {times(multiple)} learning rate, the end of those tried")
    return lines


def is_number(value: Any) -> bool:
    """Whether the value has a place on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def far_off(findings: Findings) -> list[str]:
    """Runs whose value is far from those of their point on other seeds: they may have diverged without failing."""
    by_point: dict[str, list[Result]] = {}
    for result in findings.results:
        if result.value is not None:
            by_point.setdefault(result.point.name, []).append(result)
    away = [
        (result, abs((result.value or 0.0) - middle), middle)
        for runs in by_point.values()
        if len(runs) > 2
        for middle in [median(run.value or 0.0 for run in runs)]
        for result in runs
    ]
    usual = median(distance for _, distance, _ in away) if away else 0.0
    return [
        f"{short(run.point.name)} ended at {run.value:.4f} on seed {run.seed}, far from its others ({middle:.4f}); "
        "did it diverge?"
        for run, distance, middle in away
        if usual and distance > FAR * usual
    ]
