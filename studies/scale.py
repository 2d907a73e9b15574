"""What a regularizer is worth in text: how much more of it would bring the baseline to the winner's loss.

Both are trained on several amounts of text, on seeds of their own. loss = E + A/D^a is fitted to the baseline's means
by least squares, and the worth is where that curve has fallen by the winner's gain. Uncertainty comes from resampling
the seeds, the same ones at all amounts and for both sides; since few seeds resampled vary too little, the spread is
widened by n/(n-1) and taken with Student's t. An amount is in the interval of the worth when the fall of the curve to
it cannot be told from the gain, so that an end may well be open. Beyond the largest amount nothing is told unless the
curve fitted without it meets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

import files
import pictures
from config import BadInput
from data.mixtures import open_data
from program import FINISHED
from randomness import numpy_generator
from studies.findings import Findings, counted, find, short
from studies.results import read_result
from studies.runner import run_pairs
from studies.space import SCALE_SEEDS, Point, Study

RESAMPLES = 500
BEYOND = 4  # times the largest amount of text: further the curve is never followed

Losses = Mapping[int, Mapping[int, float]]  # amount of text, or width -> seed -> loss
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Worth:
    """Times the text. 0 and infinity stand for below and above all that can be told."""

    times: float
    low: float
    high: float
    least: float  # the smallest and the largest worth that can be told from these amounts
    most: float
    why_not: str  # nothing is told beyond the largest amount; empty: it is

    def words(self) -> str:
        """The worth with its interval, as far as it can be told; empty when it cannot."""
        if 0 < self.times < math.inf and (self.low, self.high) != (0, math.inf):
            low = written(self.low) if self.low else f"less than {written(self.least)}"
            high = written(self.high) if self.high < math.inf else f"more than {written(self.most)}"
            nothing = "; none at all is in the interval" if self.low <= 1 <= self.high else ""
            return f"equals {written(self.times)} times the text (95% interval {low} to {high}{nothing})"
        if self.times == math.inf and self.low > 1:
            return f"is worth more than {written(min(self.low, self.most))} times the text"
        if self.times == 0 and self.high < 1:
            return f"is worth less than {written(max(self.high, self.least))} times the text"
        return ""


@dataclass(frozen=True)
class Trend:
    """How a gain changes as text or width grow: per doubling, with its 95% interval."""

    word: str  # holds, grows, shrinks, flips, cannot be told
    slope: float
    low: float
    high: float
    first: float  # the gain at the smallest and at the largest, on the line
    last: float


def fit(sizes: Numbers, means: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """E >= 0, A >= 0 and a in (0, 2] of loss = E + A/D^a by least squares, for each row of ``means`` (..., sizes).

    For a given a the rest is linear, so that only a is searched for, on finer and finer grids.
    """
    means, back = np.unique(means, axis=0, return_inverse=True)  # of few seeds most resamples come again and again
    scale = math.exp(np.log(sizes).mean())
    low, high = np.full(len(means), 0.01), np.full(len(means), 2.0)
    for _ in range(6):
        exponents = np.linspace(low, high, 21, axis=1)
        powers = (sizes / scale) ** -exponents[..., None]  # (rows, exponents, sizes)
        losses = means[:, None]
        middle = powers.mean(-1, keepdims=True)
        slope = ((powers - middle) * losses).sum(-1) / ((powers - middle) ** 2).sum(-1)
        free = losses.mean(-1) - slope * middle[..., 0]
        slope = np.where(free < 0, (powers * losses).sum(-1) / (powers**2).sum(-1), slope)
        floor = np.where(slope < 0, losses.mean(-1), np.maximum(free, 0))
        slope = np.maximum(slope, 0)
        errors = ((floor[..., None] + slope[..., None] * powers - losses) ** 2).sum(-1)
        rows, best = np.arange(len(means)), errors.argmin(1)
        found = floor[rows, best], slope[rows, best] * scale ** exponents[rows, best], exponents[rows, best]
        low, high = exponents[rows, np.maximum(best - 1, 0)], exponents[rows, np.minimum(best + 1, 20)]
    return found[0][back], found[1][back], found[2][back]


def at_sizes(law: tuple[Numbers, Numbers, Numbers], sizes: Numbers) -> Numbers:
    """The curves' losses (rows, sizes)."""
    floor, factor, exponent = (part[:, None] for part in law)
    return np.asarray(floor + factor * sizes**-exponent)


def table(losses: Losses) -> tuple[Numbers, Numbers]:
    """Sizes, ascending, and losses (sizes, seeds), the seeds in one order."""
    sizes = sorted(losses)
    seeds = sorted(losses[sizes[0]])
    return np.array(sizes, dtype=float), np.array([[losses[size][seed] for seed in seeds] for size in sizes])


def draw(seeds: int) -> tuple[Numbers, float]:
    """Weights of the seeds in each resample, after a first row that weighs all alike; how many spreads are 95%."""
    counts = numpy_generator(0, "resampled seeds").multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES)
    reach = float(stats.t.isf(0.025, seeds - 1)) * math.sqrt(seeds / (seeds - 1))
    return np.vstack([np.full(seeds, 1 / seeds), counts / seeds]), reach


