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
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import files
from command_line import load_yaml
from config import BadInput, Config
from program import warn
from studies.decision import Decision, judge_groups, judge_pairs, level, once_in, paired, seeds_needed
from studies.results import metric_value
from studies.space import METRICS
from tracking.run_directory import HARDWARE, is_free, read_config, read_summary

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
EXIT_CODES = {BETTER: 0, UNDECIDED: 10, WORSE: 11}
FINISHED = "finished"
BUDGET = ("tokens", "steps")
MEASURED_ON = ("evaluation.max_tokens", "data.isolate_documents")  # knobs that change what is measured
UNITS = {"loss": " nats per token", "entropy": " nats", "log_z": " nats", "bits_per_byte": " bits per byte"}
CHOOSING = (0, 2)  # thousands of the seeds on which a study chooses its winner, and its learning rate
MOST_BYTES = 2**26  # of a table
MOST = 1e12  # a value beyond is as good as not finite


@dataclass(frozen=True)
class Group:
    """Runs of one kind. ``identity`` is the same when the group grows: seeds and values are not part of it."""

    name: str
    values: dict[int, float]  # seed -> value
    identity: str


@dataclass(frozen=True)
class Case:
    """What is judged, the first group against the second, and where looks at it are recorded."""

    groups: tuple[Group, Group]
    metric: str
    record: Path
    notes: list[str] = field(default_factory=list)

    @property
    def minimize(self) -> bool:
        """Whether a smaller value is the better one."""
        return not self.metric.endswith("accuracy")


@dataclass(frozen=True)
class Verdict:
    """``difference`` is the first group minus the second; ``decision`` has how sure it is."""

    word: str  # better, worse, undecided
    difference: float
    decision: Decision
    pairs: int  # 0: not paired
    unpaired: tuple[int, int]  # runs of each group that are not in a pair; they count only where nothing is paired


# ---------------------------------------------------------------------------------------------- the verdict


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
    mine, its = (group.values for group in case.groups)
    look = count_look(case) if min(len(mine), len(its)) > 1 else None
    return verdict_of(mine, its, look or 1, case.minimize), look


# ---------------------------------------------------------------------------------------------- looks


def count_look(case: Case) -> int:
    """Which look at these two groups this is, from 1; the very same numbers are the same look.

    The record is {hash of the groups: {groups, looks: hashes of what was seen}}; which group stands first is no matter.
    """
    key = files.hash_of(sorted(group.identity for group in case.groups))
    seen = files.hash_of(sorted(sorted(group.values.items()) for group in case.groups))
    looks = read_looks(case.record).get(key, {}).get("looks", [])
    if seen in looks:
        return int(looks.index(seen)) + 1
    try:
        with files.lock(case.record.with_name(f"{case.record.name}.lock"), wait=True):
            record = read_looks(case.record)
            entry = record.setdefault(key, {"groups": [group.name for group in case.groups], "looks": []})
            looks = entry["looks"]
            if seen not in looks:  # another process may have written it since
                looks.append(seen)
                files.write_json(case.record, record)
    except OSError as problem:
        warn(f"this look is not recorded, later ones will not know of it: {case.record}: {problem.strerror}")
        return len(looks) + 1
    return int(looks.index(seen)) + 1


