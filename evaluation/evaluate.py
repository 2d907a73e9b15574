"""Metrics of a model on a whole split: each target counts once and alike, whatever the training objective was.

Sums are kept in float64, on the device until the end, and reduced over the processes once, before anything is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Batch, EvaluationBatches
from data.shards import Portion, Split
from hardware import Hardware
from model.gpt import GPT
from training.processes import total

BINS = 15  # of the expected calibration error: equal widths of top-1 confidence
CHUNK_ELEMENTS = 2**24  # of the logits held at once


@dataclass(frozen=True)
class Calibration:
    """Top-1 confidence in 15 equal bins: how many tokens, their mean confidence, their accuracy."""

    tokens: list[float]
    confidence: list[float]
    accuracy: list[float]

    @property
    def error(self) -> float:
        """Expected calibration error (Naeini 2015): Σ share of the bin · |accuracy − confidence|."""
        everything = sum(self.tokens)
        gaps = zip(self.tokens, self.accuracy, self.confidence, strict=True)
        return sum(tokens * abs(accuracy - confidence) for tokens, accuracy, confidence in gaps) / everything


class Sums:
    """What the metrics of a split are made of, added up chunk by chunk of R tokens."""

    def __init__(self, device: torch.device) -> None:
        home = "cpu" if device.type == "mps" else device  # where there is float64
        self.totals = torch.zeros(6, dtype=torch.float64, device=home)  # tokens, loss, correct, brier, entropy, log_z
        self.bins = torch.zeros(3, BINS, dtype=torch.float64, device=home)  # tokens, confidence, correct

    def add_logits(self, logits_RV: Tensor, target_R: Tensor) -> None:
        """Add the tokens that a model predicts with these logits, which are overwritten."""
        log_z_R = logits_RV.logsumexp(-1)
        log_p_RV = logits_RV.sub_(log_z_R[:, None])
        loss_R = -log_p_RV.gather(-1, target_R[:, None]).squeeze(-1)
        p_RV = log_p_RV.exp()
        self.add(p_RV, target_R, loss_R, -log_p_RV.mul_(p_RV).sum(-1), log_z_R)

    def add(self, p_RV: Tensor, target_R: Tensor, loss_R: Tensor, entropy_R: Tensor, log_z_R: Tensor) -> None:
        """Add tokens that are predicted with these probabilities; all tensors are on one device."""
        confidence_R, predicted_R = p_RV.max(-1)
        correct_R = (predicted_R == target_R).float()
        # Brier score over all classes: Σ p² − 2 p_y + 1
        brier_R = p_RV.square().sum(-1) - 2 * (-loss_R).exp() + 1
        ones_R = torch.ones_like(correct_R)
        columns_6R = (
            torch.stack((ones_R, loss_R, correct_R, brier_R, entropy_R, log_z_R)).to(self.totals.device).double()
        )
        self.totals += columns_6R.sum(1)
        bin_R = (confidence_R * BINS).ceil().long().clamp(1, BINS) - 1
        binned_3R = torch.stack((ones_R, confidence_R, correct_R)).to(self.bins.device).double()
        self.bins.index_add_(1, bin_R.to(self.bins.device), binned_3R)

    def metrics(self, hardware: Hardware, bytes_per_token: float) -> tuple[dict[str, float], Calibration]:
        """What ``evaluate`` returns, of the tokens that all processes added."""
        # The widest type in which the device can add.
        widest = torch.float32 if hardware.device.type == "mps" else torch.float64
        shared = (total(part.to(hardware.device, widest), hardware) for part in (self.totals, self.bins))
        totals, bins = (part.double().cpu() for part in shared)
        _, loss, accuracy, brier, entropy, log_z = (totals / totals[0]).tolist()
        means = (bins / bins[0].clamp(min=1)).tolist()
        calibration = Calibration(bins[0].tolist(), means[1], means[2])
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "accuracy": accuracy,
            "ece": calibration.error,
            "brier": brier,
            "entropy": entropy,
            "log_z": log_z,
        }
        return metrics, calibration


@dataclass(frozen=True)
class Part:
    """What of a source is evaluated: its batches, and the UTF-8 bytes of text per target. A lone corpus has no name."""

    name: str | None
    batches: EvaluationBatches
    bytes_per_token: float


def parts_of(
    portions: Sequence[Portion], batches: Callable[[Split, int | None], EvaluationBatches], max_tokens: int | None
) -> list[Part]:
    """Of each portion all, or of all together ``max_tokens`` tokens, the first of each, in proportion to its size.

    ``batches`` makes those of a split and of how many of its tokens.
    """
    there, parts = sum(portion.split.n_tokens for portion in portions), []
    for portion in portions:
        limit = max_tokens and max(2, max_tokens * portion.split.n_tokens // there)
        bytes_per_token = portion.corpus.bytes_per_token(portion.split, limit)
        parts.append(Part(portion.name, batches(portion.split, limit), bytes_per_token))
    return parts


def evaluate_parts(
    model: GPT,
    parts: Sequence[Part],
    hardware: Hardware,
    title: str = "evaluating",
    forward: Callable[..., Tensor] | None = None,
) -> tuple[dict[str, float], Calibration]:
    """What ``evaluate`` returns of all parts together, where each target counts alike, and as NAME/loss of each part.

    So it does not depend on the weights of a mixture.
    """
    sums = [sums_of(model, part.batches, hardware, title, forward) for part in parts]
    whole, bytes_per_token = sums[0], parts[0].bytes_per_token
    if len(parts) > 1:
        whole = Sums(hardware.device)
        whole.totals = torch.stack([one.totals for one in sums]).sum(0)
        whole.bins = torch.stack([one.bins for one in sums]).sum(0)
        targets = [part.batches.n_targets for part in parts]
        bytes_per_token = fmean([part.bytes_per_token for part in parts], targets)
    metrics, calibration = whole.metrics(hardware, bytes_per_token)
    for part, one in zip(parts, sums, strict=True):
        if part.name is not None:
            scores, _ = one.metrics(hardware, part.bytes_per_token)
            metrics |= {f"{part.name}/{name}": value for name, value in scores.items()}
    return metrics, calibration


def evaluate(
    model: GPT,
    batches: EvaluationBatches,
    hardware: Hardware,
    bytes_per_token: float,
    title: str = "evaluating",
    forward: Callable[..., Tensor] | None = None,
) -> tuple[dict[str, float], Calibration]:
    """Metrics of the whole of ``batches``, shared over the processes, and the calibration behind ``ece``.

    Returns ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``accuracy``, ``ece``, ``brier``,
    ``entropy``, ``log_z`` (mean log-partition). The model is put back into the mode it was in. On a terminal the main
    process shows a progress bar called ``title``. ``forward`` is the model, compiled; None: as it is.

    Each process makes as many forward passes as any other, for with sharded weights all take part in each: one that has
    a batch less reads the last one again and counts nothing of it.
    """
    return sums_of(model, batches, hardware, title, forward).metrics(hardware, bytes_per_token)


@torch.no_grad()
def sums_of(
    model: GPT, batches: EvaluationBatches, hardware: Hardware, title: str, forward: Callable[..., Tensor] | None
) -> Sums:
    """What this process's share of the batches adds up to, as ``evaluate`` tells."""
    training, sums = model.training, Sums(hardware.device)
    model.eval()
    rounds = range(0, len(batches), hardware.world)
    for start in tqdm(rounds, title, unit="batch", leave=False, disable=None if hardware.main else True):
        index = start + hardware.rank
        batch = batches.batch(min(index, len(batches) - 1)).to(hardware.device)
        # What is compiled is so for one shape: shorter batches are filled up.
        full = batch.padded(batches.batch_size, batches.context_length) if hardware.compile else batch
        hidden_BTD = hidden_states(model if forward is None else forward, full, hardware)
        weight_VD = model.output_weight.to(hardware.dtype)  # after the pass, in which sharded weights are gathered
        if index < len(batches):
            rows, time = batch.targets_BT.shape
            hidden_ND = hidden_BTD[:rows, :time].flatten(0, 1)
            for hidden_RD, target_R in in_chunks(hidden_ND, batch.targets_BT.flatten(), len(weight_VD)):
                sums.add_logits((hidden_RD @ weight_VD.T).float(), target_R)
    model.train(training)
    return sums


def hidden_states(forward: Callable[..., Tensor], batch: Batch, hardware: Hardware) -> Tensor:
    """What the output matrix is multiplied with, (B, T, D), in the type of the products; ``forward`` is a model."""
    with hardware.autocast():
        hidden_BTD = forward(batch.tokens_BT, batch.positions_BT, batch.documents_BT)
    return hidden_BTD.to(hardware.dtype)


def in_chunks(hidden_ND: Tensor, targets_N: Tensor, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of hidden states (..., N, D) and targets (N,) that are small enough for their logits to be held."""
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    return zip(torch.split(hidden_ND, rows, dim=-2), torch.split(targets_N, rows), strict=True)