def worth(baseline: Losses, winner: Losses, at: int) -> Worth:
    """What the winner's gain at ``at`` tokens is worth: the same seeds, at least two, in all runs of both."""
    sizes, losses = table(baseline)
    weights, reach = draw(losses.shape[1])
    why_not = held_out(sizes, losses)
    end = sizes[-1] * (1 if why_not else BEYOND)
    tokens = np.geomspace(sizes[0], end, 400)
    laws = fit(sizes, weights @ losses.T)
    gain = weights @ (losses - table(winner)[1])[list(sizes).index(at)]
    # How much higher than the winner's loss the curve still is, in each resample (rows, tokens).
    left = at_sizes(laws, tokens) - at_sizes(laws, np.array([float(at)])) + gain[:, None]
    margin, logs = reach * left[1:].std(0), np.log(tokens / at)
    times, low = crossing(logs, left[0]), crossing(logs, left[0] - margin)
    high = crossing(-logs[::-1], -(left[0] + margin)[::-1])  # backwards: the last, if there are several
    return Worth(times, low, 1 / high if high else math.inf, float(sizes[0] / at), float(end / at), why_not)


def crossing(logs: Numbers, values: Numbers) -> float:
    """Where the values fall to 0 first: 0 if they are there from the start, infinity if they never are."""
    below = np.flatnonzero(values <= 0)
    if not len(below):
        return math.inf
    first = below[0]
    if first == 0:
        return 0.0
    return math.exp(np.interp(0, -values[first - 1 : first + 1], logs[first - 1 : first + 1]))


def held_out(sizes: Numbers, losses: Numbers) -> str:
    """Why the curve may not be followed beyond the largest amount; empty when it may."""
    if len(sizes) < 4:
        return "three amounts of text cannot test the curve"
    weights, reach = draw(losses.shape[1])
    means = weights @ losses.T
    missed = at_sizes(fit(sizes[:-1], means[:, :-1]), sizes[-1:])[:, 0] - means[:, -1]
    allowed = reach * missed[1:].std() + 1e-5 * abs(means[0, -1])
    if abs(missed[0]) <= allowed:
        return ""
    return f"fitted without the largest amount, the curve misses it by {abs(missed[0]):.4f}"


def trend(gains: Losses) -> Trend:
    """How the gain changes with the logarithm of text or width: a line for each seed, Student's t over the seeds."""
    sizes, values = table(gains)
    logs = np.log2(sizes)
    slopes, starts = np.polyfit(logs, values, 1).round(12)  # what is rounding is no slope
    slope, first, last = (interval(part) for part in (slopes, starts + slopes * logs[0], starts + slopes * logs[-1]))
    middle = interval(values.mean(0))
    change = max(abs(slope[1]), abs(slope[2])) * (logs[-1] - logs[0])
    if sure(slope):
        flipped = sure(first) * sure(last) < 0
        word = "flips" if flipped else "grows" if abs(last[0]) > abs(first[0]) else "shrinks"
    else:
        word = "holds" if sure(middle) and change < abs(middle[0]) / 2 else "cannot be told"
    return Trend(word, *slope, first[0], last[0])


