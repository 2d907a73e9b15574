"""Loss curves: ours, or anyone's CSV, TSV or JSON, read without torch or anything else that is slow to import."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import BadInput

ENOUGH = 5  # numbers that a column must hold to be preferred to one with a less usual name

# What others call their columns, in lower case without anything but letters and digits; the first found is taken.
COLUMNS = {
    "step": ["step", "steps", "globalstep", "trainerglobalstep", "iteration", "iterations", "iter", "update",
             "updates", "numupdates", "batch"],
    "epoch": ["epoch", "epochs", "trainepoch"],
    "train/loss": ["trainloss", "trainingloss", "losstrain", "trnloss", "train", "training", "trainlossepoch",
                   "trainlossstep", "loss"],
    "val/loss": ["valloss", "validationloss", "validloss", "evalloss", "devloss", "lossval", "lossvalidation",
                 "losseval", "val", "validation", "valid", "eval", "dev", "testloss", "test"],
    "val_average/loss": ["valaverageloss"],
    "gap/loss": ["gaploss"],
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One loss over the run: ``steps`` ascending, ``values`` finite, nats per token."""

    steps: list[float]
    values: list[float]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def noise(self) -> float:
        """Standard deviation of a single point around the curve, from how far points lie off their neighbours' line.

        The median of these distances is the curvature of the curve and is taken away first; the median of what
        is left is robust against the few points of a steep beginning. 0 for fewer than five points.
        """
        distances = []
        for before, here, after in zip(range(len(self)), range(1, len(self)), range(2, len(self)), strict=False):
            share = (self.steps[here] - self.steps[before]) / (self.steps[after] - self.steps[before])
            line = (1 - share) * self.values[before] + share * self.values[after]
            distances.append((self.values[here] - line) / math.sqrt(1 + share**2 + (1 - share) ** 2))
        if len(distances) < 3:
            return 0.0
        middle = statistics.median(distances)
        return 1.4826 * statistics.median(abs(distance - middle) for distance in distances)

    def smooth(self) -> Series:
        """The mean of each point and its neighbours, over about a tenth of the run on either side together."""
        reach = 0 if len(self) < 8 else max(1, len(self) // 20)
        values = [
            statistics.fmean(self.values[max(0, i - reach) : i + reach + 1]) for i in range(len(self))
        ]  # fmt: skip
        return Series(self.steps, values)

    def at(self, step: float) -> float:
        """The value at ``step``, on the line between its neighbours; the nearest end outside."""
        after = next((i for i, other in enumerate(self.steps) if other >= step), len(self) - 1)
        before = max(0, after - 1)
        width = self.steps[after] - self.steps[before]
        share = min(1.0, (step - self.steps[before]) / width) if width else 1.0
        return self.values[before] + share * (self.values[after] - self.values[before])

    def late_fall(self) -> tuple[float, float]:
        """What the curve loses over the last fifth of the run, and the standard error of that.

        Minus the slope of the least-squares line through the points there (the last three if there are fewer),
        times a fifth of the run.
        """
        fifth = (self.steps[-1] - self.steps[0]) / 5
        first = next(index for index, step in enumerate(self.steps) if step >= self.steps[-1] - fifth)
        first = min(first, max(0, len(self) - 3))
        steps = self.steps[first:]
        if len(steps) < 2:
            return 0.0, 0.0
        line = statistics.linear_regression(steps, self.values[first:])
        spread = math.sqrt(len(steps) * statistics.pvariance(steps))
        return -line.slope * fifth, self.noise * fifth / spread


def series(records: list[dict[str, Any]], name: str) -> Series:
    """The finite values of one metric by step; of several at one step the last counts."""
    values: dict[float, float] = {}
    for record in records:
        value = record.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value) and "step" in record:
            values[record["step"]] = float(value)
    return Series(sorted(values), [values[step] for step in sorted(values)])


