"""Knobs as a study names them: short or full names, those that may not vary, and the names of points."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Any

from command_line import fields, unknown_key

LONGEST_NAME = 100  # of a point; the run's name adds its seed
# Knobs that no study varies, and why.
NOT_VARIED = {
    "run.name": "a run is named by its point and seed",
    "run.dir": "all runs of a study lie in its directory",
    "run.seed": "give 'seeds' instead",
    "run.resume": "a study always resumes",
    "run.threads": "the workers share the cores; it can be set in the base",
    "tracking.": "it does not change a run",
    "checkpoint.": "it does not change a run",
}


def full_names(knobs: dict[str, Any], place: str, mistakes: list[str]) -> dict[str, Any]:
    """``knobs`` by their full names; those that do not exist or may not vary are left out and go to ``mistakes``."""
    known: dict[str, Any] = {}
    for name, value in knobs.items():
        ends = [key for key in fields() if key.endswith(f".{name}")]
        knob = str(name) if name in fields() else ends[0] if len(ends) == 1 else None
        reason = next((why for key, why in NOT_VARIED.items() if knob and knob.startswith(key)), None)
        if len(ends) > 1:
            mistakes.append(f"{name!r} in {place} may be {' or '.join(ends)}; write which")
        elif knob is None:
            mistakes.append(unknown_knob(str(name), place))
        elif reason:
            mistakes.append(f"{knob} in {place} cannot be varied: {reason}")
        else:
            known[knob] = value
    return known


def unknown_knob(name: str, place: str) -> str:
    """The message for a knob that does not exist, with the nearest that does, by its short or its full name."""
    if "." in name:
        return unknown_key(name, place)
    short = {key.rsplit(".", 1)[-1]: key for key in fields()}
    near = difflib.get_close_matches(name, list(short), 1, 0.6)
    return f"unknown knob {name!r} in {place}" + (f"; did you mean {short[near[0]]}?" if near else "; see --help")


def name_of(knobs: dict[str, Any], of: str | None = None) -> str:
    """A point's name: its knobs and values, safe as the name of a directory, the same for the same knobs.

    ``of``: the name of the point of which it is a variation.
    """
    if not knobs:
        return "base"
    parts = [of] if of else []
    for knob, value in knobs.items():
        short = knob.rsplit(".", 1)[-1]
        alone = sum(key.endswith(f".{short}") for key in fields()) == 1
        parts.append(f"{short if alone else knob}={_value_text(value)}")
    text = ",".join(parts)
    name = re.sub(r"[^A-Za-z0-9._,=+-]", "_", text)
    if name == text and len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_value_text, value))
    if isinstance(value, dict):  # a source of a mixture: what is not given is not told
        return ":".join(_value_text(part) for part in value.values() if part is not None)
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def whole(knob: str) -> bool:
    """Whether the knob takes whole numbers only."""
    kinds = str(fields()[knob].annotation)
    return "int" in kinds and "float" not in kinds
