"""What a study's directory remembers of how often fresh results were looked at: each further look is paid for.

A user who adds seeds or points until something is claimed would be wrong far more often than told. So the first look
tests at the usual level, and each later one spends what decision.level leaves it. The same numbers looked at again are
the same look.
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
    """Which look at fresh results this is, from 1; it is recorded when they are all there.

    Raises BadInput for a record that cannot be read: without it nothing can be said of earlier looks.
    """
    path = known.study.directory / "looks.json"
    with files.lock(path.with_suffix(".lock"), wait=True):
        looks, key = read_looks(path), key_of(known)
        number = number_of(key, [entry["key"] for entry in looks])
        if known.fresh() and number > len(looks):
            when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            told = {"metric": known.study.metric, "points": list(known.fresh()), "seeds": known.study.fresh_seeds}
            files.write_json(path, [*looks, {"key": key, "when": when} | told])
    return number


def key_of(known: Design) -> str:
    """Tells looks apart: the metric, and every value of winner and baseline that decides."""
    contest = known.contest()
    pair = {name: repr([contest.get(name), runs]) for name, runs in known.fresh().items()}
    return files.hash_of([known.study.metric, pair])


def number_of(key: str, earlier: list[str]) -> int:
    """The number of a look, from 1: that of the same numbers looked at before, else the next."""
    return (earlier.index(key) if key in earlier else len(earlier)) + 1


def read_looks(path: Path) -> list[dict[str, Any]]:
    """The looks so far, the first one first."""
    try:
        looks = json.loads(path.read_text()) if path.exists() else []
        if all(isinstance(entry["key"], str) for entry in looks):
            return list(looks)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise BadInput(f"{path} is damaged: it counts how often results were looked at; restore it from a copy")
