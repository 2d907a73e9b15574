"""Every picture wellposed draws. matplotlib is imported when the first one is wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TRAIN, VAL, AVERAGE, BEST = "#9aa5b1", "#0b6e99", "#7a5195", "#d1495b"


def _axes(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[3] + [1] * (rows - 1))[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    """Write the picture in one step, so that a viewer never meets half of it."""
    temporary = path.with_name(f".{path.name}.new")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


def column(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, where it was logged."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def smooth(values: list[float], weight: float) -> list[float]:
    """Bias-corrected exponential average, for curves of single batches."""
    average, norm, smoothed = 0.0, 0.0, []
    for value in values:
        average, norm = weight * average + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(average / norm)
    return smoothed


def curves(records: list[dict[str, Any]], path: Path, title: str, verdict: str = "") -> None:
    """Loss over the run: train (each logged batch, faint, and smoothed), val, the best point; gap below."""
    figure, (losses, gaps) = _axes(8, 6, rows=2)
    steps, train = column(records, "train/loss")
    if train:
        losses.plot(steps, train, color=TRAIN, alpha=0.35, linewidth=0.8)
        losses.plot(steps, smooth(train, 0.8), color=TRAIN, linewidth=1.6, label="train (batches, smoothed)")
    for name, color, label in (("val/loss", VAL, "val"), ("val_average/loss", AVERAGE, "val, averaged weights")):
        steps, values = column(records, name)
        if values:
            losses.plot(steps, values, "o-", color=color, markersize=3.5, linewidth=1.6, label=label)
    judged = "val_average/loss" if column(records, "val_average/loss")[1] else "val/loss"
    steps, values = column(records, judged)
    if values:
        best = min(range(len(values)), key=values.__getitem__)
        losses.plot(steps[best], values[best], "o", color=BEST, markersize=7, zorder=5)
        losses.annotate(
            f"best {values[best]:.4f}", (steps[best], values[best]), textcoords="offset points", xytext=(0, -14),
            ha="right" if best >= len(values) / 2 else "left", va="top", color=BEST,
        )  # fmt: skip
        # The first steps fall from ln V and would flatten everything after them.
        ceiling = max(values[0], *(smooth(train, 0.8)[len(train) // 10 :] or [0]))
        floor = min(values + smooth(train, 0.8))
        losses.set_ylim(floor - 0.08 * (ceiling - floor + 1e-3), ceiling + 0.15 * (ceiling - floor + 1e-3))
    losses.set_ylabel("nats per token")
    losses.set_title(title, fontsize=10)
    if verdict:
        figure.supxlabel(verdict, fontsize=8)
    if losses.get_legend_handles_labels()[0]:
        losses.legend(frameon=False)
    steps, values = column(records, "gap/loss")
    gaps.axhline(0, color="black", linewidth=0.6)
    gaps.plot(steps, values, "o-", color=BEST, markersize=3, linewidth=1.2)
    gaps.set_ylabel("gap: val − train")
    gaps.set_xlabel("step")
    _save(figure, path)
