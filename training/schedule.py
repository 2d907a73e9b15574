"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from config import Schedule, value_at


def warmup_steps(config: Schedule, total_steps: int) -> int:
    """Steps of warmup, at most all but the last, the null resolved: the smaller of 100 and a tenth of the run."""
    if config.name in ("cosine", "points"):
        return 0
    if config.warmup_steps is None:
        return min(100, total_steps // 10)
    return min(config.warmup_steps, max(0, total_steps - 1))


def warmup_warning(config: Schedule, total_steps: int) -> list[str]:
    """What to tell of a warmup that is cut short, because the length of the run follows from its text."""
    steps = warmup_steps(config, total_steps)
    if config.name in ("cosine", "points") or (config.warmup_steps or 0) <= steps:
        return []
    return [
        f"schedule.warmup_steps is {config.warmup_steps}, and the run has {total_steps} steps: it warms up in {steps}"
    ]


def learning_rate_ratio(config: Schedule, step: int, total_steps: int) -> float:
    """The learning rate of the step with index ``step`` (0 … total_steps − 1), as a share of the peak.

    Warmup is linear, (step+1)/(warmup+1), so that the first step already learns and the peak is reached at
    step ``warmup``; one_cycle warms up along a cosine instead (Smith 2018). What decays ends at
    ``min_lr_ratio`` exactly at the last step. wsd is warmup-stable-decay (Hu 2024), down along a line or as 1 − √x
    (Hägele 2024). points are joined by straight lines.
    """
    warmup, last, floor = warmup_steps(config, total_steps), total_steps - 1, config.min_lr_ratio
    if step < warmup:
        part = (step + 1) / (warmup + 1)
        return _cosine(1 / (warmup + 1), 1.0, part) if config.name == "one_cycle" else part
    if config.points is not None:
        return value_at(config.points, step / max(1, last))
    if config.name == "constant":
        return 1.0
    if config.name == "wsd":
        start = max(warmup, last - config.decay_fraction * total_steps)
        if step <= start:
            return 1.0
        if config.decay_shape == "sqrt":
            return 1.0 + (floor - 1.0) * math.sqrt((step - start) / (last - start))
        return 1.0 + (floor - 1.0) * (step - start) / (last - start)
    return _cosine(1.0, floor, (step - warmup) / max(1, last - warmup))


def _cosine(start: float, end: float, part: float) -> float:
    """From start to end along half a cosine, ``part`` from 0 to 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))