def read_looks(path: Path) -> dict[str, Any]:
    """The record of looks; empty when there is none. Raises BadInput when it is damaged."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if all(isinstance(entry["looks"], list) for entry in record.values()):
            return dict(record)
    except OSError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise BadInput(
        f"{path} should hold the record of earlier looks but is damaged; restore it, or name another: --record"
    )


# ---------------------------------------------------------------------------------------------- what is judged


def case_of(
    mine: Sequence[str],
    its: Sequence[str],
    metric: str,
    table: str | None = None,
    allow_unequal: bool = False,
    record: str | None = None,
) -> Case:
    """The case of two groups of run directories, or of points in a ``table``; ``record``: where looks are recorded.

    Raises BadInput for what cannot be compared.
    """
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METRICS)}"
        raise BadInput(f"unknown metric {metric!r}; {hint}")
    case = case_of_table(table, mine, its, metric) if table else case_of_runs(mine, its, metric, allow_unequal)
    return replace(case, record=Path(record)) if record else case


@dataclass(frozen=True)
class Run:
    """A finished run: what of its config makes its group, and what must be equal for all runs that are compared."""

    path: Path
    seed: int
    value: float
    knobs: dict[str, Any]
    facts: dict[str, Any]


def case_of_runs(mine: Sequence[str], its: Sequence[str], metric: str, allow_unequal: bool = False) -> Case:
    """The case of two groups of run directories, given by paths and globs.

    Raises BadInput for runs that are not finished, lack the metric, or cannot be compared.
    """
    paths = [find_runs(words) for words in (mine, its)]
    both = sorted({path.resolve() for path in paths[0]} & {path.resolve() for path in paths[1]})
    if both:
        raise BadInput(f"{both[0]} is in both groups; leave it out of one")
    unfinished = [
        f"{path} is not finished (its summary says {read_summary(path).get('status', 'nothing')}); "
        "let it end, or leave it out of RUNS"
        for path in [*paths[0], *paths[1]]
        if read_summary(path).get("status") != FINISHED
    ]
    if unfinished:
        raise BadInput("\n".join(unfinished))
    runs = [[read_run(path, metric) for path in group] for group in paths]
    names = names_of(*paths)
    groups = tuple(group_of(name, held) for name, held in zip(names, runs, strict=True))
    everything = [*runs[0], *runs[1]]
    notes = check_comparable(everything, allow_unequal)
    parents = sorted({run.path.resolve().parent for run in everything})
    for parent in parents:
        notes += note_on_study(parent, [run.seed for run in everything if run.path.resolve().parent == parent])
    return Case((groups[0], groups[1]), metric, parents[0] / ".looks.json", notes)


def find_runs(words: Sequence[str]) -> list[Path]:
    """The run directories that paths and globs name, in their order, none twice."""
    found: dict[Path, Path] = {}
    for word in words:
        path = Path(word)
        paths = [path] if path.exists() else [match for match in map(Path, sorted(glob.glob(word))) if match.is_dir()]
        if not paths:
            raise BadInput(f"there is no run directory {word}")
        for path in paths:
            check_is_run(path)
            found.setdefault(path.resolve(), path)
    return list(found.values())


def check_is_run(path: Path) -> None:
    """Raises BadInput, saying what to write instead, when the path is no run directory."""
    if not path.is_dir():
        raise BadInput(f"{path} is a file; name run directories, or give a table with --table")
    if (path / "config.yaml").exists():
        return
    inside = [file.parent for file in sorted(path.glob("*/config.yaml"))]
    if not inside:
        raise BadInput(f"{path} is no run directory: it has no config.yaml")
    kinds = listed(list(dict.fromkeys(f"'{path / stem(run)}-seed*'" for run in inside)))
    raise BadInput(f"{path} is no run but holds {len(inside)}; name those of one kind, as in {kinds}")


def stem(run: Path) -> str:
    """A run's name without its seed."""
    return re.sub(r"-?seed\d+$", "", run.name) or run.name


def names_of(mine: Sequence[Path], its: Sequence[Path]) -> list[str]:
    """A name for each of two groups of runs, with as much of their paths as tells them apart."""

    def names(of: Callable[[Path], str]) -> list[str]:
        stems = [list(dict.fromkeys(of(path) for path in group)) for group in (mine, its)]
        return [f"{held[0]} and {len(held) - 1} more" if len(held) > 1 else held[0] for held in stems]

    short, long = names(stem), names(lambda path: str(path.parent / stem(path)))
    return next((pair for pair in (short, long) if pair[0] != pair[1]), ["the first group", "the second group"])


def read_run(path: Path, metric: str) -> Run:
    """One finished run; raises BadInput when it lacks what a comparison needs."""
    flat, summary = read_config(path).flat(), read_summary(path)
    missing = [name for name in ("corpus", *BUDGET) if summary.get(name) is None]
    if missing:
        raise BadInput(f"{path}/summary.json does not say {', '.join(missing)}; judge its values as a table (--table)")
    value = metric_value(path, metric)
    if value is None:
        raise BadInput(
            f"{path} ended without a finite {metric}: it diverged, or never measured it. Name another --metric; "
            "leaving such runs out flatters the group that has them"
        )
    left_out = ("run.seed", *HARDWARE)
    knobs = {name: held for name, held in flat.items() if name not in left_out and not is_free(name)}
    facts = {name: summary.get(name) for name in ("corpus", "tokenizer", *BUDGET)}
    facts |= {name: flat[name] for name in MEASURED_ON if metric != "train/loss"}
    return Run(path, flat["run.seed"], value, knobs, facts)


def group_of(name: str, runs: Sequence[Run]) -> Group:
    """One config on several seeds; raises BadInput when the runs are something else."""
    by_seed: dict[int, Run] = {}
    first = runs[0]
    for run in runs:
        if run.seed in by_seed:
            raise BadInput(f"{by_seed[run.seed].path} and {run.path} have the same seed, {run.seed}; name one of them")
        by_seed[run.seed] = run
        if other := [knob for knob, value in run.knobs.items() if value != first.knobs[knob]]:
            raise BadInput(
                f"{first.path} and {run.path} are in one group but differ in {', '.join(other)}; a group is one config "
                "on several seeds. Judge one config at a time, or give the values as a table (--table)"
            )
    default = Config().flat()  # a knob that is added later, at its default, leaves the identity as it was
    identity = files.hash_of({knob: value for knob, value in first.knobs.items() if value != default[knob]})
    return Group(name, {run.seed: run.value for run in runs}, identity)


