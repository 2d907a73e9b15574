"""How far a study is: what the directories of its runs say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from files import is_locked
from studies.results import metric_value
from studies.runner import pairs, to_confirm
from studies.space import Study, confirmation_seeds
from tracking.run_directory import read_summary

RECENT = 10  # finished runs by which the pace is judged


def status_lines(study: Study) -> list[str]:
    """A table of points by seeds, the best point so far, and how long the rest will take."""
    points, best = study.points(), to_confirm(study)
    seeds = [*study.seeds, *(confirmation_seeds(study) if best is not None else [])]
    wanted = set(pairs(study))
    if best is not None:
        wanted |= {(point, seed) for point in (points[0], best) for seed in confirmation_seeds(study)}
    width = max(len(point.name) for point in points)
    lines = [f"{'':{width}}" + "".join(f"  {f'seed {seed}':>9}" for seed in seeds)]
    counts: Counter[str] = Counter()
    ends: list[float] = []
    for point in points:
        cells = []
        for seed in seeds:
            directory = study.run_directory(point, seed)
            state = state_of(directory) if (point, seed) in wanted else ""
            value = metric_value(directory, study.metric) if state == "finished" else None
            cells.append(f"{value:.4f}" if value is not None else state)
            counts[state] += 1
            if state == "finished":
                ends.append((directory / "summary.json").stat().st_mtime)
        lines.append(f"{point.name:{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    del counts[""]
    lines += ["", ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + f" ({study.metric})"]
    if best is not None:
        lines.append(f"best so far       {best.name}")
    left = counts["waiting"] + counts["running"]
    if study.search == "tpe":
        left += max(0, (study.trials or 0) + 1 - len(points)) * len(study.seeds)
    recent = sorted(ends)[-RECENT:]
    if left and len(recent) > 1:
        minutes = left * (recent[-1] - recent[0]) / (len(recent) - 1) / 60
        lines.append(f"time left         about {minutes:.0f} minutes at the pace of the last {len(recent)} runs")
    return lines


def state_of(directory: Path) -> str:
    """What the run in a directory is: waiting, running, failed or finished."""
    state = str(read_summary(directory).get("status", "waiting"))
    if state != "finished" and is_locked(directory / "lock"):
        return "running"
    return "waiting" if state in ("running", "preempted") else state  # cut off: it waits to be gone on with
