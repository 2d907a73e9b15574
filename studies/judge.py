"""The referee: is one group of runs better than another, worse, or can it not be told yet?

Groups are run directories of any origin, or points of a CSV table from anyone's framework. What was not measured alike
is refused. Runs on the same seed are paired. Looking again at groups that have grown gives luck another chance, so each
look is written down and has less of the 5% than the one before.
"""

from __future__ import annotations

import csv
import difflib
import glob
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import files
from config import BadInput, Config
from program import warn
from studies.decision import Decision, judge_groups, judge_pairs, level, once_in, paired, seeds_needed
from studies.record import count_look, number_of, read_looks
from studies.results import DIVERGED, FINISHED, metric_value
from studies.space import FRESH_SEEDS, METRICS, TUNING_SEEDS
from tracking.run_directory import HARDWARE, is_free, read_config, read_summary

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
EXIT_CODES = {BETTER: 0, UNDECIDED: 10, WORSE: 11}
BUDGET = ("tokens", "steps")
MEASURED_ON = ("evaluation.max_tokens", "data.isolate_documents")  # knobs that change what is measured
UNITS = {"loss": " nats per token", "entropy": " nats", "log_z": " nats", "bits_per_byte": " bits per byte"}
MOST_BYTES = 2**26  # of a table
SHOWN = 6  # names in a message


