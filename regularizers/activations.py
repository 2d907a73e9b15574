"""Regularizers that act on activations while the model trains.

Expectations are kept: what survives is divided by the rate at which it survives. Random bits come from
torch's default generators, which ``randomness.seed_activations`` seeds for each global micro-batch.

On a CPU the masks of compiled code are those of eager mode, bit for bit. On other devices the compiler draws numbers of
its own: eager and compiled masks have the same distribution there, and each form repeats its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Regularizers

_SIGNED = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


def mask_rate(p: float) -> tuple[int, int, float]:
    """Bits per draw, threshold and true rate q for a drop probability ``p`` in (0, 1) on a CPU.

    Drawing 8 bits an element is several times faster than a Bernoulli draw, but only multiples of 1/256
    can be had. More bits are taken until q is within 2% of p, and 1 - q within 2% of 1 - p; q, not p, is
    what the survivors are scaled by, so the expectation is exact.
    """
    for bits in (8, 16, 32):
        threshold = round(p * 2**bits)
        q = threshold / 2**bits
        if abs(q - p) <= min(p, 1 - p) / 50 and 0 < q < 1:
            break
    return bits, threshold, q


def keep_bits(shape: torch.Size, p: float, like: torch.dtype, device: torch.device) -> tuple[Tensor, float]:
    """Integers as wide as an element of ``like``: 0 with the rate q returned beside them (see ``mask_rate``), else −1.

    Comparing bytes and multiplying by booleans are slow on a CPU, integer arithmetic is not: t − 1 − draw is negative
    exactly where draw ≥ t, and an arithmetic shift makes that 0 (drop) or −1 (keep: all bits are ones).
    """
    bits, threshold, q = mask_rate(p)
    count, per_draw = shape.numel(), 64 // bits
    # random_() without bounds would leave the top bit of each int64 at 0 and bias every eighth byte.
    draws = torch.empty(-(-count // per_draw), dtype=torch.int64, device=device).random_(-(2**63), None)
    values = draws.view(_SIGNED[bits])[:count].view(shape)
    size = max(2 * bits, 8 * like.itemsize)  # wide enough for the difference and for the result
    difference = values.to(_SIGNED[size]).neg_().add_(threshold - 2 ** (bits - 1) - 1)
    return difference.bitwise_right_shift_(size - 1).to(_SIGNED[8 * like.itemsize]), q


# The draws of compiled code on a CPU, as operations that the compiler does not look into. ``after`` is an element of
# the tensor that the mask is for, see ``_first``. The compiler merges operations with the same arguments, whatever
# their tags say, and may reorder those that do not need each other: without it all layers would share one mask.


@torch.library.custom_op("wellposed::kept", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _kept(shape: list[int], p: float, after: Tensor) -> Tensor:
    """``keep_bits`` in bytes: the compiler's own draws and shifts are slow."""
    return keep_bits(torch.Size(shape), p, torch.int8, after.device)[0]


@_kept.register_fake
def _(shape: list[int], p: float, after: Tensor) -> Tensor:
    return torch.empty(shape, dtype=torch.int8, device=after.device)


@torch.library.custom_op("wellposed::uniform", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _uniform(shape: list[int], after: Tensor) -> Tensor:
    """``torch.rand``."""
    return torch.rand(shape, device=after.device)


@_uniform.register_fake
def _(shape: list[int], after: Tensor) -> Tensor:
    return torch.empty(shape, device=after.device)


def _first(x: Tensor) -> Tensor:
    """The first element of ``x``: whoever asks for it waits for all draws that ``x`` was made with."""
    return x.detach()[(0,) * x.ndim]


class _Drop(torch.autograd.Function):
    """Scale, then AND with the kept bits; the same on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        context.save_for_backward(kept)
        context.scale = scale
        out = x * scale
        out.view(kept.dtype).bitwise_and_(kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = context.saved_tensors
        gradient = gradient * context.scale
        gradient.view(kept.dtype).bitwise_and_(kept)
        return gradient, None, None


class Dropout(nn.Module):
    """x·m/(1−p): elements vanish with probability ``p`` in training, the rest is scaled up (Srivastava 2014).

    Typical values 0.1 to 0.2; it helps when the data are seen many times and hurts in a single epoch.
    At p = 0, and in evaluation mode, the input itself is returned.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    @property
    def rate(self) -> float:
        """The rate that acts now: p in training, 0 in evaluation."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        if torch.compiler.is_compiling():  # a product joins the operations beside it, an AND of integers would not
            masked: Tensor = x * _kept(list(x.shape), self.p, _first(x)).to(x.dtype)
            return masked * (-1 / (1 - mask_rate(self.p)[2]))
        kept, q = keep_bits(x.shape, self.p, x.dtype, x.device)
        dropped: Tensor = _Drop.apply(x, kept, 1 / (1 - q))  # type: ignore[no-untyped-call]
        return dropped

    def extra_repr(self) -> str:
        return f"p={self.p}"


class StochasticDepth(nn.Module):
    """x·m/(1−p) with one m for each sequence: its whole residual branch vanishes or counts more (Huang 2016, timm).

    The branch is multiplied, not skipped, so that compiled code and parallel processes stay alike.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x_BTD
        shape = [len(x_BTD), 1, 1]
        if x_BTD.device.type == "cpu" and torch.compiler.is_compiling():
            drawn_B11 = _uniform(shape, _first(x_BTD))
        else:
            drawn_B11 = torch.rand(shape, device=x_BTD.device)
        kept_B11: Tensor = drawn_B11 >= self.p
        return x_BTD * (kept_B11 / (1 - self.p)).to(x_BTD.dtype)

    def extra_repr(self) -> str:
        return f"p={self.p}"


STOCHASTIC = (Dropout, StochasticDepth)  # the modules that draw random numbers in training mode


def dropout_acts(config: Regularizers, step: int, total_steps: int) -> bool:
    """Whether dropouts and stochastic depth act in the step with index ``step``: from dropout_from to dropout_until."""
    return round(config.dropout_from * total_steps) <= step < round(config.dropout_until * total_steps)


def depth_rate(p: float, layer: int, n_layers: int) -> float:
    """Stochastic depth's rate in one block: p·l/(L−1), from 0 in the first to p in the last; 0 in a single block."""
    return p * layer / (n_layers - 1) if n_layers > 1 else 0.0
