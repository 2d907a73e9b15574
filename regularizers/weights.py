"""Regularizers that act on the weights: decoupled decay over the run, and L1/L2 penalties through the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from config import Regularizers

NEAR_ZERO = 1e-3  # a weight below this counts as gone; Adam's steps keep penalised weights from being exactly 0


def weight_decay_at(config: Regularizers, step: int, total_steps: int) -> float:
    """λ of the step with index ``step`` (0 … total_steps − 1): from weight_decay to weight_decay_end at the last.

    Constant, linear, or along half a cosine, as NanoGPT Slowrun (2026) schedules it.
    """
    start, end = config.weight_decay, config.weight_decay_end
    part = step / max(1, total_steps - 1)
    if config.weight_decay_schedule == "linear":
        return start + (end - start) * part
    if config.weight_decay_schedule == "cosine":
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))
    return start


@torch.no_grad()
def add_penalty_gradients(parameters: Iterable[Tensor], config: Regularizers) -> None:
    """Add l1·sign(w) + 2·l2·w, the gradient of l1·‖w‖₁ + l2·‖w‖₂², to the gradient of each parameter.

    Once an optimizer step: after the gradient is that of the whole step, before it is clipped.
    """
    if not config.l1 and not config.l2:
        return
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if config.l1:
            parameter.grad.add_(parameter.sign(), alpha=config.l1)
        if config.l2:
            parameter.grad.add_(parameter, alpha=2 * config.l2)


@torch.no_grad()
def sparsity(weights: Mapping[str, Tensor], threshold: float = NEAR_ZERO) -> dict[str, float]:
    """The share of each tensor's numbers whose size is below ``threshold``, by name."""
    return {name: (weight.abs() < threshold).double().mean().item() for name, weight in weights.items()}
