"""How far a study is: what the directories of its runs say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from files import is_locked
from studies.design import design
from studies.space import Study
from tracking.run_directory import read_summary

RECENT = 10  # finished runs by which the pace is judged


def status_lines(study: Study) -> list[str]:
    """A table of points by seeds, the stage, the best point so far, and how long the rest of the stage will take."""
    known = design(study)
    wanted = {(point.name, seed): point for point, seed in known.wanted}
    names, seeds = list(dict.fromkeys(name for name, _ in wanted)), sorted({seed for _, seed in wanted})
    width = max(map(len, names))
    lines = [f"{'':{width}}" + "".join(f"  {f'seed {seed}':>9}" for seed in seeds)]
    counts: Counter[str] = Counter()
    ends: list[float] = []
    for name in names:
        cells = []
        for seed in seeds:
            if (name, seed) not in wanted:
                cells.append("")
                continue
            result = known.result(wanted[name, seed], seed)
            state = state_of(result.directory)
            cells.append(state if result.value is None else f"{result.value:.4f}")
            counts[state] += 1
            if state == "finished":
                ends.append((result.directory / "summary.json").stat().st_mtime)
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>9}" for cell in cells))
    lines += ["", ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + f" ({study.metric})"]
    lines.append(f"stage             {known.stage}")
    if known.winner is not None:
        lines.append(f"best so far       {known.winner.name}")
    left = counts["waiting"] + counts["running"]
    if study.search == "tpe" and known.stage == "search":
        left += max(0, (study.trials or 0) + 1 - len(known.points)) * len(study.rungs[0])
    recent = sorted(ends)[-RECENT:]
    if left and len(recent) > 1:
        minutes = left * (recent[-1] - recent[0]) / (len(recent) - 1) / 60
        lines.append(f"time left         about {minutes:.0f} minutes of this stage at the pace of the last runs")
    return lines


def state_of(directory: Path) -> str:
    """What the run in a directory is: waiting, running, failed or finished."""
    state = str(read_summary(directory).get("status", "waiting"))
    if state != "finished" and is_locked(directory / "lock"):
        return "running"
    return "waiting" if state in ("running", "preempted") else state  # cut off: it waits to be gone on with
