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
    fresh, contest = known.fresh(), known.contest()
    path = known.study.directory / "looks.json"
    if not any(fresh.values()):
        return len(read_looks(path)) + 1
    pair = {name: [contest.get(name, {}), runs] for name, runs in fresh.items()}
    key = files.hash_of([known.study.metric, {name: repr(values) for name, values in pair.items()}])
    with files.lock(path.with_suffix(".lock"), wait=True):
        looks = read_looks(path)
        numbers = [number for number, entry in enumerate(looks, 1) if entry["key"] == key]
        if numbers:
            return numbers[0]
        when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        told = {"key": key, "when": when, "metric": known.study.metric, "points": list(fresh)}
        files.write_json(path, [*looks, told | {"seeds": known.study.fresh_seeds}])
        return len(looks) + 1


def read_looks(path: Path) -> list[dict[str, Any]]:
    """The looks so far, the first one first."""
    try:
        looks = json.loads(path.read_text()) if path.exists() else []
        if all(isinstance(entry["key"], str) for entry in looks):
            return list(looks)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise BadInput(f"{path} is damaged: it counts how often results were looked at; restore it from a copy")