def interval(values: Numbers) -> tuple[float, float, float]:
    """Mean of one value a seed, and the ends of its 95% interval."""
    reach = float(stats.t.isf(0.025, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    mean = float(values.mean())
    return mean, mean - reach, mean + reach


def sure(ends: tuple[float, float, float]) -> int:
    """The sign, 0 when it cannot be told."""
    return (ends[1] > 0) - (ends[2] < 0)


# ---------------------------------------------------------------------------------------------- the command


def scale(study: Study) -> int:
    """Train winner and baseline on several amounts of text, and say what the winner is worth; the exit code.

    Raises BadInput when the study has no winner yet, for a metric that is no loss, and for amounts that the text does
    not have.
    """
    findings = find(study)
    winner, baseline = findings.design.winner, findings.design.baseline
    if findings.design.stage != "done":
        raise BadInput(f"the study is at its {findings.design.stage}; finish it first: python -m scripts.study run")
    if winner is None:
        raise BadInput("no point did better than the baseline, so that there is nothing to scale")
    if not study.minimize:
        raise BadInput(f"losses are fitted, and {study.metric} rises; give the study the metric val/loss")
    sizes, at = amounts(study, baseline)
    seeds = range(SCALE_SEEDS, SCALE_SEEDS + study.scale.seeds)
    asked = {size: {"data.train_tokens": size} for size in sizes}
    wider = {width: {"data.train_tokens": at, "model.d_model": width} for width in study.scale.widths}
    sides = (baseline, winner)
    every = [study.variation(side, knobs) for knobs in (*asked.values(), *wider.values()) for side in sides]
    print(f"scale             {winner.name} and the baseline at {', '.join(f'{size:,}' for size in sizes)} tokens")
    code = run_pairs(study, [(point, seed) for point in every for seed in seeds])
    if code != FINISHED:
        return code
    by_text = [losses_of(study, side, asked, seeds) for side in sides]
    by_width = [losses_of(study, side, wider, seeds) for side in sides]
    found = worth(by_text[0], by_text[1], at)
    trends = {"tokens": trend(gains(by_text))} | ({"d_model": trend(gains(by_width))} if wider else {})
    lines = sentences(findings, found, trends, by_text[0], at)
    drawn = {"baseline": curve(by_text[0]), short(winner.origin or winner.name): curve(by_text[1])}
    pictures.save(pictures.scaling(drawn, study.metric), study.directory / "scale.png")
    content = {
        "name": study.name, "metric": study.metric, "baseline": baseline.name, "winner": winner.name, "at": at,
        "losses": dict(zip(("baseline", "winner"), by_text, strict=True)),
        "losses_by_width": dict(zip(("baseline", "winner"), by_width, strict=True)) if wider else None,
        "fits": dict(zip(("baseline", "winner"), (one["law"] for one in drawn.values()), strict=True)),
        "worth": {key: value if value not in (0, math.inf) else None for key, value in asdict(found).items()},
        "trends": {key: asdict(one) for key, one in trends.items()},
        "answer": lines,
    }  # fmt: skip
    files.write_json(study.directory / "scale.json", content)
    print("\n".join(["", *lines, "", f"picture           {study.directory / 'scale.png'}"]))
    return FINISHED


def amounts(study: Study, baseline: Point) -> tuple[list[int], int]:
    """Amounts of text, ascending, and that at which the worth is told: the base's own, else the largest given."""
    data, asked = study.config(baseline, 0).data, study.scale.train_tokens
    at = data.train_tokens or (asked or [0])[-1]
    if not at:
        raise BadInput(
            "the base trains on all of its text; give the study file amounts of it, "
            "as in scale: {train_tokens: [100000, 200000, 400000]}, or the base data.train_tokens"
        )
    there = open_data(data, verify=False).split("train").n_tokens
    sizes = sorted({at, *(asked or [at // 4, at // 2, *([2 * at] if 2 * at <= there else [])])})
    if sizes[-1] > there:
        raise BadInput(f"the text has {there:,} training tokens, and {sizes[-1]:,} are asked for")
    return sizes, at


def losses_of(study: Study, side: Point, knobs: Mapping[int, dict[str, Any]], seeds: range) -> Losses:
    """Size -> seed -> the metric of one side. Raises BadInput for a run that has none."""
    found: dict[int, dict[int, float]] = {}
    for size, changed in knobs.items():
        for seed in seeds:
            run = read_result(study, study.variation(side, changed), seed)
            if run.value is None:
                raise BadInput(f"{run.directory}: {run.reason}; without it the others would flatter one side")
            found.setdefault(size, {})[seed] = run.value
    return found


def gains(sides: list[Losses]) -> Losses:
    """Baseline minus winner."""
    return {size: {seed: loss - sides[1][size][seed] for seed, loss in runs.items()} for size, runs in sides[0].items()}


def curve(losses: Losses) -> dict[str, Any]:
    """The fit of one side with its band, and the runs, to be drawn."""
    sizes, values = table(losses)
    weights, reach = draw(values.shape[1])
    tokens, laws = np.geomspace(sizes[0], sizes[-1], 100), fit(sizes, weights @ values.T)
    curves = at_sizes(laws, tokens)
    band = reach * curves[1:].std(0)
    law = {name: float(part[0]) for name, part in zip("EAa", laws, strict=True)}
    return {"law": law, "tokens": tokens, "mean": curves[0], "band": band, "sizes": sizes, "values": values}


def sentences(findings: Findings, found: Worth, trends: Mapping[str, Trend], baseline: Losses, at: int) -> list[str]:
    """What the winner is worth, where the gain goes, and how sure that is."""
    best, sizes = findings.design.winner, sorted(baseline)
    name = short(best.origin or best.name) if best else ""
    told = found.words()
    lines = [f"At {at:,} tokens {name} {told}." if told else f"What {name} is worth in text cannot be told."]
    for what, one in trends.items():
        told = f"{one.first:+.4f} at the smallest and {one.last:+.4f} at the largest, {one.slope:+.4f} a doubling"
        told += f" (95% interval {one.low:+.4f} to {one.high:+.4f})"
        goes = "whether the gain lasts cannot be told" if one.word == "cannot be told" else f"the gain {one.word}"
        lines.append(f"As {'the text' if what == 'tokens' else 'd_model'} grows {goes}: {told}.")
    beyond = f"so that nothing is told beyond {sizes[-1]:,} tokens"
    tested = f"{found.why_not}, {beyond}" if found.why_not else "the curve fitted without the largest amount meets it"
    claimed = "" if findings.claimed else " The study itself does not claim that this point is better."
    rate = f", at learning rates tuned for {at:,}" if findings.study.tune else ""
    seeds = counted(len(baseline[at]), "seed")
    return [*lines, f"This is from {seeds} at {len(sizes)} amounts of text{rate}; {tested}.{claimed}"]


def written(times: float) -> str:
    """Two digits."""
    return f"{times:.1f}" if 1 <= times < 10 else f"{times:.2g}"
