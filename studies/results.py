"""What the runs of a study came to."""

from __future__ import annotations

import math
from pathlib import Path

from training.run_directory import read_metrics


def metric_value(run_directory: Path, metric: str) -> float | None:
    """The last value of ``metric``, of the averaged weights where a run keeps some; None if it has none."""
    averaged = metric.replace("val/", "val_average/", 1)
    records = read_metrics(run_directory)
    name = averaged if any(averaged in record for record in records) else metric
    values = [record[name] for record in records if name in record]
    return values[-1] if values and values[-1] is not None and math.isfinite(values[-1]) else None
