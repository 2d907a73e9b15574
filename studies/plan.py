"""Before the runs: what a study could see, what it would cost, and what is registered; after them: its card.

A pilot runs a few pairs on seeds of their own, which no later stage uses, and tells how much a pair's difference
varies. What is to be compared, and how, is then frozen in registered.json; the report lists where the study went
another way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from scipy import stats

import files
from config import BadInput
from program import FAILED, FINISHED, cores, warn
from studies import decision, processes
from studies.design import runs_of
from studies.findings import UNITS, answer, cautions, find
from studies.record import begun, deviations, register, registration
from studies.results import Result, read_result
from studies.runner import run_pairs
from studies.space import N_TUNING_SEEDS, PILOT_SEEDS, Point, Study

SEEDS = (4, 8, 16, 32)  # for which power is shown, besides the study's own
MULTIPLES = (0.5, 1.0, 2.0)  # of the spread: the effects for which it is shown


def plan(study: Study, pilot: int, name: str | None = None, effects: list[float] | None = None) -> int:
    """Run ``pilot`` pairs, print what the study could see and would cost, and register it; returns the exit code.

    Raises BadInput when runs of the study are there already: what is registered after them is no plan.
    """
    file = study.directory / "registered.json"
    if begun(study):
        held = f"is registered in {file}" if file.exists() else "was not registered before"
        raise BadInput(
            f"{study.directory} holds runs of the study, which {held}, and a plan made after them is none; "
            "go on with `run` (the report lists what differs from a registration), or give the study another 'name'"
        )
    results: list[Result] = []
    if pilot:
        baseline, point = study.points()[0], pilot_point(study, name)
        pairs = [(one, PILOT_SEEDS + number) for number in range(pilot) for one in (baseline, point)]
        print(f"pilot             {point.name} and the baseline on {pilot} seeds used for nothing else", flush=True)
        code = run_pairs(study, pairs)
        results = [read_result(study, *pair) for pair in pairs]
        failed = [f"{run.point.name} seed {run.seed}: {run.reason}" for run in results if run.status == "failed"]
        for line in failed:
            warn(f"{line}; nothing is registered")
        if code != FINISHED or failed:
            return code or FAILED
        mine, its = (
            {run.seed: run.value for run in results if run.point == one and run.value is not None}
            for one in (point, baseline)
        )
        differences = decision.paired(mine, its)
        print("\n".join([*spread_lines(study, differences), *power_lines(study, differences, effects)]))
    print("\n".join(cost_lines(study, results)))
    print(f"registered        {register(study, file)}")
    return FINISHED


def pilot_point(study: Study, name: str | None) -> Point:
    """The point of that name, or the last of the study file."""
    points = {point.name: point for point in study.points()[1:]}
    if not points:
        raise BadInput("a search has no points before it begins; --pilot 0 registers it without pilot runs")
    if name is not None and name not in points:
        raise BadInput(f"no point is named {name!r}; there are {', '.join(points)}")
    return points[name] if name else list(points.values())[-1]


def spread_lines(study: Study, differences: list[float]) -> list[str]:
    """How much the difference of a pair varies, and how little so few pairs tell of it."""
    count = len(differences)
    mean = f"difference        {fmean(differences):+.4f} {unit(study)} on average, which claims nothing"
    if count < 2:
        return [mean, "spread            one pair shows none; --pilot 2 is the least that does"]
    sd, (low, high) = spread(differences)
    doubt = f"spread            one pair's difference varies by {sd:.4f} (95% interval {low:.4f} to {high:.4f})"
    if count > 4:
        return [mean, doubt]
    wide = f"{count} pairs hardly tell the spread: it may be {high / sd:.0f} times as large" if sd else ""
    return [mean, doubt, *([f"                  {wide}; --pilot 10 says it within a factor of two"] if wide else [])]


def spread(differences: list[float]) -> tuple[float, tuple[float, float]]:
    """Standard deviation of the differences with its 95% interval (chi-square, for Gaussian ones)."""
    degrees = len(differences) - 1
    total = decision.squares(differences)
    ends = (math.sqrt(total / float(stats.chi2.ppf(share, degrees))) for share in (0.975, 0.025))
    return math.sqrt(total / degrees), (next(ends), next(ends))


def power_lines(study: Study, differences: list[float], effects: list[float] | None) -> list[str]:
    """A table: the chance that a true effect is claimed at several numbers of fresh seeds, and the seeds for 80%."""
    if len(differences) < 2:
        return []
    sd, ends = spread(differences)
    if not sd:
        return ["power             the pairs did not differ in their differences; no power can be told"]
    counts = sorted({*SEEDS, *([study.confirm_seeds] if study.confirm_seeds else [])})
    earlier = (N_TUNING_SEEDS if study.tune else len(study.seeds)) - 1  # degrees of freedom that the winner brings
    heads = "".join(f"{count:>6}" for count in counts)
    lines = ["power             the chance that a true gain is claimed, by the number of fresh seeds;"]
    lines += ["                  for a point that the search put first, and a spread as the pilot's"]
    lines += [f"{'true gain':>16}  {heads}   seeds for 80% (at the ends of the spread's interval)"]
    for effect in effects or [multiple * sd for multiple in MULTIPLES]:
        chances = [decision.power_of(effect, sd, count, earlier + count - 1) for count in counts]
        few, needed, many = (told(decision.seeds_needed(effect, size, earlier)) for size in (ends[0], sd, ends[1]))
        lines.append(
            f"{effect:>16.4f}  {''.join(f'{chance:>6.0%}' for chance in chances)}   {needed} ({few} to {many})"
        )
    return lines


def told(seeds: int | None) -> str:
    """A number of seeds in words."""
    return f"over {decision.MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"


def cost_lines(study: Study, results: list[Result]) -> list[str]:
    """Runs of the whole design, and hours."""
    counts = runs_of(study, len(study.points()) - 1)
    total = sum(counts.values())
    stages = ", ".join(f"{count} {stage}" for stage, count in counts.items() if count)
    lines = [f"runs              {total} ({stages}); more where the best learning rate lies at the end of those tried"]
    if seconds := [taken for run in results if (taken := seconds_of(run))]:
        many = len(processes.gpus()) or cores()
        workers = many if study.workers == "auto" else study.workers
        hours = total * median(seconds) / workers / 3600
        lines.append(
            f"time              {median(seconds):.0f} s a run, {hours:.1f} hours in all at {workers} at a time"
        )
    return lines


def seconds_of(run: Result) -> float:
    """From the start of its process to its end; of a run that was interrupted, at least those of its steps."""
    lock, summary = run.directory / "lock", run.directory / "summary.json"
    span = summary.stat().st_mtime - lock.stat().st_mtime if lock.exists() and summary.exists() else 0.0
    return max(span, run.number("seconds") or 0.0)


# ---------------------------------------------------------------------------------------------- the card


def card(study: Study) -> str:
    """Write card.json, what was asked, found and how sure, and return its text."""
    findings = find(study)
    best, decided = findings.winner, findings.decision
    held = registration(study)
    counted = [run for run in findings.results if run.value is not None]
    summaries = [run.summary for run in counted]
    points = {row.point: {"difference": row.mean, "sd": row.sd, "seeds": row.seeds} for row in findings.rows}
    for row in findings.rows:
        points[row.point] |= {"failed": len(row.failed), "unchanged": row.unchanged}
    content = {
        "name": study.name,
        "asked": {
            "question": f"which point has a better {study.metric} than the baseline?",
            "points": {point.name: point.knobs for point in findings.points},
            "metric": study.metric,
            "minimize": study.minimize,
            **{key: distinct(run.get(key) for run in summaries) for key in ("corpus", "parameters", "steps", "tokens")},
        },
        "found": {
            "claim": decided.claim,
            "why_not": decision.WHY_NOT.get(decided.why_not),
            "winner": best and best.name,
            "multiples_of_the_rate": findings.design.chosen or None,
            **{key: getattr(decided, key) for key in ("difference", "low", "high", "p", "sd", "seeds")},
            "confidence": 1 - decided.alpha,
            "look": findings.look,
            "test_difference": findings.test and findings.test.difference,
            "unit": findings.unit,
            "answer": answer(findings),
            "cautions": cautions(findings),
        },
        "search": points,
        "registered": held and held["time"],
        "deviations": deviations(study),
        "versions": distinct(run.get("versions") for run in summaries),
    }
    files.write_json(study.directory / "card.json", content)
    return json.dumps(content, indent=1)


def distinct(values: Iterable[Any]) -> Any:
    """The value if there is only one, else a list of all there are."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found[0] if len(found) == 1 else found


def unit(study: Study) -> str:
    """Unit of the study's metric, in words."""
    return UNITS.get(study.metric.removeprefix("best "), study.metric)
