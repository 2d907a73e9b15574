"""Loss curves: ours, or anyone's CSV, TSV or JSON, read without torch or anything else that is slow to import."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import BadInput
from pictures import column

ENOUGH = 5  # numbers that a column must hold to be preferred to one with a less usual name

# What others call their columns, in lower case without anything but letters and digits; the first found is taken.
COLUMNS = {
    "step": "step steps globalstep trainerglobalstep iteration iterations iter update updates numupdates batch",
    "epoch": "epoch epochs trainepoch",
    "train/loss": "trainloss trainingloss losstrain trnloss train training trainlossepoch trainlossstep loss",
    "val/loss": "valloss validationloss validloss evalloss devloss lossval lossvalidation losseval"
    " val validation valid eval dev testloss test",
    "val_average/loss": "valaverageloss",
    "gap/loss": "gaploss",
}


@dataclass(frozen=True)
class Series:
    """One loss over the run, in nats per token: NumPy float64 arrays of equal length, ``steps`` ascending.

    Its statistics need five points; all values nan stand for a loss that was not recorded.
    """

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    @property
    def last(self) -> float:
        """The value at the end."""
        return float(self.values[-1])

    @property
    def noise(self) -> float:
        """Standard deviation of a single point around the curve, from how far points lie off their neighbours' line.

        The median of these distances is due to the curvature of the curve and is subtracted first; the median of
        what is left is robust against the few points of a steep beginning.
        """
        share = (self.steps[1:-1] - self.steps[:-2]) / (self.steps[2:] - self.steps[:-2])
        lines = (1 - share) * self.values[:-2] + share * self.values[2:]
        distances = (self.values[1:-1] - lines) / np.sqrt(1 + share**2 + (1 - share) ** 2)
        return 1.4826 * float(np.median(abs(distances - np.median(distances))))

    def smooth(self) -> Series:
        """The mean of each point and its neighbours, over about a tenth of the run."""
        reach = 0 if len(self) < 8 else max(1, len(self) // 20)
        means = [self.values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(self))]
        return Series(self.steps, np.array(means))

    def lowest(self) -> float:
        """The step at which the smoothed curve is lowest."""
        return float(self.steps[self.smooth().values.argmin()])

    def rise(self, since: float) -> float:
        """What the smoothed curve has gained since a step; negative when it fell."""
        smoothed = self.smooth()
        return smoothed.last - smoothed.at(since)

    def at(self, step: float) -> float:
        """The value at ``step``, on the line between its neighbours; the nearest end outside."""
        return float(np.interp(step, self.steps, self.values))

    def late_fall(self) -> tuple[float, float]:
        """What the curve loses over the last fifth of the run, and the standard error of that.

        Minus the slope of the least-squares line through the points there (the last three if there are fewer),
        times a fifth of the run.
        """
        fifth = (self.steps[-1] - self.steps[0]) / 5
        first = min(int(np.searchsorted(self.steps, self.steps[-1] - fifth)), len(self) - 3)
        distances = self.steps[first:] - self.steps[first:].mean()
        squares = (distances**2).sum()
        slope = (distances * self.values[first:]).sum() / squares
        return float(-slope * fifth), float(self.noise * fifth / np.sqrt(squares))


def series(records: list[dict[str, Any]], name: str) -> Series:
    """The finite values of one metric by step."""
    steps, values = column(records, name)
    return Series(np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))


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
        rows = read_json(text, file) if text.lstrip()[:1] in ("{", "[") else read_csv(text)
    except FileNotFoundError:
        raise BadInput(f"there is no {file}; give a run directory, a metrics.jsonl, or a CSV or JSONL file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise BadInput(f"cannot read {file} ({problem}); give a CSV or JSONL file in UTF-8") from None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    found = {name: match(rows, columns, names.split()) for name, names in COLUMNS.items()}
    axis = found["step"] or found["epoch"]
    missing = []
    if axis is None:
        missing.append("the steps (step, iteration or epoch)")
    if found["val/loss"] is None and found["val_average/loss"] is None:
        missing.append("the validation loss (val_loss, valid_loss or eval_loss)")
    if axis is None or missing:
        have = ", ".join(map(repr, columns)) or "none"
        raise BadInput(f"{file}: cannot tell which column holds {' and '.join(missing)}; it has: {have}. Rename them")
    records = []
    for row in rows:
        step = number(row.get(axis))
        if step is None or not math.isfinite(step):
            continue
        values = {name: number(row[theirs]) for name, theirs in found.items() if theirs in row}
        records.append(row | values | {"step": int(step) if step.is_integer() else step})
    if not records:
        raise BadInput(f"{file} holds no line with a {axis}; nothing can be said of an empty curve")
    return records


def read_json(text: str, file: Path) -> list[dict[str, Any]]:
    """JSON lines (a torn last line is left out), a list of objects, or an object with ``log_history``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content, lines = [], text.splitlines()
        for index, line in enumerate(lines, 1):
            try:
                content.append(json.loads(line))
            except (ValueError, RecursionError) as problem:
                if line.strip() and index < len(lines):
                    raise BadInput(f"{file}, line {index}, is not JSON ({problem}); mend or remove it") from None
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

    Enough, because transformers' Trainer logs one mean over the run as train_loss, beside a column called loss.
    W&B's exports put "<run> - " before each name.
    """
    counts = {column: sum(number(row.get(column)) is not None for row in rows) for column in columns}
    whole = {column: re.sub(r"[^a-z0-9]", "", column.lower()) for column in columns}
    last = {column: re.sub(r"[^a-z0-9]", "", column.rsplit(" - ", 1)[-1].lower()) for column in columns}
    found = [column for plain in (whole, last) for name in names for column in columns if plain[column] == name]
    return max(found, key=lambda column: min(counts[column], ENOUGH), default=None)


def number(value: Any) -> float | None:
    """A number out of a cell, None if there is none."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
