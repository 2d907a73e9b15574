"""Studies whose runs were never trained: run directories with made-up numbers and a known truth, for tests alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from command_line import dump
from studies.design import Design, design
from studies.space import Point, Study

STEPS = 300
BYTES_PER_TOKEN = 2.2


def make_study(directory: Path, kind: type[Study] = Study, **changes: Any) -> Study:
    """A study in ``directory``; by default a grid of weight decay and dropout on three seeds."""
    values: dict[str, Any] = {
        "name": "made-up",
        "base": {"run": {"dir": str(directory / "runs")}, "training": {"max_steps": STEPS}},
        "search": "grid",
        "space": {"regularizers.weight_decay": [0.1, 0.5, 1.0, 2.0], "regularizers.residual_dropout": [0.0, 0.1, 0.2]},
        "seeds": 3,
        "tune": None,
        "confirm_seeds": 3,
    }
    study = kind.model_validate(values | changes)
    study.directory.mkdir(parents=True)
    return study


def write_runs(
    study: Study,
    effect: Callable[[Point], float],
    noise: float = 0.02,
    confirm: Sequence[str] = (),
    points: Sequence[Point] | None = None,
    random: int = 0,
) -> None:
    """Finished runs of every point and seed: a curve that ends at 4 + effect + the seed's share + noise, and a summary.

    ``confirm``: names of points that are also run on the fresh seeds.
    """
    draw = np.random.default_rng(random)
    shares = dict(zip([*study.seeds, *study.fresh_seeds], draw.normal(0, 0.05, 50).tolist(), strict=False))
    for point in points if points is not None else study.points():
        for seed in [*study.seeds, *(study.fresh_seeds if point.name in confirm else [])]:
            end = 4.0 + effect(point) + shares[seed] + draw.normal(0, noise)
            write_run(study, point, seed, end, test=end - 0.2 + draw.normal(0, noise))


def finish(study: Study, effect: Callable[[Point], float], noise: float = 0.01, random: int = 0) -> Design:
    """All runs that the study asks for, stage after stage, as those of ``write_runs``; what is there stays."""
    draw = np.random.default_rng(random)
    while True:
        known = design(study)
        missing = [(point, seed) for point, seed in known.wanted if not known.result(point, seed).over]
        for point, seed in missing:
            end = 4.0 + effect(point) + np.random.default_rng([random, seed]).normal(0, 0.05) + draw.normal(0, noise)
            write_run(study, point, seed, end, test=end - 0.2 + draw.normal(0, noise))
        if not missing:
            return known


def write_run(study: Study, point: Point, seed: int, end: float, test: float = 4.0, **summary: Any) -> Path:
    """One finished run whose val/loss ends at ``end``; keyword arguments change its summary."""
    directory = study.run_directory(point, seed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(dump(study.config(point, seed)))
    records: list[dict[str, Any]] = []
    ripple = np.random.default_rng(seed)
    for step in range(30, STEPS + 1, 30):
        fall = 4.5 * math.exp(-step / 50)
        last = step == STEPS
        gap = 0.3 * step / STEPS + (0.1 if point.baseline else 0.0)
        val = end + fall + (0.0 if last else ripple.normal(0, 0.01))
        val_or_none = val if math.isfinite(val) else None
        records.append(
            {
                "step": step,
                "tokens": step * 512,
                "epoch": step / 10,
                "train/loss": None if val_or_none is None else val - gap + ripple.normal(0, 0.1),
                "val/loss": val_or_none,
                "val/bits_per_byte": None if val_or_none is None else val / math.log(2) / BYTES_PER_TOKEN,
                "val/ece": 0.02 + 0.01 * ripple.random(),
                "val/brier": 0.8 + 0.01 * ripple.random(),
                "gap/loss": gap,
            }
        )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    values: dict[str, Any] = {
        "status": "finished",
        "hardware": {"device": "cpu", "precision": "fp32", "threads": 1},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "commit": "0123456789ab"},
        "steps": STEPS,
        "total_steps": STEPS,
        "tokens": STEPS * 512,
        "best/step": STEPS,
        "best/val/loss": end if math.isfinite(end) else None,
        "test/loss": test,
        "test/bits_per_byte": test / math.log(2) / BYTES_PER_TOKEN,
        "tokens_per_second": 15_000.0 + 100 * seed,
    }
    (directory / "summary.json").write_text(json.dumps(values | summary))
    return directory
