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


def _panels(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """A figure with panels side by side, each with a horizontal axis of its own."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, panels


def reliability(calibration: Any, path: Path, title: str) -> None:
    """Reliability diagram of a training.evaluation.Calibration: accuracy over confidence, and the tokens of each bin.

    The coloured pieces reach from a bin's accuracy to its mean confidence: they are the gaps that ECE averages.
    """
    figure, (diagram, counts) = _axes(5.5, 6, rows=2)
    bins = len(calibration.tokens)
    width = 1 / bins
    filled = [index for index in range(bins) if calibration.tokens[index] > 0]
    middles = [(index + 0.5) * width for index in filled]
    accuracy = [calibration.accuracy[index] for index in filled]
    confidence = [calibration.confidence[index] for index in filled]
    diagram.bar(middles, accuracy, width * 0.94, color=VAL, alpha=0.85, label="accuracy", zorder=2)
    signs = ((1, BEST, "too sure"), (-1, AVERAGE, "not sure enough"))
    for sign, color, label in signs:
        rows = [row for row in zip(middles, accuracy, confidence, strict=True) if sign * (row[2] - row[1]) > 0]
        if rows:
            where, right, sure = zip(*rows, strict=True)
            heights = [high - low for high, low in zip(sure, right, strict=True)]
            diagram.bar(where, heights, width * 0.94, bottom=right, color=color, alpha=0.4, label=label, zorder=3)
    diagram.plot([0, 1], [0, 1], "--", color="black", linewidth=0.9, label="calibrated", zorder=4)
    diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    diagram.set_title(f"{title}\nECE {calibration.error:.4f} over {sum(calibration.tokens):,.0f} tokens", fontsize=10)
    diagram.legend(frameon=False, loc="upper left")
    counts.bar(middles, [calibration.tokens[index] for index in filled], width * 0.94, color=TRAIN, zorder=2)
    counts.set(xlabel="confidence: probability of the likeliest token", ylabel="tokens")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    _save(figure, path)


def uncertainty_histogram(
    inside: dict[str, Any], outside: dict[str, Any], path: Path, title: str, notes: dict[str, str] | None = None
) -> None:
    """How the tokens of the corpus and of foreign text lie on each measure of uncertainty, one panel a measure.

    ``inside`` and ``outside`` map the name of a measure to its values by token, in nats; ``notes`` to a word for its
    panel, such as the AUROC. The horizontal axis ends at the 99.5th percentile; what lies beyond is in the last bar.
    """
    import numpy as np

    figure, panels = _panels(4.5 * len(inside), 3.6, len(inside))
    for panel, name in zip(panels, inside, strict=True):
        both = np.concatenate([inside[name], outside[name]])
        edges = np.linspace(min(0.0, float(both.min())), max(float(np.quantile(both, 0.995)), 1e-6), 41)
        for values, color, label in ((inside[name], VAL, "corpus"), (outside[name], BEST, "foreign text")):
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            panel.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            panel.stairs(shares, edges, color=color, linewidth=1.4, label=label)
        panel.set_xlabel(f"{name}, nats")
        panel.set_xlim(edges[0], edges[-1])
        panel.set_title((notes or {}).get(name, ""), fontsize=9)
        panel.legend(frameon=False)
    panels[0].set_ylabel("share of tokens")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)
