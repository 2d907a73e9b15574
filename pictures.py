"""Every picture wellposed draws. matplotlib is imported when the first one is wanted."""

from __future__ import annotations

import io
import math
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

TRAIN, VAL, AVERAGE, BEST = "#9aa5b1", "#0b6e99", "#7a5195", "#d1495b"


def _panels(width: float, height: float, count: int, columns: int | None = None, **options: Any) -> tuple[Any, Any]:
    """A figure with ``count`` panels, in one row or in rows of ``columns``; ``options`` are those of subplots."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook's own setting may name what these programs do not have
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # names of files and runs may hold dollar signs
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    columns = columns or count
    panels = list(figure.subplots(-(-count // columns), columns, squeeze=False, **options).flat)
    for spare in panels[count:]:
        spare.set_visible(False)
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, panels[:count]


def save(figure: Any, path: Path) -> None:
    """Write the picture as a PNG in one step, so that nobody reads half a file, also when two processes write it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        figure.savefig(temporary, format="png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # when the disk was full


def column(records: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps, ascending, and values of one metric where it is a finite number; of several at one step the last."""
    values = {
        record["step"]: float(record[name])
        for record in records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name]) and "step" in record
    }
    return sorted(values), [values[step] for step in sorted(values)]


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and its neighbours: four on either side, fewer in short curves and near the ends.

    As many on one side as on the other, so that a straight line stays as it is and a falling curve does not lag.
    """
    most = min(4, len(values) // 20)
    reaches = [min(most, index, len(values) - 1 - index) for index in range(len(values))]
    return [fmean(values[index - reach : index + reach + 1]) for index, reach in enumerate(reaches)]


def curves(records: list[dict[str, Any]], path: Path, title: str, verdict: str = "") -> None:
    """Loss over the run: train (each logged batch, faint, and smoothed), val, the best point; gap below."""
    figure, (losses, gaps) = _panels(8, 6, 2, 1, sharex=True, height_ratios=[3, 1])
    steps, train = column(records, "train/loss")
    smoothed, judged = smooth(train), None
    if train:
        losses.plot(steps, train, color=TRAIN, alpha=0.35, linewidth=0.8)
        losses.plot(steps, smoothed, color=TRAIN, linewidth=1.6, label="train (batches, smoothed)")
    for name, color, label in (("val/loss", VAL, "val"), ("val_average/loss", AVERAGE, "val, averaged weights")):
        steps, values = column(records, name)
        if values:
            losses.plot(steps, values, "o-", color=color, markersize=3.5, linewidth=1.6, label=label)
            judged = steps, values
    if judged:
        steps, values = judged
        best = values.index(min(values))
        mark = {"color": BEST, "markersize": 7, "zorder": 5, "label": f"best {values[best]:.4f}"}
        losses.plot(steps[best], values[best], "o", **mark)
        # The first steps fall from ln V and would flatten everything after them.
        ceiling = max(values[0], *(smoothed[len(train) // 10 :] or [0]))
        floor = min(values + smoothed)
        losses.set_ylim(floor - 0.08 * (ceiling - floor + 1e-3), ceiling + 0.15 * (ceiling - floor + 1e-3))
    if train or judged:
        losses.legend(frameon=False)
    losses.set_ylabel("nats per token")
    losses.set_title(title, fontsize=10)
    figure.supxlabel(verdict, fontsize=8)
    gaps.axhline(0, color="black", linewidth=0.6)
    gaps.plot(*column(records, "gap/loss"), "o-", color=BEST, markersize=3, linewidth=1.2)
    gaps.set(ylabel="gap: val − train", xlabel="step")
    save(figure, path)


def reliability(calibration: Any, path: Path, title: str) -> None:
    """Reliability diagram of an evaluation.evaluate.Calibration: accuracy over confidence, and the tokens of each bin.

    The coloured pieces reach from a bin's accuracy to its mean confidence: they are the gaps that ECE averages.
    """
    import numpy as np

    figure, (diagram, counts) = _panels(5.5, 6, 2, 1, sharex=True, height_ratios=[3, 1])
    bins = len(calibration.tokens)
    middles, width = (np.arange(bins) + 0.5) / bins, 0.94 / bins
    accuracy = np.array(calibration.accuracy)
    gaps = np.array(calibration.confidence) - accuracy
    diagram.bar(middles, accuracy, width, color=VAL, alpha=0.85, label="accuracy", zorder=2)
    for side, color, label in ((gaps.clip(min=0), BEST, "too sure"), (gaps.clip(max=0), AVERAGE, "not sure enough")):
        if side.any():
            diagram.bar(middles, side, width, bottom=accuracy, color=color, alpha=0.4, label=label, zorder=3)
    diagram.plot([0, 1], [0, 1], "--", color="black", linewidth=0.9, label="calibrated", zorder=4)
    diagram.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
    diagram.set_title(f"{title}\nECE {calibration.error:.4f} over {sum(calibration.tokens):,.0f} tokens", fontsize=10)
    diagram.legend(frameon=False, loc="upper left")
    counts.bar(middles, calibration.tokens, width, color=TRAIN, zorder=2)
    counts.set(xlabel="confidence: probability of the likeliest token", ylabel="tokens")
    counts.yaxis.set_major_formatter("{x:,.0f}")
    save(figure, path)


def uncertainty_histogram(pairs: dict[str, tuple[Any, Any]], path: Path, title: str, notes: dict[str, str]) -> None:
    """How the tokens of the corpus and of foreign text lie on each measure of uncertainty, one panel a measure.

    ``pairs`` maps the name of a measure to its values by token, in nats, for the corpus and for foreign text;
    ``notes`` to a word for its panel, such as the AUROC. The horizontal axis ends at the 99.5th percentile; what lies
    beyond is in the last bar.
    """
    import numpy as np

    figure, panels = _panels(4.5 * len(pairs), 3.6, len(pairs))
    for panel, (name, pair) in zip(panels, pairs.items(), strict=True):
        both = np.concatenate(pair)
        edges = np.linspace(min(0.0, float(both.min())), max(float(np.quantile(both, 0.995)), 1e-6), 41)
        for values, color, label in zip(pair, (VAL, BEST), ("corpus", "foreign text"), strict=True):
            shares = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
            panel.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            panel.stairs(shares, edges, color=color, linewidth=1.4, label=label)
        panel.set(xlabel=f"{name}, nats", xlim=(edges[0], edges[-1]))
        panel.set_title(notes[name], fontsize=9)
        panel.legend(frameon=False)
    panels[0].set_ylabel("share of tokens")
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def ensemble(splits: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Loss and calibration after 1, 2, … members: ``{"val": {"members": [losses], "after": [metrics]}, ...}``."""
    figure, (losses, errors) = _panels(8, 3.6, 2)
    for (name, found), color in zip(splits.items(), (VAL, BEST), strict=False):
        counts = range(1, len(found["after"]) + 1)
        losses.plot(counts, found["members"], "o", color=color, alpha=0.35, markersize=4, label=f"{name}, each alone")
        for panel, metric in ((losses, "loss"), (errors, "ece")):
            values = [metrics[metric] for metrics in found["after"]]
            panel.plot(counts, values, "o-", color=color, markersize=4, label=f"{name}, mean probability")
    losses.set_ylabel("nats per token")
    errors.set_ylabel("expected calibration error")
    for panel in (losses, errors):
        panel.set_xlabel("members")
        panel.xaxis.get_major_locator().set_params(integer=True)
    losses.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


# ---------------------------------------------------------------------------------------------- pictures of studies
# Each returns a figure, wide for a page or narrow for a phone: save() makes the PNG, svg() what the report shows.

GOOD, FAINT = "#1f8a5b", "#9aa5b1"
BEST_FEW = (GOOD, AVERAGE, "#d98e04")
# What each colour becomes for readers in the dark; black is that of the text.
IN_THE_DARK = {"#000000": "#d5dde5", VAL: "#5db4d8", GOOD: "#57bd8d", BEST: "#ea7d8a", AVERAGE: "#b08fce"}


def svg(figure: Any) -> str:
    """The figure as SVG whose colours follow the light or dark scheme of who looks, in the reader's own font."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "wellposed"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", drawing)
    light, dark = "", ""
    for number, (color, other) in enumerate(IN_THE_DARK.items()):
        drawing = drawing.replace(color, f"var(--c{number})")
        light, dark = f"{light}--c{number}:{color};", f"{dark}--c{number}:{other};"
    style = f"<style>svg{{{light}fill:var(--c0)}}@media(prefers-color-scheme:dark){{svg{{{dark}}}}}</style>"
    return drawing.replace(">", f">{style}", 1)


def _label(name: str, most: int = 38) -> str:
    """A name that leaves room for the picture."""
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _rows(panels: Any, names: list[str], narrow: bool) -> None:
    """Names along the vertical axis, first on top; on a phone they stand above their rows instead."""
    for panel in panels:
        panel.set_ylim(len(names) - 0.4, -0.9 if narrow else -0.6)
        panel.grid(axis="y", visible=False)
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
        named = panel is panels[0] and not narrow
        panel.set_yticks(range(len(names)), [_label(name) if named else "" for name in names])
        for row, name in enumerate(names if narrow else []):
            where = {"xycoords": panel.get_yaxis_transform(), "textcoords": "offset points", "va": "bottom"}
            panel.annotate(_label(name, 44), (0, row), xytext=(0, 3), fontsize=8, **where)


def _ends(values: Sequence[float], within: Sequence[float] = ()) -> tuple[float, float]:
    """The ends of an axis: room for ``within`` and for all values but those of runs that diverged.

    These lie 20 times as far from the median as three quarters of the others, and would flatten what matters.
    """
    middle = median(values)
    distances = sorted(abs(value - middle) for value in values)
    reach = 20 * distances[3 * (len(distances) - 1) // 4]
    inside = [value for value in values if abs(value - middle) <= reach or not reach] + list(within)
    pad = 0.06 * (max(inside) - min(inside)) or 1e-4
    return min(inside) - pad, max(inside) + pad


def slopes(
    panels: dict[str, list[tuple[float, float]]],
    sides: tuple[str, str],
    unit: str,
    minimize: bool,
    narrow: bool = False,
) -> Any:
    """A line a seed from the baseline's value to another point's, and their means; a panel for each group of seeds.

    Seeds on which the point is not better are dashed and red. A value far off lies outside of the picture.
    """
    figure, axes = _panels(3.7 if narrow else 7.4, 3.4, len(panels), sharey=True)
    for axis, (title, pairs) in zip(axes, panels.items(), strict=True):
        for its, mine in pairs:
            better = mine < its if minimize else mine > its
            color, dashes = (GOOD, "o-") if better else (BEST, "o--")
            axis.plot([0, 1], [its, mine], dashes, color=color, markersize=3.5, linewidth=1.2, alpha=0.75)
        means = [fmean(side) for side in zip(*pairs, strict=True)]
        axis.plot([0, 1], means, "o-", color="black", markersize=6, linewidth=2.4)
        axis.set_title(title, fontsize=9 if narrow else 10, loc="left")
        axis.set_xticks([0, 1], sides)
        axis.set_xlim(-0.4, 1.4)
        axis.grid(axis="x", visible=False)
    axes[0].set_ylim(_ends([value for pairs in panels.values() for pair in pairs for value in pair]))
    axes[0].set_ylabel(unit)
    return figure


def intervals(rows: list[dict[str, Any]], unit: str, narrow: bool = False) -> Any:
    """A row for each measurement of one ``difference``, with its interval ``low`` to ``high`` (None: unknown).

    What is not ``sure`` is grey and hollow, and an interval of it that reaches far out is cut off at the edge.
    """
    figure, (panel,) = _panels(3.7 if narrow else 7.4, 0.9 + len(rows) * (0.5 if narrow else 0.38), 1)
    panel.axvline(0, color="black", linewidth=0.9)
    for number, row in enumerate(rows):
        color = VAL if row["sure"] else FAINT
        if row["low"] is not None:
            width = 3 if row["sure"] else 1.4
            panel.plot([row["low"], row["high"]], [number, number], color=color, linewidth=width)
        filling = color if row["sure"] else "none"
        panel.plot(row["difference"], number, "D", color=color, markersize=8, markerfacecolor=filling)
    inside = [row["difference"] for row in rows] + [0.0]
    inside += [row[end] for row in rows if row["sure"] for end in ("low", "high") if row[end] is not None]
    room = 0.5 * (max(inside) - min(inside)) or 1e-4
    panel.set_xlim(min(inside) - room, max(inside) + room)
    panel.locator_params(axis="x", nbins=4 if narrow else 7)
    _rows([panel], [row["label"] for row in rows], narrow)
    panel.set_xlabel(f"difference to the baseline, {unit}")
    return figure


def study_curves(points: list[dict[str, Any]], unit: str, narrow: bool = False) -> Any:
    """Curves of every point: the mean over seeds, and a band from the lowest to the highest seed.

    A point has ``label``, ``role`` (baseline, best, worst or rest, which is drawn faint) and, under ``val`` and
    ``train``, one (steps, values) for each seed.
    """
    figure, panels = _panels(3.7 if narrow else 7.4, 5.8 if narrow else 3.9, 2, 1 if narrow else 2, sharey=True)
    styles = {"rest": (FAINT, 0.8, "-"), "worst": (BEST, 1.5, ":"), "baseline": ("black", 1.8, "--")}
    few, ceilings, floors = iter(BEST_FEW), [], []
    named = [point["label"] for point in points if point["role"] != "rest"]
    for point in sorted(points, key=lambda point: [*styles, "best"].index(point["role"])):
        role = point["role"]
        color, width, dashes = styles.get(role) or (next(few, FAINT), 1.8, "-")
        for panel, part in zip(panels, ("val", "train"), strict=True):
            steps, low, mean, high = _over_seeds(point[part])
            label = _label(point["label"]) if role != "rest" and part == "val" else None
            alpha = 0.35 if role == "rest" else 1
            panel.plot(steps, mean, dashes, color=color, linewidth=width, alpha=alpha, label=label)
            if steps and role != "rest":
                floors.append(min(low))
            if steps and role in ("baseline", "best"):
                panel.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
                ceilings.append(max(value for step, value in zip(steps, mean, strict=True) if step >= steps[-1] / 2))
    if len(named) < len(points):
        panels[0].plot([], [], color=FAINT, alpha=0.5, linewidth=0.8, label="the other points")
    height = max(ceilings, default=0.0) - min(floors, default=0.0)
    if height > 0:  # the steep beginning would flatten what matters
        panels[0].set_ylim(min(floors) - 0.08 * height, max(ceilings) + 0.6 * height)
    for panel, title in zip(panels, ("validation", "training text, in evaluation mode"), strict=True):
        panel.set_title(title, fontsize=10, loc="left")
        panel.locator_params(axis="x", nbins=5)
        panel.set_xlabel("step" if panel is panels[-1] or not narrow else "")
    panels[0].set_ylabel(unit)
    columns = 1 if narrow else 3 if max(map(len, named), default=0) < 24 else 2
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5)
    return figure


def _over_seeds(runs: list[tuple[list[float], list[float]]]) -> tuple[list[float], ...]:
    """Steps that half of the runs have, and the lowest, mean and highest value there."""
    by_step: dict[float, list[float]] = {}
    for steps, values in runs:
        for step, value in zip(steps, values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(step for step, values in by_step.items() if len(values) >= len(runs) // 2)
    seeds = [by_step[step] for step in steps]
    return steps, list(map(min, seeds)), list(map(fmean, seeds)), list(map(max, seeds))


def dots(
    names: list[str], panels: dict[str, list[list[float]]], baseline: int | None = None, winner: int | None = None,
    narrow: bool = False,
) -> Any:  # fmt: skip
    """One row a point, one panel a measure: each seed as a faint dot, their mean as a full one, the winner's a diamond.

    ``panels`` maps the measure's name to the seeds' values of each row; a line marks the mean of row ``baseline``. An
    arrow at the edge stands for a seed far outside.
    """
    height = (0.9 + len(names) * 0.36) * len(panels) if narrow else 0.9 + len(names) * 0.26
    figure, axes = _panels(3.7 if narrow else 7.4, height, len(panels), 1 if narrow else None)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        best = rows[winner] if winner is not None else []
        left, right = _ends([value for values in rows for value in values], best)
        for number, values in enumerate(rows):
            color = "black" if number == baseline else GOOD if number == winner else VAL
            for value in values:
                place, mark = (left, "<") if value < left else (right, ">") if value > right else (value, "o")
                axis.plot(
                    place, number, mark, color=color, markersize=4, alpha=0.3 if mark == "o" else 1, clip_on=False
                )
            if values and left <= fmean(values) <= right:
                axis.plot(fmean(values), number, "D" if number == winner else "o", color=color, markersize=6)
            if values and number == baseline:
                axis.axvline(fmean(values), color="black", linewidth=0.8, linestyle="--")
        axis.set_xlim(left, right)
        axis.set_title(title, fontsize=10, loc="left")
        axis.locator_params(axis="x", nbins=4 if narrow or len(panels) > 1 else 7)
    _rows(axes, names, narrow)
    return figure


def heatmap(
    differences: list[list[float | None]], knobs: tuple[str, str], values: tuple[list[str], list[str]], unit: str,
    narrow: bool = False,
) -> Any:  # fmt: skip
    """Difference to the baseline over two knobs: rows by the first, columns by the second, None where there is none.

    Blue is lower, which for a loss is better.
    """
    import numpy as np

    grid = np.array([[np.nan if cell is None else cell for cell in row] for row in differences], dtype=float)
    most = float(np.nanmax(np.abs(grid))) or 1.0
    width = 3.7 if narrow else min(7.4, 2.6 + 0.95 * grid.shape[1])
    figure, (panel,) = _panels(width, 1.6 + 0.5 * grid.shape[0], 1)
    mesh = panel.pcolormesh(grid, cmap="RdBu_r", vmin=-most, vmax=most, edgecolors="none")
    for row, column in np.ndindex(grid.shape):
        if np.isfinite(grid[row, column]):
            dark = abs(grid[row, column]) > 0.6 * most
            panel.text(
                column + 0.5, row + 0.5, f"{grid[row, column]:+.3f}", ha="center", va="center",
                fontsize=7.5 if narrow else 9, color="#fafafa" if dark else "#151515",
            )  # fmt: skip
    panel.set_yticks(np.arange(grid.shape[0]) + 0.5, [_label(value) for value in values[0]])
    panel.set_xticks(np.arange(grid.shape[1]) + 0.5, [_label(value) for value in values[1]])
    panel.set(ylabel=knobs[0], xlabel=knobs[1])
    panel.grid(visible=False)
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=panel, orientation="horizontal" if narrow else "vertical", shrink=0.8)
    bar.outline.set_visible(False)
    bar.set_label(f"difference to the baseline, {unit}" if narrow else f"difference, {unit}", fontsize=8.5)
    return figure


def dose_response(knobs: dict[str, list[dict[str, Any]]], unit: str, narrow: bool = False) -> Any:
    """Difference to the baseline over the value of a knob, one panel a knob.

    A dose has ``value`` (a number), ``difference``, those of its ``seeds`` (faint dots) and ``baseline``.
    """
    columns = 1 if narrow else min(2, len(knobs))
    size = (3.7 if narrow else 3.7 * columns + 0.4, 2.6 * -(-len(knobs) // columns))
    figure, panels = _panels(*size, len(knobs), columns, sharey=True)
    for panel, (knob, doses) in zip(panels, knobs.items(), strict=True):
        doses = sorted(doses, key=lambda dose: dose["value"])
        spaced = (
            len(doses) <= 8
        )  # a few values stand at equal distances: 0, 0.1, 1, 3 suit neither a linear nor a log axis
        across = list(range(len(doses))) if spaced else [dose["value"] for dose in doses]
        panel.axhline(0, color="black", linewidth=0.9)
        panel.plot(across, [dose["difference"] for dose in doses], color=VAL, linewidth=1.4)
        for x, dose in zip(across, doses, strict=True):
            panel.plot([x] * len(dose["seeds"]), dose["seeds"], "o", color=VAL, markersize=4, alpha=0.3)
            panel.plot(x, dose["difference"], "o", color="black" if dose["baseline"] else VAL, markersize=6)
        if spaced:
            panel.set_xticks(across, [f"{dose['value']:g}" for dose in doses])
        elif across[0] > 0 and across[-1] > 20 * across[0]:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(knob)
    panels[0].set_ylim(_ends([value for doses in knobs.values() for dose in doses for value in dose["seeds"]], [0.0]))
    figure.supylabel(f"difference to the baseline, {unit}", fontsize=9)
    return figure


def scaling(sides: dict[str, dict[str, Any]], unit: str) -> Any:
    """Loss over the amount of text: each side's ``values`` (sizes, seeds) at ``sizes``, its curve and its ``band``."""
    figure, (panel,) = _panels(7.4, 3.9, 1)
    for (name, side), color in zip(sides.items(), ("black", GOOD), strict=True):
        tokens, mean, band = side["tokens"], side["mean"], side["band"]
        panel.fill_between(tokens, mean - band, mean + band, color=color, alpha=0.12, linewidth=0)
        panel.plot(tokens, mean, "--" if color == "black" else "-", color=color, linewidth=1.8, label=_label(name))
        for runs in side["values"].T:
            panel.plot(side["sizes"], runs, "o", color=color, markersize=4, alpha=0.4)
    values = [value for side in sides.values() for value in side["values"].flat]
    pad = 0.15 * (max(values) - min(values)) + 1e-9
    panel.set_ylim(min(values) - pad, max(values) + pad)
    panel.set_xscale("log")
    sizes = next(iter(sides.values()))["sizes"]
    panel.set_xticks(sizes, [f"{size:,.0f}" for size in sizes], minor=False)
    panel.minorticks_off()
    panel.set(xlabel="training tokens", ylabel=unit)
    panel.legend(frameon=False)
    return figure
