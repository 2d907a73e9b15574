"""Regularizers that act on the weights: decoupled decay over the run, and L1/L2 penalties through the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from config import Regularizers, value_at

NEAR_ZERO = 1e-3  # a weight below this counts as gone; Adam's steps keep penalised weights from being exactly 0


def first_weight_decay(config: Regularizers, peak_lr: float, steps_per_epoch: float) -> float:
    """λ of the first step: weight_decay, or what gives the timescale weight_decay_epochs, or the list's first value.

    AdamW's weights are a moving average of its updates over 1/(lr·λ) steps, so λ = 1/(lr·τ·steps per epoch) for τ
    epochs (Wang & Aitchison 2024, 2405.13698). ``peak_lr`` is that of the group of parameters that decays: Muon's rate
    is many times AdamW's, and one λ for both would be two timescales.
    """
    if not isinstance(config.weight_decay_schedule, str):
        return value_at(config.weight_decay_schedule, 0.0)
    if config.weight_decay_epochs is not None:
        return 1 / (peak_lr * config.weight_decay_epochs * steps_per_epoch)
    return config.weight_decay


def weight_decay_at(config: Regularizers, step: int, total_steps: int, first: float) -> float:
    """λ of the step with index ``step`` (0 … total_steps − 1), when it began with ``first``.

    Constant, or to weight_decay_end at the last step: linear, or along half a cosine. Or the values of a list, which
    NanoGPT Slowrun (2026) uses for a sawtooth.
    """
    schedule, end = config.weight_decay_schedule, config.weight_decay_end
    part = step / max(1, total_steps - 1)
    if not isinstance(schedule, str):
        return value_at(schedule, part)
    if schedule == "linear":
        return first + (end - first) * part
    if schedule == "cosine":
        return end + (first - end) * 0.5 * (1 + math.cos(math.pi * part))
    return first


@torch.no_grad()
def update_weights(optimizer: torch.optim.Optimizer, config: Regularizers) -> None:
    """The optimizer's step and its weight decay; with cautious_weight_decay w ← w − lr·(u + λ·w·1[u·w > 0]).

    u is what the optimizer does without decay: a weight decays only where that shrinks it anyway (Chen 2025,
    2510.12402). Holds three copies of the decayed weights for a moment.
    """
    if not config.cautious_weight_decay:
        optimizer.step()
        return
    groups = [group for group in optimizer.param_groups if group["weight_decay"]]
    before = [torch._foreach_clone(group["params"]) for group in groups]
    for group in groups:
        # From 0, where its own decay is 0, the optimizer goes to −lr·u itself. The difference of two weights would be 0
        # for an update that is smaller than their rounding, and its sign lost.
        torch._foreach_zero_(group["params"])
    optimizer.step()
    for group, weights in zip(groups, before, strict=True):
        shrinks = torch._foreach_sign(group["params"])  # −1, 0, 1; then 1 where −lr·u and w have opposite signs, else 0
        torch._foreach_mul_(shrinks, torch._foreach_sign(weights))
        torch._foreach_neg_(shrinks)
        torch._foreach_clamp_min_(shrinks, 0.0)
        torch._foreach_add_(group["params"], weights)
        torch._foreach_addcmul_(group["params"], weights, shrinks, value=-group["lr"] * group["weight_decay"])


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
    return {name: int((weight.abs() < threshold).sum()) / weight.numel() for name, weight in weights.items()}
