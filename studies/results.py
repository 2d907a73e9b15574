"""What the runs of a study came to."""

from __future__ import annotations

import fcntl
import math
from pathlib import Path

from training.run_directory import read_metrics, read_summary


def metric_value(run_directory: Path, metric: str) -> float | None:
    """The last value of ``metric``, of the averaged weights where a run keeps some; None if it has none.

    A run that stopped early has restored its best weights, so it is judged at their step.
    """
    records, summary = read_metrics(run_directory), read_summary(run_directory)
    if summary.get("stopped_early"):
        records = [record for record in records if record["step"] <= summary["best/step"]]
    averaged = metric.replace("val/", "val_average/", 1)
    name = averaged if any(averaged in record for record in records) else metric
    values = [record[name] for record in records if name in record]
    return values[-1] if values and values[-1] is not None and math.isfinite(values[-1]) else None


def is_finished(directory: Path) -> bool:
    """Whether the run is over: its summary says so, not the queue."""
    return read_summary(directory).get("status") == "finished"


def in_use(directory: Path) -> bool:
    """Whether a process is training in the run's directory."""
    try:
        with open(directory / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