@dataclass(frozen=True)
class Run:
    """A run that counts: what makes its group, and what must be equal for all runs that are compared."""

    place: str  # its directory, or file and line of a table
    seed: int
    value: float
    knobs: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is judged, the first group against the second, and where looks at it are recorded."""

    names: tuple[str, str]
    groups: tuple[list[Run], list[Run]]
    subject: str  # the same when the groups grow, and whichever stands first
    metric: str
    record: Path
    notes: list[str]

    @property
    def values(self) -> list[dict[int, float]]:
        """Seed -> value of each group."""
        return [{run.seed: run.value for run in group} for group in self.groups]


@dataclass(frozen=True)
class Verdict:
    """``difference`` is the first group minus the second; ``decision`` has how sure it is."""

    word: str  # better, worse, undecided
    difference: float
    decision: Decision
    pairs: int  # 0: not paired
    unpaired: tuple[int, int]  # runs of each group that are not in a pair; they count only where nothing is paired


def verdict_of(mine: dict[int, float], its: dict[int, float], look: int, minimize: bool = True) -> Verdict:
    """The verdict on two groups {seed: value} at the ``look``-th look.

    Paired by seed (Student's t) where at least two seeds, and half of the smaller group, are shared; else Welch's t.
    A look may claim in both directions, each with half of its share: all looks together are wrong in at most 5%.
    """
    alpha = level(look) / 2
    differences = paired(mine, its)
    pairs = len(differences) if len(differences) >= max(2, min(len(mine), len(its)) / 2) else 0
    if pairs:
        difference, decision = fmean(differences), judge_pairs(differences, [], alpha)
    else:
        difference = fmean(mine.values()) - fmean(its.values())
        decision = judge_groups(mine.values(), its.values(), alpha)
    if decision.sd == 0:  # different seeds never give equal numbers: what is compared did nothing, or was rounded
        why_not = "no spread" if difference else "unchanged"
        decision = replace(decision, claim=None, why_not=why_not, p=None, low=None, high=None)
    gain = "lower" if minimize else "higher"
    word = UNDECIDED if decision.claim is None else BETTER if decision.claim == gain else WORSE
    return Verdict(word, difference, decision, pairs, (len(mine) - pairs, len(its) - pairs))


def more_seeds(verdict: Verdict, look: int) -> int | None:
    """Seeds that each group lacks for the next look to settle, in four of five cases, a true difference of this size.

    0 when it is settled; None when 10,000 would not do, or when the spread is not known.
    """
    if verdict.word != UNDECIDED:
        return 0
    if verdict.decision.why_not != "luck" or not verdict.decision.sd:
        return None
    needed = seeds_needed(verdict.difference, verdict.decision.sd, alpha=level(look + 1) / 2)
    return None if needed is None else max(1, needed - verdict.decision.seeds)


def judge(case: Case) -> tuple[Verdict, int | None]:
    """The verdict on a case, and which look at it this is: None when there are too few runs to claim anything."""
    mine, its = case.values
    look = None
    if min(len(mine), len(its)) > 1:
        seen = files.hash_of(sorted(sorted(values.items()) for values in case.values))
        try:
            look = count_look(case.record, case.subject, seen, {"metric": case.metric, "groups": list(case.names)})
        except OSError as problem:
            warn(f"this look is not recorded, later ones will not know of it: {case.record}: {problem.strerror}")
            look = number_of(seen, [entry["seen"] for entry in read_looks(case.record).get(case.subject, [])])
    return verdict_of(mine, its, look or 1, not case.metric.endswith("accuracy")), look


# ---------------------------------------------------------------------------------------------- what is judged


def case_of(
    mine: Sequence[str], its: Sequence[str], metric: str, table: str | None = None, allow_unequal: bool = False
) -> Case:
    """The case of two groups of run directories (paths and globs), or of points in a ``table``.

    Raises BadInput for what cannot be compared.
    """
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, 1)
        raise BadInput(f"unknown metric {metric!r}; " + (f"did you mean {near[0]}?" if near else listed(METRICS, 99)))
    notes: list[str] = []
    if table:
        home = Path(table).resolve().parent
        rows = read_table(Path(table), metric)
        first, second = (group_in_table(table, rows, points, notes) for points in (mine, its))
        names = listed(mine, 3), listed(its, 3)
        subject = files.hash_of([str(Path(table).resolve()), sorted([sorted(mine), sorted(its)])])
    else:
        paths = find_runs(mine), find_runs(its)
        first, second = ([read_run(path, metric) for path in group] for group in paths)
        home = min(Path(run.place).resolve().parent for run in [*first, *second])
        names = names_of(*paths)
    both = sorted({run.place for run in first} & {run.place for run in second})
    if both:
        raise BadInput(f"{both[0]} is in both groups; leave it out of one")
    identities = sorted(identity_of(group) for group in (first, second))
    notes += check_comparable([*first, *second], allow_unequal) + note_on_study(home, [*first, *second])
    subject = subject if table else files.hash_of(identities)
    return Case(names, (first, second), subject, metric, home / ".looks.json", notes)


def identity_of(group: Sequence[Run]) -> str:
    """What a group keeps when it grows; raises BadInput when it is not one config on several seeds."""
    by_seed: dict[int, Run] = {}
    for run in group:
        if run.seed in by_seed:
            raise BadInput(
                f"{by_seed[run.seed].place} and {run.place} have the same seed, {run.seed}, in one group; keep one"
            )
        by_seed[run.seed] = run
        if other := [knob for knob, value in run.knobs.items() if value != group[0].knobs[knob]]:
            raise BadInput(
                f"{group[0].place} and {run.place} are in one group but differ in {', '.join(other)}; a group is one "
                "config on several seeds. Judge one config at a time, or give the values as a table (--table)"
            )
    default = Config().flat()  # a knob that is added later, at its default, leaves the identity as it was
    return files.hash_of({knob: value for knob, value in group[0].knobs.items() if value != default[knob]})


def check_comparable(runs: Sequence[Run], allow_unequal: bool) -> list[str]:
    """Raises BadInput with all in which the runs differ though they must not; returns notes on what was allowed."""
    mistakes, notes = [], []
    for fact in runs[0].facts:
        places: dict[str, list[str]] = {}
        for run in runs:
            value = run.facts[fact]
            places.setdefault(f"{value:,}" if isinstance(value, int) else str(value)[:16], []).append(run.place)
        if len(places) == 1:
            continue
        differ = f"the runs differ in {fact}: " + "; ".join(
            f"{what} in {listed(held)}" for what, held in places.items()
        )
        if fact not in BUDGET:
            mistakes.append(f"{differ}. They were not measured on the same, and nothing makes that comparable")
        elif allow_unequal:
            notes.append(f"The budgets are unequal, as you allowed: {', '.join(places)} {fact}.")
        else:
            mistakes.append(f"{differ}. Give both the same budget, or judge them all the same: --allow-unequal")
    if mistakes:
        raise BadInput("\n".join(mistakes))
    return notes


def note_on_study(directory: Path, runs: Sequence[Run]) -> list[str]:
    """What to know when a study chose its winner on some of these seeds; else nothing."""
    chosen_on = [run for run in runs if not FRESH_SEEDS <= run.seed < TUNING_SEEDS]
    if not (directory / "study.yaml").exists() or not chosen_on:
        return []
    return [
        f"Note: on some of these seeds the study {directory.name} chose its winner, whom they flatter. The study's own "
        "report has the answer (python -m scripts.study report STUDY.yaml); or judge its fresh seeds alone "
        "('POINT-seed10??')."
    ]


def listed(names: Sequence[str], most: int = SHOWN) -> str:
    """Names in one line, not too many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------------------------------------- run directories


def find_runs(words: Sequence[str]) -> list[Path]:
    """The run directories that paths and globs name, in their order, none twice."""
    found: dict[Path, Path] = {}
    for word in words:
        paths = [Path(word)] if Path(word).exists() else list(map(Path, sorted(glob.glob(word))))
        if not paths:
            raise BadInput(f"there is no run directory {word}")
        for path in paths:
            if not path.is_dir():
                raise BadInput(f"{path} is a file; name run directories, or give a table with --table")
            if not (path / "config.yaml").exists():
                inside = [file.parent for file in sorted(path.glob("*/config.yaml"))]
                kinds = listed(list(dict.fromkeys(f"'{path / stem(run)}-seed*'" for run in inside)))
                way = f"it is no run but holds {len(inside)}; name those of one kind, as in {kinds}"
                raise BadInput(f"{path}: {way if inside else 'no run directory, it has no config.yaml'}")
            found.setdefault(path.resolve(), path)
    return list(found.values())


def stem(run: Path) -> str:
    """A run's name without its seed."""
    return re.sub(r"-?seed\d+$", "", run.name) or run.name


def names_of(mine: Sequence[Path], its: Sequence[Path]) -> tuple[str, str]:
    """A name for each of two groups of runs, with as much of their paths as tells them apart."""
    for parents in (False, True):
        one, other = (
            listed(list(dict.fromkeys(str(run.parent / stem(run)) if parents else stem(run) for run in group)), 1)
            for group in (mine, its)
        )
        if one != other:
            return one, other
    return "the first group", "the second group"


def read_run(path: Path, metric: str) -> Run:
    """One finished run; raises BadInput when it lacks what a comparison needs."""
    summary = read_summary(path)
    if summary.get("status") != FINISHED:
        raise BadInput(
            f"{path} is not finished (its summary says {summary.get('status', 'nothing')}); "
            "let it end, or leave it out of RUNS"
        )
    flat = read_config(path).flat()
    missing = [name for name in ("corpus", *BUDGET) if summary.get(name) is None]
    if missing:
        raise BadInput(f"{path}/summary.json does not say {', '.join(missing)}; judge its values as a table (--table)")
    value = metric_value(path, metric)
    if value is None:
        raise BadInput(
            f"{path} ended without a finite {metric}: it diverged, or never measured it. Name another --metric; "
            "leaving such runs out flatters the group that has them"
        )
    knobs = {name: held for name, held in flat.items() if name not in ("run.seed", *HARDWARE) and not is_free(name)}
    facts = {name: summary.get(name) for name in ("corpus", "tokenizer", *BUDGET)}
    facts |= {name: flat[name] for name in MEASURED_ON if metric != "train/loss"}
    return Run(str(path), flat["run.seed"], value, knobs, facts)


# ---------------------------------------------------------------------------------------------- tables

Rows = dict[str, list[tuple[str, dict[str, str]]]]  # point -> place and cells of each of its lines


def read_table(path: Path, metric: str) -> Rows:
    """The rows of a CSV file by point. The value is in a column named like the metric, else in ``value``."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as problem:
        raise BadInput(f"cannot read the table {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save the table as CSV in UTF-8") from None
    if len(content) > MOST_BYTES:
        raise BadInput(f"{path} has more than {MOST_BYTES // 2**20} MiB; keep only the points that are judged")
    rows: Rows = {}
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        columns = list(reader.fieldnames or [])
        column = metric if metric in columns else "value"
        for name in ("point", "seed", column):
            if columns.count(name) != 1:
                wrong = "has twice the column" if name in columns else "has no column"
                raise BadInput(f"{path} {wrong} {name!r}; needed are point, seed, value; found: {listed(columns, 20)}")
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row:
                raise BadInput(f"{place} has more cells than the header has columns; quote cells with commas")
            cells = {"seed": row["seed"].strip(), "value": row[column].strip(), "status": row.get("status", FINISHED)}
            rows.setdefault(row["point"], []).append((place, cells))
    except csv.Error as problem:
        raise BadInput(f"{path} line {reader.line_num} is not CSV: {problem}") from None
    return rows


def group_in_table(table: str, rows: Rows, points: Sequence[str], notes: list[str]) -> list[Run]:
    """The finished rows of some points as one group; adds a note when others are left out."""
    runs, left_out = [], []
    for point in dict.fromkeys(points):
        if point not in rows:
            near = difflib.get_close_matches(point, rows, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {listed(list(rows), 20)}"
            raise BadInput(f"there is no point {point!r} in {table}; {hint}")
        for place, cells in rows[point]:
            if cells["status"] == FINISHED:
                runs.append(Run(place, *seed_and_value(place, cells)))
            else:
                left_out.append(f"{point} seed {cells['seed']}: {cells['status']}")
    if left_out:
        also = "If they diverged, the verdict flatters the group they are of."
        notes.append(f"Left out as not finished: {listed(left_out)}. {also}")
    if not runs:
        raise BadInput(f"no row of {listed(points)} in {table} has the status finished")
    return runs


def seed_and_value(place: str, cells: dict[str, str]) -> tuple[int, float]:
    """The numbers of a row."""
    if not re.fullmatch(r"[0-9]{1,18}", cells["seed"]):
        raise BadInput(f"{place}: the seed is {cells['seed']!r}; it must be a whole number, 0 or more")
    try:
        value = float(cells["value"])
    except ValueError:
        value = math.nan
    if not abs(value) < DIVERGED:
        raise BadInput(
            f"{place}: the value is {cells['value']!r}, not a finite number below 1e12; correct it. "
            "If the run diverged, leaving it out flatters its group"
        )
    return int(cells["seed"]), value


# ---------------------------------------------------------------------------------------------- words


def json_of(case: Case, verdict: Verdict, look: int | None) -> dict[str, Any]:
    """The verdict for programs; ``difference``, ``low`` and ``high`` are the first group minus the second."""
    decision = verdict.decision
    return {
        "verdict": verdict.word,
        "metric": case.metric,
        "difference": verdict.difference,
        "low": decision.low,
        "high": decision.high,
        "confidence": 1 - decision.alpha,
        "p": decision.p,
        "pairs": verdict.pairs,
        "unpaired": dict(zip(("runs", "against"), verdict.unpaired, strict=True)),
        "look": look,
        "more_seeds": more_seeds(verdict, look or 1),
        "groups": dict(zip(("runs", "against"), case.names, strict=True)),
        "notes": case.notes,
    }


def text_of(case: Case, verdict: Verdict, look: int | None) -> str:
    """The verdict for people: a line each for what, how sure, and what else is to be known."""
    lines = [what(case, verdict), how_sure(case, verdict, look or 1)]
    left_out = [f"{count} of {name}" for name, count in zip(case.names, verdict.unpaired, strict=True) if count]
    if verdict.pairs and left_out:
        lines.append(f"Left out are {' and '.join(left_out)}: the other group has no run on those seeds.")
    if look is not None and look > 1:
        lines.append(
            f"This is look {look} at these two groups. Each look gives luck another chance, so each asks for more "
            "than the one before, and all together are wrong in at most 5%."
        )
    return "\n".join([*lines, *case.notes])


def what(case: Case, verdict: Verdict) -> str:
    """The verdict, the difference and its interval."""
    (mine, its), decision, low, high = case.names, verdict.decision, verdict.decision.low, verdict.decision.high
    sizes = [len(group) for group in case.groups]
    told = f"{verdict.pairs} pairs of runs on the same seeds" if verdict.pairs else f"{sizes[0]} and {sizes[1]} runs"
    told += "" if verdict.pairs else ", not paired"
    reach = abs(verdict.difference) if low is None or high is None else (high - low) / 2
    digits = min(12, max(0, 2 - math.floor(math.log10(reach)))) if reach > 0 else 4
    if low is not None and high is not None:
        ends = sorted((-low, -high)) if decision.claim == "lower" else (low, high)
        share = 100 * decision.alpha
        confidence = f"{100 - share:.{max(1, 1 - math.floor(math.log10(share)))}f}%"
        told = f"{confidence} interval {ends[0]:.{digits}f} to {ends[1]:.{digits}f}; {told}"
    unit = UNITS.get(case.metric.split("/")[-1], "")
    if decision.claim:
        verb = "lowers" if decision.claim == "lower" else "raises"
        size = f"{abs(verdict.difference):.{digits}f}{unit}"
        return f"{verdict.word.capitalize()}: {mine} {verb} {case.metric} by {size} against {its} ({told})."
    size = f"{round(verdict.difference, digits) + 0.0:.{digits}f}{unit}"
    return f"Undecided: {case.metric} of {mine} minus that of {its} is {size} ({told})."


def how_sure(case: Case, verdict: Verdict, look: int) -> str:
    """How often luck does the like, and how many more seeds would settle it."""
    decision = verdict.decision
    if decision.p is None:
        return {
            "one pair": "One run shows no spread, so nothing can be said of luck: at least one more seed is needed.",
            "unchanged": "They have the very same numbers: in what is measured here, nothing was changed.",
            "no spread": "The difference is the same to the last digit on every seed, which real runs do not show: "
            "values may be rounded, or runs copied. Give all digits.",
        }[decision.why_not]
    kind = "gain" if (verdict.difference < 0) != case.metric.endswith("accuracy") else "harm"
    sure = f"If the two were equal, luck would bring a {kind} this large {once_in(decision.p)}."
    if verdict.word != UNDECIDED:
        return sure
    more = more_seeds(verdict, look)
    if more is None:
        return f"{sure} No reasonable number of seeds would settle a difference this small."
    hint = "" if verdict.pairs else " Fewer may do if both groups are run on the same seeds, which can be paired."
    seeds = "seed" if more == 1 else "seeds"
    return (
        f"{sure} About {more:,} more {seeds} of each would settle a difference of this size, four times in five.{hint}"
    )
