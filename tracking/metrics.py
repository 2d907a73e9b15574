"""metrics.jsonl: the numbers of a run, one JSON object a line with step, tokens and epoch on each."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import files


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last line is left out."""
    records = []
    path = directory / "metrics.jsonl"
    # Bytes, because what a dead machine leaves at the end of a file need not even be text.
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Metrics:
    """Appends records to metrics.jsonl; ``records`` holds all of them.

    Opening it for a run that goes on from ``step`` drops later lines and a torn one: they are written again.
    """

    def __init__(self, directory: Path, step: int) -> None:
        path = directory / "metrics.jsonl"
        self.records = [record for record in read_metrics(directory) if record["step"] <= step]
        files.write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.file = open(path, "a")

    def append(self, record: dict[str, Any]) -> dict[str, Any]:
        """One line more; returns it as it was written: JSON has no word for nan and inf, they become null."""
        record = {key: finite(value) if isinstance(value, float) else value for key, value in record.items()}
        self.records.append(record)
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError:  # a full disk: the line waits in the file's buffer, and the next checkpoint's sync tells
            pass
        return record

    def sync(self) -> None:
        """Bring all lines to the disk, before a checkpoint that counts on them; raises OSError when it refuses."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """No line follows."""
        self.file.close()


def finite(value: float) -> float | None:
    """The value, or None if it is infinite or not a number."""
    return value if math.isfinite(value) else None


def results_of(records: list[dict[str, Any]], best: dict[str, Any] | None, test: dict[str, float]) -> dict[str, Any]:
    """What the summary keeps of a run: best and final validation, the test, the speed."""
    results: dict[str, Any] = {f"test/{name}": value for name, value in test.items()}
    if best is not None:
        results |= {f"best/{name}": value for name, value in best.items()}
    for name in ("val/loss", "val/bits_per_byte", "gap/loss", "train/loss"):
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            results[f"final/{name}"] = values[-1]
    speeds = sorted(record["train/tokens_per_second"] for record in records if "train/tokens_per_second" in record)
    if speeds:
        results["tokens_per_second"] = speeds[len(speeds) // 2]
    return results
