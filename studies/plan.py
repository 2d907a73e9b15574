"""Before the runs: what a study could see, what it would cost, and what is registered; after them: its card.

A pilot runs a few pairs on seeds of their own, which no later stage uses, and tells how much a pair's difference
varies. What is to be compared, and how, is then frozen in registered.json; the report lists where the study went
another way.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

from scipy import stats

import files
from config import BadInput, Config
from data.prepare import prepare
from data.shards import Corpus
from program import FAILED, FINISHED, cores, warn
from studies import decision, processes
from studies.design import runs_of
from studies.findings import UNITS, answer, cautions, find
from studies.queue import as_stored
from studies.results import Result, read_result
from studies.runner import run_pairs
from studies.space import N_TUNING_SEEDS, PILOT_SEEDS, Point, Study
from tracking.run_directory import git_commit, is_free, read_summary

SEEDS = (4, 8, 16, 32)  # for which power is shown, besides the study's own
MULTIPLES = (0.5, 1.0, 2.0)  # of the spread: the effects for which it is shown
REGISTERED = ("name", "points", "base", "metric", "seeds", "confirm_seeds", "tune", "alpha")


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


# ---------------------------------------------------------------------------------------------- registration


def register(study: Study, file: Path) -> Path:
    """Write down what the study is to be."""
    corpora = {Corpus.open(prepare(study.config(point, 0).data), verify=False).fingerprint for point in study.points()}
    commit = git_commit()
    if commit.endswith("+"):
        warn(f"the code differs from commit {commit[:-1]}; committed first, the registration would say what it was")
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    study.directory.mkdir(parents=True, exist_ok=True)
    files.write_json(file, {"time": when} | terms(study) | {"commit": commit, "corpora": sorted(corpora)})
    return file


def terms(study: Study) -> dict[str, Any]:
    """What of a study file is registered: who is compared with whom, on what, by which rule."""
    default = Config().flat()
    flat = study.config(Point("base", {}), 0).flat()
    aside = ("run.seed", "run.threads")
    base = {key: value for key, value in flat.items() if not is_free(key) and key not in aside}
    chosen = {"trials": study.trials, "space": study.space} if study.search == "tpe" else {}
    content = {
        "name": study.name,
        "points": {point.name: point.knobs for point in (study.points()[:1] if chosen else study.points())},
        "base": {key: value for key, value in base.items() if value != default[key]},
        "metric": study.metric,
        "seeds": study.seeds,
        "confirm_seeds": study.confirm_seeds,
        "tune": study.tune,
        "alpha": decision.ALPHA,
    }
    return dict(as_stored(content | chosen))


def registration(study: Study) -> dict[str, Any] | None:
    """What registered.json says; None when the study was not registered. Raises BadInput when it cannot be read."""
    file = study.directory / "registered.json"
    if not file.exists():
        return None
    try:
        held = dict(json.loads(file.read_text()))
        if {"time", "commit", "corpora", *REGISTERED} <= {*held}:
            return held
    except (OSError, ValueError):
        pass
    raise BadInput(f"{file} is damaged: it says what the study was to be; restore it from a copy")


def deviations(study: Study) -> list[str]:
    """Where the study, and the runs made so far, differ from what was registered, each in a line."""
    held = registration(study)
    if held is None:
        return []
    now, default = terms(study), Config().flat()
    before, after = held["points"], now["points"]
    lines = [f"point {name} was added" for name in after if name not in before]
    lines += [f"point {name} was left out" for name in before if name not in after]
    changed = [name for name in after if before.get(name, after[name]) != after[name]]
    lines += [differs(f"point {name}", after[name], before[name]) for name in changed]
    for knob in dict.fromkeys([*now["base"], *held["base"]]):
        pair = [base.get(knob, default.get(knob)) for base in (now["base"], held["base"])]
        lines += [differs(knob, *pair)] if pair[0] != pair[1] else []
    for key in (*REGISTERED, "trials", "space"):
        if key not in ("points", "base") and now.get(key) != held.get(key):
            lines.append(differs(key, now.get(key), held.get(key)))
    summaries = [read_summary(directory) for directory in begun(study)]
    commits = {commit for run in summaries if (commit := run.get("versions", {}).get("commit")) is not None}
    corpora = {corpus for run in summaries if (corpus := run.get("corpus")) is not None}
    if others := sorted(commits - {held["commit"]}):
        lines.append(f"runs were made by the code of commit {', '.join(others)}, registered was {held['commit']}")
    if others := sorted(corpora - {*held["corpora"]}):
        lines.append(f"runs were made on the corpus {', '.join(others)}, registered was {', '.join(held['corpora'])}")
    return lines


def differs(what: str, now: Any, before: Any) -> str:
    """A deviation in words."""
    return f"{what} is {json.dumps(now)}, registered was {json.dumps(before)}"


def begun(study: Study) -> list[Path]:
    """Directories of the runs from which the study draws: all but pilots and other amounts of text."""
    found = [(path, re.search(r"-seed(\d+)$", path.name)) for path in sorted(study.directory.glob("*-seed*"))]
    return [path for path, seed in found if seed and int(seed[1]) < PILOT_SEEDS]


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
