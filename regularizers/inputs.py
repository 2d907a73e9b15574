"""Regularizers that change what the model reads, drawn anew for each global micro-batch.

The draws are made here. Sequences are turned around first, then ids are replaced; the model applies the rest in this
order: lookup, mask, direction and offset, noise, token dropout, mixup, and then positions and embedding dropout. Each
knob has a generator of its own, so that switching one on changes no draw of another. Shape suffixes: B sequences of the
micro-batch, or of the whole step where that is said, T time, D width, K offsets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Regularizers
from hardware import moved
from randomness import numpy_generator, torch_generator


@dataclass(frozen=True)
class Readings:
    """How each sequence is read: from right to left where reversed_B (bool), and for targets offset_B tokens ahead.

    They are drawn for all sequences of a step at once, so that every process knows how many targets the step has.
    """

    reversed_B: Tensor
    offset_B: Tensor

    @property
    def ordinary_B(self) -> Tensor:
        """The sequences that are read as if every knob were off."""
        return ~self.reversed_B & (self.offset_B == 1)

    def of(self, first: int, count: int, device: torch.device) -> Readings:
        """The readings of ``count`` sequences of the step from number ``first`` on."""
        rows = slice(first, first + count)
        return Readings(moved(self.reversed_B[rows], device), moved(self.offset_B[rows], device))

    def alike(self, other_B: Tensor) -> Tensor:
        """Whether each sequence is read like the one with the number that other_B has for it."""
        return (self.reversed_B == self.reversed_B[other_B]) & (self.offset_B == self.offset_B[other_B])

    def targets_B(self, time: int, isolated: bool) -> Tensor:
        """The number of targets that each sequence has; ``isolated``: documents are."""
        # Nobody knows which document the token after the window belongs to: it is the first input of a reversed
        # sequence only where documents don't matter.
        return time + 1 - self.offset_B - (self.reversed_B & isolated).long()

    def apply(
        self, tokens_BT: Tensor, targets_BT: Tensor, positions_BT: Tensor | None, documents_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Tokens, targets, positions and documents of a batch as they are read; a target below 0 is none."""
        reversed_B1 = self.reversed_B[:, None]
        turned_BT, turned_targets_BT = targets_BT.flip(1), tokens_BT.flip(1)
        if positions_BT is not None and documents_BT is not None:
            turned_BT, turned_targets_BT = turned_targets_BT, F.pad(turned_targets_BT[:, 1:], (0, 1), value=-1)
            documents_BT = torch.where(reversed_B1, documents_BT.flip(1), documents_BT)
            positions_BT = torch.where(reversed_B1, positions_in(documents_BT), positions_BT)
        tokens_BT = torch.where(reversed_B1, turned_BT, tokens_BT)
        targets_BT = torch.where(reversed_B1, turned_targets_BT, targets_BT)
        ahead_BT = torch.arange(targets_BT.shape[1], device=targets_BT.device) + self.offset_B[:, None] - 1
        inside_BT = ahead_BT < targets_BT.shape[1]
        targets_BT = torch.where(inside_BT, targets_BT.gather(1, ahead_BT * inside_BT), -1)
        return tokens_BT, targets_BT, positions_BT, documents_BT


def positions_in(documents_BT: Tensor) -> Tensor:
    """The position of each token in its document, as far as the window shows it, from 0."""
    index_BT = torch.arange(documents_BT.shape[1], device=documents_BT.device).expand_as(documents_BT)
    begins_BT = documents_BT != documents_BT.roll(1, 1)
    return index_BT - (index_BT * begins_BT).cummax(1).values


def draw_readings(config: Regularizers, batch: int, seed: int, step: int) -> Readings | None:
    """How the ``batch`` sequences of one step are read, on the CPU; None when every sequence is ordinary.

    The offsets i = 1 … target_offset have probabilities in proportion to exp(−i).
    """
    if not config.reversed_fraction and config.target_offset == 1:
        return None
    generator = torch_generator(seed, "reversed sequences", step)
    reversed_B = torch.rand(batch, generator=generator) < config.reversed_fraction
    below_K = torch.exp(-torch.arange(config.target_offset, dtype=torch.float64)).cumsum(0)
    drawn_B = below_K[-1] * torch.rand(
        batch, dtype=torch.float64, generator=torch_generator(seed, "target offset", step)
    )
    return Readings(reversed_B, 1 + (drawn_B[:, None] >= below_K[:-1]).sum(1))


