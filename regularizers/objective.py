"""The training objective: cross-entropy and the regularizers that act on the output distribution.

For logits z, log-partition L = logsumexp(z), p = softmax(z), and a token's weight w (1 / the number of targets
of the whole optimizer step, 0 where there is no target), the objective is the sum over tokens of w times

    cross-entropy, smoothed   L − (1−ε)·z_y − ε/(K−1)·Σ_{k≠y} z_k        Szegedy 2016, fairseq's convention
    z-loss                    + c·L²                                      PaLM 2022
    entropy penalty           − β·H,   H = L − Σ p·z                      Pereyra 2017
    distillation              (1−α) of the first line, + α·T²·KL(q ‖ softmax(z/T))         Hinton 2015
                              q the mean over teachers of softmax(their logits / T)

and its gradient with respect to z has a closed form, which is formed chunk by chunk while the loss is
computed: the logits of all tokens never exist at once, and no matrix product is done twice.

``multi_token_terms`` adds the cross-entropy of a second prediction in the same way.

Shape suffixes: N tokens, B sequences of T, R tokens of one chunk, D width, V vocabulary, P vocabulary with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Regularizers

# Elements of the logits of one chunk: 64 MB in fp32 on a CPU; GPUs want larger products to be busy.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# GPUs multiply matrices fast whose rows are aligned: there the products, and nothing else, see V rounded up to this.
VOCABULARY_MULTIPLE = {"cuda": 64}
TERMS = ("objective", "loss", "z_loss", "entropy", "distillation_loss")
PLAIN = Regularizers()  # nothing beside the cross-entropy


class Taught(NamedTuple):
    """What one teacher makes of the same N tokens: final hidden states, its output matrix, its share of the mean."""

    hidden_ND: Tensor
    weight_VD: Tensor
    share_N: Tensor


def objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    config: Regularizers,
    n_targets: float,
    mixed: tuple[Tensor, Tensor] | None = None,
    ordinary_N: Tensor | None = None,
    taught: Sequence[Taught] = (),
) -> dict[str, Tensor]:
    """The objective and its terms, by name.

    Args:
        hidden_ND: final hidden states; their dtype is that of the matrix products.
        weight_VD: output matrix.
        targets_N: token ids; negative where there is no target.
        config: label_smoothing, z_loss, entropy_penalty and the two of distillation are read.
        n_targets: number of targets of the whole optimizer step, over all micro-batches and processes, so that
            summing what this returns over those gives the step's means.
        mixed: mixup's second targets (N,) and the share (N,) of the first ones; the cross-entropy, smoothed or not,
            is then the mixture of both, while z-loss and entropy count once.
        ordinary_N: the weight of each token in ``loss`` alone; None: as in the objective.
        taught: what to distil, in the dtype of hidden_ND, each token's shares adding up to 1; empty: nothing.

    Returns:
        ``objective`` is what to differentiate (nats per token). Detached: ``loss`` (plain cross-entropy) and, if
        they are on, ``z_loss`` (the penalty, weighted), ``entropy`` (nats, unweighted) and ``distillation_loss`` (the
        divergence from the teachers' mean, at the temperature, in nats, unweighted). fp32 scalars, or the dtype of
        hidden_ND if that is float64.
    """
    value, loss, z_loss, entropy, distillation = _ChunkedObjective.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, config, n_targets, mixed, ordinary_N, taught
    )
    terms = {"objective": value, "loss": loss}
    if config.z_loss:
        terms["z_loss"] = z_loss
    if config.entropy_penalty:
        terms["entropy"] = entropy
    if taught:
        terms["distillation_loss"] = distillation
    return terms


def multi_token_terms(
    hidden_BTD: Tensor,
    vectors: nn.ParameterDict,
    weight_VD: Tensor,
    targets_BT: Tensor,
    config: Regularizers,
    n_targets: float,
    mixed: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """What multi_token_weight adds: w times the cross-entropy of the token after the target (Gloeckle 2024).

    It is predicted from P·h, P being the matrix ``after_next`` of ``vectors``, through the output matrix. The last
    target of each sequence has none after it. The other arguments, and the names, are those of ``objective``;
    ``n_targets`` counts the tokens that are predicted here. Empty when the knob is off.
    """
    if not config.multi_token_weight:
        return {}

    def following(targets_N: Tensor) -> Tensor:
        return F.pad(targets_N.view_as(targets_BT)[:, 1:], (0, 1), value=-1).flatten()

    ahead_BTD = F.linear(hidden_BTD, vectors["after_next"].to(hidden_BTD.dtype))
    mixed = None if mixed is None else (following(mixed[0]), mixed[1])
    terms = objective(ahead_BTD.flatten(0, 1), weight_VD, following(targets_BT), PLAIN, n_targets, mixed)
    return {"objective": config.multi_token_weight * terms["objective"], "multi_token_loss": terms["loss"]}


def padded(matrix: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The matrix with so many rows of zeros below it and columns beside it."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


@dataclass(frozen=True)
class _Targets:
    """What the R tokens of a chunk are to predict, and the weight of each; with mixup two targets and their shares."""

    first_R1: Tensor
    weight_R1: Tensor
    second_R1: Tensor | None = None
    share_R1: Tensor | None = None

    def pick(self, z_RV: Tensor) -> Tensor:
        """The logit of each token's target, or the mixture of its targets' logits (R, 1)."""
        z_R1 = z_RV.gather(1, self.first_R1)
        if self.second_R1 is not None and self.share_R1 is not None:
            z_R1 = torch.lerp(z_RV.gather(1, self.second_R1), z_R1, self.share_R1)
        return z_R1

    def add(self, grad_RV: Tensor, value_R1: Tensor) -> None:
        """Add a value to the gradient of what ``pick`` picked."""
        if self.second_R1 is not None and self.share_R1 is not None:
            grad_RV.scatter_add_(1, self.second_R1, value_R1 * (1 - self.share_R1))
            value_R1 = value_R1 * self.share_R1
        grad_RV.scatter_add_(1, self.first_R1, value_R1)


class _Distillation:
    """The divergence of the predictions of R tokens from the mean of the teachers', all at one temperature.

    The logits ``z_RV`` are left as they are; ``part`` says which of the teachers' N tokens the R are.
    """

    def __init__(self, z_RV: Tensor, taught: Sequence[Taught], part: slice, temperature: float) -> None:
        self.temperature, mean_RV = temperature, torch.zeros_like(z_RV)
        for hidden_ND, weight_PD, share_N in taught:
            theirs_RV = (hidden_ND[part] @ weight_PD.T)[:, : z_RV.shape[1]].to(z_RV.dtype)
            mean_RV.add_(theirs_RV.div_(temperature).softmax(1).mul_(share_N[part, None]))
            del theirs_RV
        log_p_RV = z_RV.div(temperature).log_softmax(1)
        # A probability that is rounded to 0 counts nothing, and its logarithm must not be infinite.
        log_mean_RV = mean_RV.clamp(min=torch.finfo(mean_RV.dtype).tiny).log_()
        self.loss_R1 = log_mean_RV.sub_(log_p_RV).mul_(mean_RV).sum(1, keepdim=True)
        self.difference_RV = log_p_RV.exp_().sub_(mean_RV)

    def gradient(self, weight_R1: Tensor) -> Tensor:
        """d T²·KL / dz = T·(p − q), times the weights, (R, V), in the memory of the difference."""
        return self.difference_RV.mul_(self.temperature * weight_R1)


class _Chunk:
    """The objective's terms of R tokens; the memory of their logits is used up."""

    def __init__(
        self, z_RV: Tensor, targets: _Targets, config: Regularizers, distillation: _Distillation | None = None
    ) -> None:
        self.targets, self.config, self.distillation = targets, config, distillation
        self.kept = 1.0  # share of the cross-entropy, smoothed or not
        self.spread = config.label_smoothing / (z_RV.shape[1] - 1)
        z_target_R1 = targets.pick(z_RV)
        z_sum_R1 = z_RV.sum(1, keepdim=True) if self.spread else None
        highest_R1 = z_RV.amax(1, keepdim=True)
        shifted_RV = z_RV.sub_(highest_R1)
        # Without the entropy the logits are not needed again: their memory becomes the probabilities'.
        self.p_RV = shifted_RV.exp() if config.entropy_penalty else shifted_RV.exp_()
        partition_R1 = self.p_RV.sum(1, keepdim=True)
        self.log_z_R1 = highest_R1 + partition_R1.log()
        self.p_RV.div_(partition_R1)

        loss_R1 = self.log_z_R1 - z_target_R1
        self.terms_R1 = {"objective": loss_R1, "loss": loss_R1}
        if z_sum_R1 is not None:
            on_target_R1 = (1 - config.label_smoothing) * z_target_R1
            self.terms_R1["objective"] = self.log_z_R1 - on_target_R1 - self.spread * (z_sum_R1 - z_target_R1)
        if distillation is not None:
            self.kept -= config.distillation_weight
            self.terms_R1["distillation_loss"] = distillation.loss_R1
            scale = config.distillation_weight * config.distillation_temperature**2
            self.terms_R1["objective"] = self.kept * self.terms_R1["objective"] + scale * distillation.loss_R1
        if config.z_loss:
            self.terms_R1["z_loss"] = config.z_loss * self.log_z_R1.square()
            self.terms_R1["objective"] = self.terms_R1["objective"] + self.terms_R1["z_loss"]
        if config.entropy_penalty:
            self.log_p_RV = shifted_RV.sub_(partition_R1.log())
            self.terms_R1["entropy"] = -(self.p_RV * self.log_p_RV).sum(1, keepdim=True)
            penalty_R1 = config.entropy_penalty * self.terms_R1["entropy"]
            self.terms_R1["objective"] = self.terms_R1["objective"] - penalty_R1

    def gradient(self) -> Tensor:
        """d objective / dz = w·[(1 + 2cL + β(log p + H))·p − smoothed target], (R, V), in the probabilities' memory.

        With distillation the 1 and the smoothed target are multiplied by 1−α, and w·α·T·(p_T − q) is added.
        """
        config, weight_R1 = self.config, self.targets.weight_R1
        kept_R1 = weight_R1 if self.distillation is None else self.kept * weight_R1
        scale_R1 = kept_R1
        if config.z_loss:
            scale_R1 = weight_R1 * (self.kept + 2 * config.z_loss * self.log_z_R1)
        if config.entropy_penalty:
            beta_R1 = config.entropy_penalty * weight_R1
            grad_RV = self.p_RV.mul_(self.log_p_RV.add_(self.terms_R1["entropy"]).mul_(beta_R1).add_(scale_R1))
        else:
            grad_RV = self.p_RV.mul_(scale_R1)
        if self.spread:
            grad_RV.sub_(self.spread * kept_R1)
        self.targets.add(grad_RV, -(1 - config.label_smoothing - self.spread) * kept_R1)
        if self.distillation is not None:
            grad_RV.add_(self.distillation.gradient(config.distillation_weight * weight_R1))
        return grad_RV


class _ChunkedObjective(torch.autograd.Function):
    """Computes the gradients in the forward pass, one chunk of tokens at a time."""

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        config: Regularizers,
        n_targets: float,
        mixed: tuple[Tensor, Tensor] | None,
        ordinary_N: Tensor | None,
        taught: Sequence[Taught],
    ) -> tuple[Tensor, ...]:
        kind, vocabulary = hidden_ND.device.type, len(weight_VD)
        padding = -vocabulary % VOCABULARY_MULTIPLE.get(kind, 1)
        weight_PD = padded(weight_VD.to(hidden_ND.dtype), rows=padding)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = context.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        sums = {name: torch.zeros((), dtype=exact, device=hidden_ND.device) for name in TERMS}
        taught = [one._replace(weight_VD=padded(one.weight_VD.to(hidden_ND.dtype), rows=padding)) for one in taught]
        rows = max(64, CHUNK_ELEMENTS.get(kind, 2**24) // vocabulary)
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(hidden_ND), rows):
                part = slice(start, start + rows)
                z_RV = (hidden_ND[part] @ weight_PD.T)[:, :vocabulary].to(exact)
                target_R1 = targets_N[part, None]
                weight_R1 = (target_R1 >= 0).to(exact) / n_targets
                targets = _Targets(target_R1.clamp(min=0), weight_R1)
                if mixed is not None:
                    second_R1, share_R1 = mixed[0][part, None].clamp(min=0), mixed[1][part, None].to(exact)
                    targets = replace(targets, second_R1=second_R1, share_R1=share_R1)
                distillation = None
                if taught:
                    distillation = _Distillation(z_RV, taught, part, config.distillation_temperature)
                chunk = _Chunk(z_RV, targets, config, distillation)
                ordinary_R1 = weight_R1 if ordinary_N is None else ordinary_N[part, None].to(exact)
                for name, term_R1 in chunk.terms_R1.items():
                    sums[name] += ((ordinary_R1 if name == "loss" else weight_R1) * term_R1).sum()
                if hidden_grad is None and weight_grad is None:
                    continue
                grad_RP = padded(chunk.gradient().to(hidden_ND.dtype), columns=padding)
                if hidden_grad is not None:
                    torch.mm(grad_RP, weight_PD, out=hidden_grad[part])
                if weight_grad is not None:
                    _add_product(weight_grad, grad_RP, hidden_ND[part])
        weight_grad = weight_grad.to(weight_VD.dtype) if weight_grad is not None else None
        context.save_for_backward(hidden_grad, weight_grad)
        value, *others = sums.values()
        context.mark_non_differentiable(*others)
        return value, *others

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, value_grad: Tensor, *ignored: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = context.saved_tensors
        # The objective is the last thing before backward(): its own gradient is a scalar, 1 or the weight of a term.
        scaled = [grad if grad is None else grad * value_grad.to(grad.dtype) for grad in (hidden_grad, weight_grad)]
        return scaled[0], scaled[1], None, None, None, None, None, None


def _add_product(weight_grad: Tensor, grad_RP: Tensor, hidden_RD: Tensor) -> None:
    """Add a chunk's gradient of the output matrix, which has no padding, in place."""
    if weight_grad.dtype == hidden_RD.dtype and len(weight_grad) == grad_RP.shape[1]:
        weight_grad.addmm_(grad_RP.T, hidden_RD)
    else:
        weight_grad += (grad_RP.T @ hidden_RD)[: len(weight_grad)]
