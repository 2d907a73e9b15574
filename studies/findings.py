"""What a study says: which point won, whether that is more than noise, and the answer in plain words.

Selection does not flatter: the winner is chosen on the search's seeds, and what is quoted of it is measured on fresh
ones, beside the baseline on the same. Where these runs are missing the answer says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from config import Config
from studies.results import Result
from studies.space import Point, Study
from studies.statistics import CONFIDENCE, Analysis, Effect, Values, analyse, mean, seeds_needed

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
    results: list[Result]
    points: list[Point]  # the baseline first
    search: Analysis
    winner: Point | None  # the best point that is not the baseline, even if it does no better
    confirmed: Effect | None  # the winner against the baseline on fresh seeds
    test: Effect | None  # their test/loss, on the seeds of the confirmation, else on those of the search
    bits: float | None  # bits per byte in one unit of the metric

    @property
    def unit(self) -> str:
        """Unit of the metric, in words."""
        return UNITS.get(self.study.metric, self.study.metric)

    @property
    def single_seed(self) -> bool:
        """Whether nothing can be said about noise."""
        return self.search.noise.sd is None

    def of(self, point: Point, confirmation: bool = False) -> list[Result]:
        """The runs of a point that count, of the search or of the confirmation."""
        runs = [result for result in self.results if result.point.name == point.name and result.value is not None]
        return [result for result in runs if result.confirmation == confirmation]

    def effect(self, point: Point) -> Effect | None:
        """The point against the baseline on the search's seeds."""
        return self.search.effects.get(point.name)

    def ranked(self) -> list[Point]:
        """Points that can be compared, the baseline among them, the best first; then those that cannot."""
        known = [point for point in self.points if point.baseline or self.effect(point)]
        known.sort(key=lambda point: self.study_sign * (effect.difference if (effect := self.effect(point)) else 0.0))
        return known + [point for point in self.points if point not in known]

    @property
    def study_sign(self) -> int:
        """1 if a smaller metric is better, else -1."""
        return 1 if self.study.minimize else -1

    def better(self, effect: Effect) -> bool:
        """Whether the difference is in the good direction."""
        return self.study_sign * effect.difference < 0

    @property
    def leads(self) -> bool:
        """Whether the winner did better than the baseline in the search."""
        effect = self.effect(self.winner) if self.winner else None
        return effect is not None and self.better(effect)

    def amount(self, value: float) -> str:
        """A size with its unit."""
        return f"{abs(value):.4f} {self.unit}"

    def interval(self, effect: Effect, bits: bool = True) -> str:
        """The interval of the size of an effect, its direction taken as the positive one; and its size in bits."""
        if effect.low is None or effect.high is None:
            return "no interval"
        ends = sorted((effect.low, effect.high) if effect.difference > 0 else (-effect.low, -effect.high))
        also = f"; {abs(effect.difference) * self.bits:.4f} bits per byte" if self.bits and bits else ""
        return f"{CONFIDENCE:.0%} interval {number(ends[0])} to {number(ends[1])}{also}"


def find(study: Study, results: list[Result]) -> Findings:
    """Analyse the runs of a study; ``results`` as ``collect`` gives them."""
    points = list({result.point.name: result.point for result in results}.values())
    baseline = next(point for point in points if point.baseline)
    search = analyse(values_of(results, False, lambda result: result.value), baseline.name)
    best = winner(study, results, search)
    confirmed = test = None
    if best is not None:
        pair = {best.name, baseline.name}
        fresh = [result for result in results if result.point.name in pair and result.confirmation]
        known = None if pair & set(search.uneven) else search.noise
        again = analyse(values_of(fresh, True, lambda result: result.value), baseline.name, known)
        confirmed = again.effects.get(best.name)
        tested = analyse(values_of(results, False, test_loss), baseline.name)
        known = None if pair & set(tested.uneven) else tested.noise
        again = analyse(values_of(fresh, True, test_loss), baseline.name, known)
        test = again.effects.get(best.name) or tested.effects.get(best.name)
    return Findings(study, results, points, search, best, confirmed, test, bits_per_unit(study.metric, results))


def winner(study: Study, results: list[Result], search: Analysis) -> Point | None:
    """The point, other than the baseline, with the best mean on the search's seeds; the runner confirms it if it leads.

    Only points whose every run counts are candidates: what diverges on one seed is not to be recommended. While no
    point is complete those with the most runs stand in, their differences adjusted for the seeds that are missing.
    None when no point can be compared with the baseline.
    """
    counts = {name: len(runs) for name, runs in values_of(results, False, lambda result: result.value).items()}
    candidates = {name: effect for name, effect in search.effects.items() if counts[name] == len(study.seeds)}
    failed = {result.point.name for result in results if result.status == "failed" and not result.confirmation}
    if not candidates:
        others = {name: effect for name, effect in search.effects.items() if name not in failed}
        most = max((counts[name] for name in others), default=0)
        candidates = {name: effect for name, effect in others.items() if counts[name] == most}
    if not candidates:
        return None
    sign = 1 if study.minimize else -1
    best = min(candidates, key=lambda name: sign * candidates[name].difference)
    return next(result.point for result in results if result.point.name == best)