@dataclass(frozen=True)
class InputChanges:
    """What happens to the embeddings of one micro-batch; None where a knob is off.

    The model's vector ``mask`` is in place of the embeddings where masked_BT (bool). Its vector ``direction`` is added
    where readings are reversed, and its vector ``offset``[i − 2] where they have the offset i > 1; noise_BTD is added;
    keep_BT multiplies (0, or 1/(1−p)); row b becomes share_B[b] of itself and the rest of row partner_B[b].
    """

    readings: Readings | None = None
    noise_BTD: Tensor | None = None
    keep_BT: Tensor | None = None
    partner_B: Tensor | None = None
    share_B: Tensor | None = None
    masked_BT: Tensor | None = None

    def mixed_targets(self, targets_BT: Tensor) -> tuple[Tensor, Tensor] | None:
        """The partners' targets and the share of the own ones, both (B·T,), for the objective; None without mixup."""
        if self.partner_B is None or self.share_B is None:
            return None
        return targets_BT[self.partner_B].flatten(), self.share_B.repeat_interleave(targets_BT.shape[1])

    def apply(self, x_BTD: Tensor, vectors: nn.ParameterDict) -> Tensor:
        """The changed embeddings; ``vectors`` are those of the model that its regularizers train."""
        if self.masked_BT is not None:
            x_BTD = torch.where(self.masked_BT[..., None], vectors["mask"], x_BTD)
        if self.readings is not None:
            # Products and no choice: each vector has a gradient, if only 0, in every micro-batch.
            if "direction" in vectors:
                x_BTD = x_BTD + self.readings.reversed_B[:, None, None] * vectors["direction"]
            for number, vector_D in enumerate(vectors.get("offset", ()), start=2):
                x_BTD = x_BTD + (self.readings.offset_B == number)[:, None, None] * vector_D
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
    return torch.where(moved(chosen_BT, tokens_BT.device), moved(random_BT, tokens_BT.device), tokens_BT)


def draw_changes(
    shape: tuple[int, int, int],
    config: Regularizers,
    seed: int,
    step: int,
    micro_batch: int,
    device: torch.device,
    readings: Readings | None = None,
) -> InputChanges | None:
    """The changes of one micro-batch of ``shape`` (B, T, D), read like this; None when every knob is off.

    Token dropout: e·m/(1−p), whole positions (Iyyer 2015). Noise: U(−1, 1)·α/√(T·D) (Jain 2023). Mixup: a
    permutation of the micro-batch and λ ~ Beta(α, α) for each sequence (Zhang 2018, Guo 2020); a sequence whose partner
    is read otherwise stays as it is.
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
        keep_BT = moved(kept_BT / (1 - config.token_dropout), device)
    if config.mixup_alpha:
        generator = torch_generator(seed, "mixup partner", step, micro_batch)
        partner_B = moved(torch.randperm(batch, generator=generator), device)
        if readings is not None:
            partner_B = torch.where(readings.alike(partner_B), partner_B, torch.arange(batch, device=device))
        alpha = config.mixup_alpha
        shares = numpy_generator(seed, "mixup share", step, micro_batch).beta(alpha, alpha, size=batch)
        share_B = moved(torch.from_numpy(shares).float(), device)
    if readings is None and noise_BTD is None and keep_BT is None and partner_B is None:
        return None
    return InputChanges(readings, noise_BTD, keep_BT, partner_B, share_B)


def mask_inputs(
    changes: InputChanges | None,
    shape: tuple[int, int],
    config: Regularizers,
    seed: int,
    step: int,
    micro_batch: int,
    device: torch.device,
) -> InputChanges | None:
    """The changes of the second pass over a micro-batch of ``shape`` (B, T): those of the first, and masked inputs.

    Each sequence draws its rate from U(0, masked_input_rate), and each of its positions whether it is masked (arXiv
    2606.06888). None when masked_input_weight is 0.
    """
    if not config.masked_input_weight:
        return None
    generator = torch_generator(seed, "masked inputs", step, micro_batch)
    rate_B1 = config.masked_input_rate * torch.rand(shape[0], 1, generator=generator)
    masked_BT = torch.rand(shape, generator=generator) < rate_B1
    return replace(changes or InputChanges(), masked_BT=moved(masked_BT, device))
