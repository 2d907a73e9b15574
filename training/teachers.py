"""Models that a run learns from, and what they make of a micro-batch.

Shape suffixes: B sequences, T time, D width, N tokens of the micro-batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from hardware import Hardware
from model.gpt import GPT
from regularizers.inputs import InputChanges
from regularizers.objective import Taught


@dataclass(frozen=True)
class Teacher:
    """One of them, in evaluation mode and on the hardware's device."""

    model: GPT
    forward: Callable[..., Tensor]
    """The model, compiled or not."""
    share: float
    """Of the mean of all teachers' probabilities; the shares add up to 1."""
    described: dict[str, Any]
    """What summary.json has of it; ``sha256`` is that of its weights."""

    def compiled(self, in_blocks: bool) -> Teacher:
        """The same with a compiled forward."""
        return replace(self, forward=self.model.compiled(in_blocks))


@torch.no_grad()
def predictions(
    teachers: Sequence[Teacher], batch: Batch, changes: InputChanges | None, hardware: Hardware
) -> list[Taught]:
    """What the teachers make of a batch, for the objective to form their probabilities from, chunk by chunk.

    They read it as it comes from the loader: no token replaced, no embedding changed. Where the student reads a mixture
    of two sequences, its target is the mixture of their predictions for each, as it is of the two targets.
    """
    found = []
    for teacher in teachers:
        with hardware.autocast():
            hidden_BTD = teacher.forward(batch.tokens_BT, batch.positions_BT, batch.documents_BT)
        hidden_BTD, weight_VD = hidden_BTD.to(hardware.dtype), teacher.model.output_weight
        share_B = torch.full((len(hidden_BTD),), teacher.share, device=hidden_BTD.device)
        parts = [(hidden_BTD, share_B)]
        if changes is not None and changes.partner_B is not None and changes.share_B is not None:
            own_B = share_B * changes.share_B
            parts = [(hidden_BTD, own_B), (hidden_BTD[changes.partner_B], share_B - own_B)]
        time = hidden_BTD.shape[1]
        found += [Taught(part.flatten(0, 1), weight_VD, shares.repeat_interleave(time)) for part, shares in parts]
    return found
