"""Averaged weights: trained by nobody, evaluated, saved and exported in place of the raw ones.

EMA: θ̄ ← d·θ̄ + (1−d)·θ after each step (Tarvainen 2017), where d is ``ema_decay`` but at most (1 + t) / (10 + t) at the
t-th step, so that a short run's average is one of its own weights and not of those it began with. SWA: the equal
average of the weights after every ``swa_every`` steps from the fraction ``swa_start`` of the run on (Polyak 1992,
Izmailov 2018). Either average starts as the weights after its first counted step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from config import Regularizers


class WeightAverage:
    """The average of a model's weights, in their own precision, on their own device."""

    def __init__(self, config: Regularizers, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.weights: dict[str, Tensor] = {}  # empty before the first counted step
        self.begins_after = 0  # no weights up to this step count: those of a run from which this one branched

    def count(self, step: int) -> int:
        """How many of the weights after ``begins_after`` + 1 … ``step`` steps went into the average."""
        return self._due(step) - self._due(self.begins_after)

    def _due(self, step: int) -> int:
        """How many of the weights after 1 … ``step`` steps the config counts."""
        if self.config.swa_start is None:
            return step if self.config.ema_decay else 0
        since = step - self.first
        return 0 if since < 0 else since // self.config.swa_every + 1

    @property
    def first(self) -> int:
        """The first step that SWA counts, as long as it is on."""
        return max(1, round((self.config.swa_start or 0) * self.total_steps))

    def goes_on(self, parent: WeightAverage) -> bool:
        """Whether a branch with this average takes over its parent's, weights and count.

        An EMA goes on from any EMA: it forgets the old decay as it forgets the old weights. An SWA, being an equal
        average, goes on only if the parent counted exactly the weights that this one would have counted by then; if
        not (a longer run, with SWA from the same fraction on, starts later), it is made of the branch's weights alone.
        """
        if self.config.swa_start is None or parent.config.swa_start is None:
            return bool(self.config.ema_decay and parent.config.ema_decay)
        return (self.first, self.config.swa_every) == (parent.first, parent.config.swa_every)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after ``step`` steps, if the average counts that step."""
        count = self.count(step)
        if count == self.count(step - 1):
            return
        raw = {name: weight.detach() for name, weight in weights.items()}
        if count == 1:
            self.weights = {name: weight.clone() for name, weight in raw.items()}
            return
        new = 1 - min(self.config.ema_decay, (1 + count) / (10 + count)) if self.config.ema_decay else 1 / count
        torch._foreach_lerp_(list(self.weights.values()), [raw[name] for name in self.weights], new)

    @contextmanager
    def in_place_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside this context ``weights`` have the averaged values, and after it their own, bit for bit."""
        self._exchange(weights)
        try:
            yield
        finally:
            self._exchange(weights)

    @torch.no_grad()
    def _exchange(self, weights: Mapping[str, Tensor]) -> None:
        for name, average in self.weights.items():
            own = weights[name].clone()
            weights[name].copy_(average)
            average.copy_(own)
