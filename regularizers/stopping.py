"""Early stopping (Prechelt 1998): the length of the run as a regularizer."""

from __future__ import annotations

from config import Regularizers


def evaluations_without_improvement(losses: list[float], min_delta: float) -> int:
    """How many of the last ``losses`` did not improve on the best before them by more than ``min_delta``.

    A pure function of the run's evaluations, which metrics.jsonl keeps: a resumed run knows its patience.
    """
    best, since = float("inf"), 0
    for loss in losses:
        if loss < best - min_delta:
            best, since = loss, 0
        else:
            since += 1
    return since


def patience_is_over(losses: list[float], config: Regularizers) -> bool:
    """Whether early stopping ends the run after these validation losses, in their order."""
    patience = config.early_stopping_patience
    return patience > 0 and evaluations_without_improvement(losses, config.early_stopping_min_delta) >= patience
