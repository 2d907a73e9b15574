"""How often results were looked at: each further look at what has grown is written down and paid for.

Who adds seeds or points until something is claimed would be wrong far more often than told. So the first look tests at
the usual level, and each later one has what decision.level leaves it. The same numbers looked at again are no new look.
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import files
from config import BadInput
from studies.design import Design


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
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise BadInput(f"{path} should hold the record of earlier looks but is damaged; restore it from a copy")
