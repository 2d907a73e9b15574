"""Spikes of the training loss: noticed, logged, counted. What they do to the weights, gradient clipping bounds.

Judged as OLMo 2's skip-step does (2501.00656): against the mean and spread of the losses before it.
"""

from __future__ import annotations

import math
from statistics import fmean, pstdev

WINDOW = 128  # steps that are remembered
NEEDED = 16  # before anything is called a spike
SPREADS = 6.0  # standard deviations above the mean
LEAST = 0.5  # nats above the mean: a nearly constant loss has hardly any spread


def is_spike(loss: float, history: list[float]) -> bool:
    """Whether ``loss`` (nats per token) is a spike against the ``history`` before it, to which it is then added.

    A spike is stored clipped to the threshold, so that it cannot hide the next one, and so that a loss that stays
    high is told a few times only.
    """
    limit = math.inf
    if len(history) >= NEEDED:
        limit = fmean(history) + max(LEAST, SPREADS * pstdev(history))
    if math.isfinite(loss):
        history.append(min(loss, limit))
        del history[:-WINDOW]
    return loss > limit