def check_comparable(runs: Sequence[Run], allow_unequal: bool) -> list[str]:
    """Raises BadInput with all in which the runs differ though they must not; returns notes on what was allowed."""
    mistakes, notes = [], []
    for fact in runs[0].facts:
        names: dict[str, list[str]] = {}
        for run in runs:
            value = run.facts[fact]
            shown = f"{value:,}" if isinstance(value, int) else str(value)[:16]
            names.setdefault(shown, []).append(str(run.path))
        if len(names) == 1:
            continue
        differ = f"the runs differ in {fact}: " + "; ".join(
            f"{value} in {listed(held)}" for value, held in names.items()
        )
        if fact not in BUDGET:
            mistakes.append(f"{differ}. They were not measured on the same, and nothing makes that comparable")
        elif allow_unequal:
            notes.append(f"The budgets are unequal, as you allowed: {', '.join(names)} {fact}.")
        else:
            mistakes.append(f"{differ}. Give both the same budget, or judge them all the same: --allow-unequal")
    if mistakes:
        raise BadInput("\n".join(mistakes))
    return notes


def listed(names: Sequence[str], most: int = 6) -> str:
    """Names in one line, not too many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def note_on_study(directory: Path, seeds: Iterable[int]) -> list[str]:
    """What to know when a study chose its winner on some of these seeds; else nothing."""
    if not (directory / "study.yaml").exists() or not any(seed // 1000 in CHOOSING for seed in seeds):
        return []
    return [
        f"Note: on some of these seeds the study {directory.name} chose its winner, whom they flatter. The study's own "
        "report has the answer (python -m scripts.study report STUDY.yaml); or judge its fresh seeds alone "
        "('POINT-seed10??')."
    ]


# ---------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Row:
    """A line of a table, as it is written there."""

    place: str  # file and line
    seed: str
    value: str
    status: str


def case_of_table(table: str, mine: Sequence[str], its: Sequence[str], metric: str) -> Case:
    """The case of two groups of points in a CSV file with the columns point, seed and value.

    Raises BadInput, with the line, for what is missing, twice there, or no number.
    """
    path = Path(table)
    both = sorted(set(mine) & set(its))
    if both:
        raise BadInput(f"the point {both[0]} is in both groups; leave it out of one")
    rows = read_table(path, metric)
    notes: list[str] = []
    groups = [group_in_table(path, rows, list(dict.fromkeys(points)), notes) for points in (mine, its)]
    notes += note_on_study(path.resolve().parent, [seed for group in groups for seed in group.values])
    return Case((groups[0], groups[1]), metric, path.resolve().parent / ".looks.json", notes)


def read_table(path: Path, metric: str) -> dict[str, list[Row]]:
    """The rows of a CSV file by point. The value is in a column named like the metric, else in ``value``."""
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise BadInput(f"{path} has more than {MOST_BYTES // 2**20} MiB; keep only the points that are judged")
        text = content.decode("utf-8-sig")
    except OSError as problem:
        raise BadInput(f"cannot read the table {path}: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; save the table as CSV in UTF-8") from None
    rows: dict[str, list[Row]] = {}
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
    try:
        columns = list(reader.fieldnames or [])
        value = value_column(path, columns, metric)
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row:
                raise BadInput(f"{place} has more cells than the header has columns; quote cells with commas")
            status = row["status"] if "status" in columns else FINISHED
            rows.setdefault(row["point"], []).append(Row(place, row["seed"].strip(), row[value].strip(), status))
    except csv.Error as problem:
        raise BadInput(f"{path} line {reader.line_num} is not CSV: {problem}") from None
    return rows


def value_column(path: Path, columns: Sequence[str], metric: str) -> str:
    """The column that holds the metric; raises BadInput for a header that does not fit."""
    value = next((name for name in (metric, "value", "metric") if name in columns), "value")
    for name in ("point", "seed", value):
        if columns.count(name) != 1:
            wrong = "has no column" if name not in columns else "has twice the column"
            raise BadInput(f"{path} {wrong} {name!r}; needed are point, seed, value; found: {listed(columns, 20)}")
    study = path.parent / "study.yaml"
    if value != metric and study.exists():
        measured = load_yaml(str(study), "study file").get("metric", metric)
        if measured != metric:
            raise BadInput(
                f"the column {value!r} of {path} holds {measured}, not {metric}; ask with --metric '{measured}'"
            )
    return value


def group_in_table(path: Path, rows: dict[str, list[Row]], points: Sequence[str], notes: list[str]) -> Group:
    """The finished rows of some points as one group; adds a note when others are left out."""
    values: dict[int, float] = {}
    places: dict[int, str] = {}
    left_out = []
    for point in points:
        if point not in rows:
            near = difflib.get_close_matches(point, rows, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {listed(list(rows), 20)}"
            raise BadInput(f"there is no point {point!r} in {path}; {hint}")
        for row in rows[point]:
            if row.status != FINISHED:
                left_out.append(f"{point} seed {row.seed}: {row.status}")
                continue
            seed, value = seed_and_value(row)
            if seed in values:
                raise BadInput(
                    f"{places[seed]} and {row.place} have the same seed, {seed}, in one group; keep one of them"
                )
            values[seed], places[seed] = value, row.place
    if left_out:
        which = listed(left_out)
        notes.append(
            f"Left out as not finished: {which}. If they diverged, the verdict flatters the group they are of."
        )
    if not values:
        raise BadInput(f"no row of {listed(points)} in {path} has the status finished")
    return Group(listed(points, 3), values, files.hash_of([str(path.resolve()), sorted(points)]))


def seed_and_value(row: Row) -> tuple[int, float]:
    """The numbers of a row."""
    if not re.fullmatch(r"[0-9]{1,18}", row.seed):
        raise BadInput(f"{row.place}: the seed is {row.seed!r}; it must be a whole number, 0 or more")
    try:
        value = float(row.value)
    except ValueError:
        value = math.nan
    if not abs(value) < MOST:
        raise BadInput(
            f"{row.place}: the value is {row.value!r}, not a finite number below 1e12; correct it. "
            "If the run diverged, leaving it out flatters its group"
        )
    return int(row.seed), value


# ---------------------------------------------------------------------------------------------- words


def json_of(case: Case, verdict: Verdict, look: int | None) -> dict[str, Any]:
    """The verdict for programs; ``difference``, ``low`` and ``high`` are the first group minus the second."""
    mine, its = case.groups
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
        "unpaired": {"runs": verdict.unpaired[0], "against": verdict.unpaired[1]},
        "look": look,
        "more_seeds": more_seeds(verdict, look or 1),
        "groups": {"runs": mine.name, "against": its.name},
        "notes": case.notes,
    }


def text_of(case: Case, verdict: Verdict, look: int | None) -> str:
    """The verdict for people: a line each for what, how sure, and what else is to be known."""
    lines = [what(case, verdict), how_sure(case, verdict, look or 1)]
    names = [group.name for group in case.groups]
    left_out = [f"{count} of {name}" for name, count in zip(names, verdict.unpaired, strict=True) if count]
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
    mine, its = (group.name for group in case.groups)
    decision = verdict.decision
    low, high, sizes = decision.low, decision.high, [len(group.values) for group in case.groups]
    runs = (
        f"{verdict.pairs} pairs of runs on the same seeds"
        if verdict.pairs
        else f"{sizes[0]} and {sizes[1]} runs, not paired"
    )
    unit = UNITS.get(case.metric.split("/")[-1], "")
    reach = abs(verdict.difference) if low is None or high is None else (high - low) / 2
    decimals = min(12, max(0, 2 - math.floor(math.log10(reach)))) if reach > 0 else 4
    if low is None or high is None:
        interval = runs
    else:
        ends = sorted((-low, -high)) if decision.claim == "lower" else (low, high)
        interval = f"{percent(decision.alpha)} interval {ends[0]:.{decimals}f} to {ends[1]:.{decimals}f}; {runs}"
    if decision.claim:
        verb = "lowers" if decision.claim == "lower" else "raises"
        size = f"{abs(verdict.difference):.{decimals}f}{unit}"
        return f"{verdict.word.capitalize()}: {mine} {verb} {case.metric} by {size} against {its} ({interval})."
    size = f"{round(verdict.difference, decimals) + 0.0:.{decimals}f}{unit}"
    return f"Undecided: {case.metric} of {mine} minus that of {its} is {size} ({interval})."


def percent(alpha: float) -> str:
    """The confidence 1 - alpha with as many digits as tell it from 100%."""
    share = 100 * alpha
    return f"{100 - share:.{max(1, 1 - math.floor(math.log10(share)))}f}%"


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
    kind = "gain" if (verdict.difference < 0) == case.minimize else "harm"
    sure = f"If the two were equal, luck would bring a {kind} this large {once_in(decision.p)}."
    if verdict.word != UNDECIDED:
        return sure
    more = more_seeds(verdict, look)
    if more is None:
        return f"{sure} No reasonable number of seeds would settle a difference this small."
    seeds = "seed" if more == 1 else "seeds"
    hint = "" if verdict.pairs else " Fewer may do if both groups are run on the same seeds, which can be paired."
    return (
        f"{sure} About {more:,} more {seeds} of each would settle a difference of this size, four times in five.{hint}"
    )