def test_loss(result: Result) -> float | None:
    """test/loss of a run's best checkpoint."""
    return result.number("test/loss")


def values_of(results: list[Result], confirmation: bool, value: Callable[[Result], float | None]) -> Values:
    """Point → seed → a value of each run that counts and has one."""
    values: dict[str, dict[int, float]] = {}
    for result in results:
        held = value(result) if result.value is not None and result.confirmation == confirmation else None
        if held is not None:
            values.setdefault(result.point.name, {})[result.seed] = held
    return values


def bits_per_unit(metric: str, results: list[Result]) -> float | None:
    """Bits per byte in a nat per token; None when the metric is no loss or the runs differ in their tokens."""
    if UNITS.get(metric) != "nats per token":
        return None
    ratios = []
    for result in results:
        loss, bits = result.number("val/loss"), result.number("val/bits_per_byte")
        if result.value is not None and loss and bits:
            ratios.append(bits / loss)
    if not ratios or max(ratios) > min(ratios) * (1 + 1e-4):
        return None
    return mean(ratios)


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


def chance(p: float | None) -> str:
    """A p value in words that do not pretend to more than it has."""
    if p is None:
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def adjusted(findings: Findings, effect: Effect, where: str = "") -> str:
    """How sure an effect of the search is with all points considered."""
    return f"{chance(effect.adjusted_p)}{where}, adjusted for {counted(len(findings.search.effects), 'point')}"


def answer(findings: Findings) -> list[str]:
    """What helps, by how much and how sure, in two sentences."""
    best, study = findings.winner, findings.study
    effect = findings.effect(best) if best else None
    if best is None or effect is None:
        return [
            "No point can be compared with the baseline yet.",
            "It takes finished runs of both on a common seed; python -m scripts.study run goes on where it stopped.",
        ]
    name, metric = short(best.name), study.metric
    verb = "lowers" if study.minimize else "raises"
    more_seeds = "Give the study at least three seeds (seeds: 3); the runs there are will be kept."
    if not findings.leads and findings.single_seed:
        return [
            f"One seed cannot tell an effect from luck: no point did better than the baseline, the nearest, {name}, "
            f"ended {findings.amount(effect.difference)} worse, and nothing says whether that is noise.",
            more_seeds,
        ]
    if not findings.leads:  # whether or not it was run on fresh seeds: there is no gain to confirm
        worse = sum(other.claimed for other in findings.search.effects.values())
        return [
            f"No point did better than the baseline: the nearest, {name}, ended {findings.amount(effect.difference)} "
            f"worse ({findings.interval(effect)}).",
            f"{worse} of {len(findings.search.effects)} points are distinguishably worse; keep the baseline.",
        ]
    if findings.confirmed is not None and findings.confirmed.p is not None:
        return answer_confirmed(findings, name, verb, effect, findings.confirmed)
    if findings.single_seed:
        return [
            f"One seed cannot tell an effect from luck: {name} came out best, {findings.amount(effect.difference)} "
            "better than the baseline, and nothing says whether that is noise.",
            more_seeds,
        ]
    if effect.claimed:
        return [
            f"{name} {verb} {metric} by {findings.amount(effect.difference)} against the baseline "
            f"({findings.interval(effect)}).",
            f"That is more than noise ({adjusted(findings, effect)}), but it was chosen on these very seeds, which "
            "flatters it, and has not been confirmed on fresh ones.",
        ]
    lead = f"The best, {name}, leads by {findings.amount(effect.difference)} ({findings.interval(effect)})."
    return [nothing(findings), f"{lead}{planning(findings, effect)}"]


