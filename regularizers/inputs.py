"""Regularizers that change what the model reads, drawn anew for each global micro-batch.

The draws are made here; the model applies them in this order: lookup (of the replaced ids), noise, token dropout,
mixup, and then positions and embedding dropout. Each knob has a generator of its own, so that switching one on
changes no draw of another. Shape suffixes: B sequences of the micro-batch, T time, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Regularizers
from randomness import numpy_generator, torch_generator


@dataclass(frozen=True)
class InputChanges:
    """What happens to the embeddings of one micro-batch; None where a knob is off.

    noise_BTD is added; keep_BT multiplies (0, or 1/(1−p)); row b becomes share_B[b] of itself and the rest of
    row partner_B[b].
    """

    noise_BTD: Tensor | None = None
    keep_BT: Tensor | None = None
    partner_B: Tensor | None = None
    share_B: Tensor | None = None

    def mixed_targets(self, targets_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """The partners' targets and the share of the own ones, both (B·T,), for the objective; None without mixup."""
        if self.partner_B is None or self.share_B is None:
            return None
        return targets_BT[self.partner_B].flatten(), self.share_B.repeat_interleave(targets_BT.shape[1])

    def apply(self, x_BTD: Tensor) -> Tensor:
        """The changed embeddings."""
        if self.noise_BTD is not None:
            x_BTD = x_BTD + self.noise_BTD
        if self.keep_BT is not None:
            x_BTD = x_BTD * self.keep_BT[..., None]
        if self.partner_B is not None and self.share_B is not None:
            x_BTD = torch.lerp(x_BTD[self.partner_B], x_BTD, self.share_B[:, None, None])
        return x_BTD


def replace_tokens(tokens_BT: Tensor, rate: float, vocab_size: int, seed: int, step: int, micro_batch: int) -> Tensor:
    """Each id becomes one of the ``vocab_size`` real ids, uniformly, with probability ``rate`` (Wang 2018)."""
    if not rate:
        return tokens_BT
    generator = torch_generator(seed, "token replacement", step, micro_batch)
    chosen_BT = torch.rand(tokens_BT.shape, generator=generator) < rate
    random_BT = torch.randint(vocab_size, tokens_BT.shape, generator=generator)
    return torch.where(chosen_BT.to(tokens_BT.device), random_BT.to(tokens_BT.device), tokens_BT)


def draw_changes(
    shape: tuple[int, int, int], config: Regularizers, seed: int, step: int, micro_batch: int, device: torch.device
) -> InputChanges | None:
    """The changes of one micro-batch of ``shape`` (B, T, D); None when every knob is off.

    Token dropout: e·m/(1−p), whole positions (Iyyer 2015). Noise: U(−1, 1)·α/√(T·D) (Jain 2023). Mixup: a
    permutation of the micro-batch and λ ~ Beta(α, α) for each sequence (Zhang 2018, Guo 2020).
    """
    batch, time, width = shape
    noise_BTD = keep_BT = partner_B = share_B = None
    if config.embedding_noise:
        generator = torch_generator(seed, "embedding noise", step, micro_batch, device=device)
        noise_BTD = torch.empty(shape, device=device).uniform_(-1, 1, generator=generator)
        noise_BTD *= config.embedding_noise / math.sqrt(time * width)
    if config.token_dropout:
        generator = torch_generator(seed, "token dropout", step, micro_batch)
        kept_BT = torch.rand(batch, time, generator=generator) >= config.token_dropout
        keep_BT = (kept_BT / (1 - config.token_dropout)).to(device)
    if config.mixup_alpha:
        generator = torch_generator(seed, "mixup partner", step, micro_batch)
        partner_B = torch.randperm(batch, generator=generator).to(device)
        alpha = config.mixup_alpha
        shares = numpy_generator(seed, "mixup share", step, micro_batch).beta(alpha, alpha, size=batch)
        share_B = torch.from_numpy(shares).float().to(device)
    if noise_BTD is None and keep_BT is None and partner_B is None:
        return None
    return InputChanges(noise_BTD, keep_BT, partner_B, share_B)
