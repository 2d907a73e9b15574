"""What a study's directory remembers: how often results were looked at, and what was planned before the runs.

Who adds seeds or points until something is claimed would be wrong far more often than told. So the first look at fresh
results tests at the usual level, and each later one has what decision.level leaves it. The same numbers looked at again
are no new look. registered.json has what the study was to be; the report lists where it went another way.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import files
from config import BadInput, Config
from data.mixtures import open_data
from program import warn
from studies.decision import ALPHA
from studies.design import Design
from studies.space import PILOT_SEEDS, Point, Study
from tracking.run_directory import git_commit, is_free, read_summary

REGISTERED = ("name", "points", "base", "metric", "seeds", "confirm_seeds", "tune", "alpha")


def look(known: Design) -> int:
    """Which look at a study's fresh results this is, from 1; it is recorded in looks.json when they are all there."""
    fresh = known.fresh()
    told = {"metric": known.study.metric, "points": list(fresh), "seeds": known.study.fresh_seeds}
    return count_look(known.study.directory / "looks.json", "fresh seeds", seen_in(known), told if fresh else None)


def seen_in(known: Design) -> str:
    """Tells looks apart: the metric, and every value of winner and baseline that decides."""
    contest = known.contest()
    pair = {name: repr([contest.get(name), runs]) for name, runs in known.fresh().items()}
    return files.hash_of([known.study.metric, pair])


def count_look(path: Path, subject: str, seen: str, told: dict[str, Any] | None) -> int:
    """Which look at ``subject`` it is, from 1, that saw what has the hash ``seen``.

    ``path`` holds {subject: [looks]}; a new one is added with what is ``told`` of it, unless that is None. Raises
    BadInput for a record that cannot be read: without it nothing can be said of earlier looks.
    """
    with files.lock(path.with_suffix(".lock"), wait=True):
        record = read_looks(path)
        looks = record.setdefault(subject, [])
        number = number_of(seen, [entry["seen"] for entry in looks])
        if told is not None and number > len(looks):
            when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            looks.append({"seen": seen, "when": when} | told)
            files.write_json(path, record)
    return number


def number_of(seen: str, earlier: list[str]) -> int:
    """The number of a look, from 1: that of the same numbers looked at before, else the next."""
    return (earlier.index(seen) if seen in earlier else len(earlier)) + 1


def read_looks(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The looks so far; none where there is no file."""
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if all(isinstance(entry["seen"], str) for looks in record.values() for entry in looks):
            return dict(record)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise BadInput(f"{path} should hold the record of earlier looks but is damaged; restore it from a copy")


# ---------------------------------------------------------------------------------------------- registration


def register(study: Study, file: Path) -> Path:
    """Write down what the study is to be."""
    corpora = {open_data(study.config(point, 0).data, verify=False).fingerprint for point in study.points()}
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
        "alpha": ALPHA,
    }
    return dict(json.loads(json.dumps(content | chosen)))


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