def answer_confirmed(findings: Findings, name: str, verb: str, effect: Effect, confirmed: Effect) -> list[str]:
    """The two sentences when the winner was run again on fresh seeds."""
    seeds = counted(confirmed.seeds, "fresh seed")
    searched = adjusted(findings, effect, " in the search")
    if findings.single_seed:
        searched = "the search had one seed and could not tell"
    sure = confirmed.p is not None and confirmed.p < 1 - CONFIDENCE
    if sure and findings.better(confirmed):
        test = ""
        if findings.test is not None and any(findings.of(findings.winner or findings.points[0], True)):
            way = "lower" if findings.test.difference < 0 else "higher"
            ends = findings.interval(findings.test, bits=False)
            test = f", and test/loss is {abs(findings.test.difference):.4f} {way} there ({ends})"
        return [
            f"{name} {verb} {findings.study.metric} by {findings.amount(confirmed.difference)} against the baseline "
            f"({findings.interval(confirmed)}).",
            f"This was measured on {seeds} on which nothing was chosen ({chance(confirmed.p)}; {searched}){test}.",
        ]
    way, more = "worse", ""
    if findings.better(confirmed):  # what the search showed is flattered, so that it plans nothing
        way, more = "better", planning(findings, confirmed)
    return [
        nothing(findings) if not sure else f"{name} won the search but does not help.",
        f"{name} led the search by {findings.amount(effect.difference)}; on {seeds} it is "
        f"{abs(confirmed.difference):.4f} {way} than the baseline ({findings.interval(confirmed)}).{more}",
    ]


def nothing(findings: Findings) -> str:
    """The sentence of a study that shows no gain; the search may have found harm, or a gain that was not confirmed."""
    worse = [effect for effect in findings.search.effects.values() if effect.claimed and not findings.better(effect)]
    smallest, sd = findings.search.smallest, findings.search.noise.sd
    some = f" ({len(worse)} of {len(findings.search.effects)} points are distinguishably worse)" if worse else ""
    gained = [point for point in findings.ranked() if (effect := findings.effect(point)) and effect.claimed]
    gained = [point for point in gained if findings.better(findings.search.effects[point.name])]
    if gained:
        point = findings.winner if findings.winner in gained else gained[0]
        effect, name = findings.search.effects[point.name], short(point.name)
        fate = "but it has not been run on fresh seeds"
        if point == findings.winner and findings.confirmed is not None:
            fate = f"but that was not confirmed on {counted(findings.confirmed.seeds, 'fresh seed')}"
        sure = adjusted(findings, effect)
        return f"{name} did better than the baseline in the search ({sure}), {fate}."
    if sd is None:
        return f"No gain here is distinguishable from noise{some}."
    luck = f"runs differ by {sd:.4f} {findings.unit} (standard deviation) from luck alone"
    if smallest is not None:
        luck += f", and this study sees true differences from {smallest:.4f} on"
    return f"No gain here is distinguishable from noise{some}: {luck}."


def planning(findings: Findings, effect: Effect) -> str:
    """A sentence on how many seeds would settle an effect of this size; empty where the common noise says nothing."""
    if findings.search.noise.sd is None:
        return " The search needs at least three seeds to tell more."
    if findings.search.smallest is None:
        return ""
    needed = seeds_needed(effect.difference, findings.search.noise.sd, len(findings.search.effects))
    count = "more than 10,000" if needed is None else f"about {needed:,}"
    return f" To see a true difference of {abs(effect.difference):.4f} a study like this needs {count} seeds."


def cautions(findings: Findings) -> list[str]:
    """What a reader should know before believing the answer."""
    study, results = findings.study, findings.results
    lines = list(study.warnings())
    failed = [result for result in results if result.status == "failed"]
    open_ones = [result for result in results if result.status in ("running", "preempted", "waiting")]
    if failed:
        names = ", ".join(dict.fromkeys(short(result.point.name) for result in failed))
        lines.append(f"{len(failed)} of {len(results)} runs failed ({names}); they are listed below with their reason")
    if open_ones:
        lines.append(f"{len(open_ones)} of {len(results)} runs are not finished; the numbers will still move")
    if findings.search.uneven:
        names = "; ".join(map(short, findings.search.uneven))
        lines.append(
            f"more varied from seed to seed than the other points: {names} (weak regularizers follow the baseline's "
            "run closely and these do not; a seed that diverged is another reason); they are kept out of the common "
            "noise, and compared by their own and the baseline's runs alone"
        )
    if findings.winner is not None and not findings.single_seed:
        effect = findings.effect(findings.winner)
        if findings.confirmed is None and effect is not None and findings.better(effect):
            lines.append(
                f"{short(findings.winner.name)} has not been run on fresh seeds: its lead is measured on the seeds on "
                "which it was chosen, and its test/loss too"
            )
    if any(result.summary.get("stopped_early") for result in results):
        lines.append("runs that were stopped early count with the best evaluation, whose weights they restored")
    for what in ("versions", "hardware"):
        if len({repr(result.summary.get(what)) for result in results if result.value is not None}) > 1:
            lines.append(f"the runs differ in their {what}, see the end of this page; differences may be theirs")
    return lines