# ---------------------------------------------------------------------------------------------- reading curves


def read_curves(path: str | Path) -> list[dict[str, Any]]:
    """Records for ``diagnose`` from a run directory, a metrics.jsonl, or other people's CSV, TSV or JSON.

    Columns are found by what they are usually called (step, iteration or epoch; train_loss, loss; val_loss,
    eval_loss, ...), whatever their case, slashes and underscores. ``{"log_history": [...]}``, as transformers' Trainer
    writes it, is read too. Other columns are kept as they are. Raises BadInput with the columns found when it cannot
    tell the steps or the validation loss.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.jsonl"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise BadInput(f"there is no {file}; give a run directory, a metrics.jsonl, or a CSV or JSONL file") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"cannot read {file} ({problem}); give a CSV or JSONL file in UTF-8") from None
    rows = read_json(text, file) if text.lstrip()[:1] in ("{", "[") else read_csv(text)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found = {name: match(rows, columns, names) for name, names in COLUMNS.items()}
    missing = []
    if found["step"] is None and found["epoch"] is None:
        missing.append("the steps (step, iteration or epoch)")
    if found["val/loss"] is None and found["val_average/loss"] is None:
        missing.append("the validation loss (val_loss, valid_loss or eval_loss)")
    if missing:
        have = ", ".join(map(repr, columns)) or "none"
        raise BadInput(f"{file}: cannot tell which column holds {' and '.join(missing)}; it has: {have}. Rename them")
    place = found["step"] or found["epoch"]
    records = []
    for row in rows:
        step = number(row.get(place or ""))
        if step is None or not math.isfinite(step):
            continue
        values = {name: number(row.get(column)) for name, column in found.items() if column is not None}
        kept = {name: value for name, value in values.items() if value is not None}
        records.append(row | kept | {"step": int(step) if step.is_integer() else step})
    if not records:
        raise BadInput(f"{file} holds no line with a {place}; nothing can be said of an empty curve")
    return records


def read_json(text: str, file: Path) -> list[dict[str, Any]]:
    """JSON lines (a torn last line is left out), a list of objects, or an object with ``log_history``."""
    try:
        content = json.loads(text)
    except ValueError:
        content, lines = [], text.splitlines()
        for index, line in enumerate(lines):
            try:
                content.append(json.loads(line))
            except ValueError as problem:
                if index == len(lines) - 1:
                    break
                if line.strip():
                    raise BadInput(f"{file}, line {index + 1}, is not JSON ({problem}); mend or remove it") from None
    if isinstance(content, dict):
        content = content.get("log_history", [content])
    if not isinstance(content, list):
        raise BadInput(f"{file} must hold a list of JSON objects, or one object a line")
    return [row for row in content if isinstance(row, dict)]


def read_csv(text: str) -> list[dict[str, Any]]:
    """Rows by the names in the first line; the separator is the one that this line has most of."""
    lines = text.splitlines()
    separator = max(",;\t", key=lines[0].count) if lines else ","
    rows = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)
    return [{name.strip(): value for name, value in row.items() if name is not None} for row in rows]


def match(rows: list[dict[str, Any]], columns: list[str], names: list[str]) -> str | None:
    """The column that goes by one of ``names``, the first that holds enough numbers, else the one with the most.

    (Trainers log a lone summary value under the best of names.) W&B's exports put "<run> - " before each name.
    """
    counts = {column: sum(number(row.get(column)) is not None for row in rows) for column in columns}
    whole = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in columns}
    last = {column: re.sub(r"[^a-z0-9]", "", column.rsplit(" - ", 1)[-1].lower()) for column in columns}
    found = [column for meaning in (whole, last) for name in names for column in columns if meaning[column] == name]
    return next(
        (column for column in found if counts[column] >= ENOUGH),
        max(found, key=lambda column: counts[column], default=None),
    )


def number(value: Any) -> float | None:
    """A number out of a cell, None if there is none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
