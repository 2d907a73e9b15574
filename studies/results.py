"""What the runs of a study came to, read from their directories alone: nobody else's memory is trusted.

A run counts when its summary says finished and its metric is a finite number; everything else is listed with the
reason.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from files import write_text
from studies.space import FRESH_SEEDS, TUNING_SEEDS, Point, Study
from tracking.metrics import read_metrics
from tracking.run_directory import read_summary

FINISHED = "finished"
DIVERGED = 1e12  # a metric beyond this (a perplexity can reach 1e300) is as good as not finite
# The columns of results.csv after point, seed, the knobs, status and the study's metric: name → metric of a run.
COLUMNS = {
    "val/loss": "val/loss",
    "val/bits_per_byte": "val/bits_per_byte",
    "test/loss": "test/loss",
    "test/bits_per_byte": "test/bits_per_byte",
    "ece": "val/ece",
    "brier": "val/brier",
    "gap": "gap/loss",
    "tokens_per_second": "tokens_per_second",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Result:
    """One run: a point on a seed. ``value`` is the study's metric, only of finished runs and only if it is finite."""

    point: Point
    seed: int
    status: str  # finished, running, failed, preempted, waiting
    summary: dict[str, Any]
    records: list[dict[str, Any]]
    value: float | None
    directory: Path

    @property
    def over(self) -> bool:
        """Whether nothing more comes of it unless it is started again."""
        return self.status in (FINISHED, "failed")

    @property
    def stage(self) -> str:
        """What its seed is for: search, tuning or fresh."""
        return "search" if self.seed < FRESH_SEEDS else "fresh" if self.seed < TUNING_SEEDS else "tuning"

    def number(self, name: str) -> float | None:
        """A metric of the run as it ended: of the records, or a value of the summary, or ``seconds`` of training."""
        if name in ("seconds", "seconds_per_step"):
            speed, tokens, steps = (self.summary.get(key) for key in ("tokens_per_second", "tokens", "steps"))
            if not (speed and tokens and steps):
                return None
            return float(tokens / speed if name == "seconds" else tokens / speed / steps)
        value = value_of(self.records, name)
        return value if value is not None else _finite(self.summary.get(name))

    @property
    def reason(self) -> str:
        """Why a run that did not finish, or whose metric is no number, does not count; empty for the others."""
        if self.status == "failed":
            error = str(self.summary.get("error") or "").strip()
            if error:
                return error.splitlines()[0]
            if self.summary.get("status") == FINISHED:
                return "it ran to its end, but the metric there is not a finite number: it diverged"
            if "steps" in self.summary:
                return f"stopped at step {self.summary['steps']:,}: the gradient was not finite"
            return "ended without saying why"
        words = {"running": "still running, or killed", "preempted": "stopped, as asked", "waiting": "not started"}
        return words.get(self.status, "")


def metric_value(run_directory: Path, metric: str) -> float | None:
    """The value of ``metric`` that counts for the run, None if there is none or it is not finite.

    That is the last one in metrics.jsonl, or, of "best ...", the best one; of averaged weights from where they were
    evaluated on (``val_average/...`` for ``val/...``).
    """
    return value_of(read_metrics(run_directory), metric)


def value_of(records: list[dict[str, Any]], metric: str) -> float | None:
    """``metric_value`` of records that were read already."""
    name = metric.removeprefix("best ")
    twin = name.replace("val/", "val_average/", 1) if name.startswith("val/") else name
    # The last line that has it, even as null (not finite): an earlier value is not what the run came to.
    held = [_finite(record.get(twin, record.get(name))) for record in records if name in record or twin in record]
    if name == metric or not held:
        return held[-1] if held else None
    known = [value for value in held if value is not None]
    better = max if name.endswith("accuracy") else min
    return better(known) if known else None


def read_result(study: Study, point: Point, seed: int) -> Result:
    """What the run of a point on a seed came to so far."""
    directory = study.run_directory(point, seed)
    summary, records = read_summary(directory), read_metrics(directory)
    status = str(summary.get("status", "waiting"))
    value = value_of(records, study.metric) if status == FINISHED else None
    if status == FINISHED and value is None:
        status = "failed"
    return Result(point, seed, status, summary, records, value, directory)


def _finite(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < DIVERGED
    return float(value) if usable else None


def varied(points: Sequence[Point]) -> list[str]:
    """The knobs that the points set, in the order in which they are met."""
    return list(dict.fromkeys(knob for point in points for knob in point.knobs))


def write_results(path: Path, study: Study, results: list[Result]) -> None:
    """results.csv: one row a run. An empty cell is a value that is not there; knobs as the run's config has them."""
    knobs = varied([result.point for result in results])
    configs: dict[str, dict[str, Any]] = {}
    rows = []
    for result in results:
        if result.point.name not in configs:
            configs[result.point.name] = study.config(result.point, result.seed).flat()
        row: dict[str, Any] = {"point": result.point.name, "seed": result.seed}
        row |= {knob: configs[result.point.name].get(knob) for knob in knobs}
        row |= {"status": result.status, "stage": result.stage, "value": result.value}
        row |= {name: result.number(metric) for name, metric in COLUMNS.items()}
        rows.append(row | {"reason": result.reason, "directory": result.directory})
    write_table(path, rows)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with the columns of its first row, in one step."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def is_finished(directory: Path) -> bool:
    """Whether the run is over: its summary says so, not the queue."""
    return read_summary(directory).get("status") == "finished"
