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

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import Regularizers

# Elements of the logits of one chunk: 64 MB in fp32 on a CPU; GPUs want larger products to be busy.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# GPUs multiply matrices fast whose rows are aligned: there the products, and nothing else, see V rounded up to this.
VOCABULARY_MULTIPLE = {"cuda": 64}
# A logit to which every other is infinitely far, and with which one can calculate.
ABSENT = -1e30
TERMS = ("objective", "loss", "z_loss", "entropy", "distillation_loss")
PLAIN = Regularizers()  # nothing beside the cross-entropy


class Taught(NamedTuple):
    """What one teacher makes of the same N tokens: final hidden states, its output matrix, its share of the mean."""

    hidden_ND: Tensor
    weight_VD: Tensor
    share_N: Tensor

    def filled(self, rows: int, padding: int, exact: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """With so many more tokens, whose share is 0, and so many more entries of the vocabulary; the shares (N, 1)."""
        weight_PD = padded(self.weight_VD.to(self.hidden_ND.dtype), rows=padding)
        return padded(self.hidden_ND, rows=rows), weight_PD, padded(self.share_N[:, None].to(exact), rows=rows)


def objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    config: Regularizers,
    n_targets: float,
    mixed: tuple[Tensor, Tensor] | None = None,
    ordinary_N: Tensor | None = None,
    taught: Sequence[Taught] = (),
    compiled: bool = False,
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
        compiled: whether what happens between the matrix products is compiled (see hardware.resolve_compile).

    Returns:
        ``objective`` is what to differentiate (nats per token). Detached: ``loss`` (plain cross-entropy) and, if
        they are on, ``z_loss`` (the penalty, weighted), ``entropy`` (nats, unweighted) and ``distillation_loss`` (the
        divergence from the teachers' mean, at the temperature, in nats, unweighted). fp32 scalars, or the dtype of
        hidden_ND if that is float64.
    """
    value, loss, z_loss, entropy, distillation = _ChunkedObjective.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, targets_N, config, n_targets, mixed, ordinary_N, taught, compiled
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
    compiled: bool = False,
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
    terms = objective(
        ahead_BTD.flatten(0, 1), weight_VD, following(targets_BT), PLAIN, n_targets, mixed, compiled=compiled
    )
    return {"objective": config.multi_token_weight * terms["objective"], "multi_token_loss": terms["loss"]}


def padded(matrix: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The matrix with so many rows of zeros below it and columns beside it."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


class _Tokens(NamedTuple):
    """What N tokens are to predict and their weights, in the objective and in ``loss``; with mixup two targets."""

    first_N1: Tensor
    weight_N1: Tensor
    ordinary_N1: Tensor
    second_N1: Tensor | None = None
    share_N1: Tensor | None = None

    @classmethod
    def of(
        cls,
        targets_N: Tensor,
        weight_N: Tensor,
        ordinary_N: Tensor | None,
        mixed: tuple[Tensor, Tensor] | None,
        more: int,
    ) -> _Tokens:
        """These, and so many more whose weight is 0."""
        columns = [targets_N.clamp(min=0), weight_N, weight_N if ordinary_N is None else ordinary_N.to(weight_N.dtype)]
        if mixed is not None:
            columns += [mixed[0].clamp(min=0), mixed[1].to(weight_N.dtype)]
        return cls(*(padded(column_N[:, None], rows=more) for column_N in columns))

    def chunk(self, part: slice) -> _Tokens:
        """Some of them."""
        return _Tokens(*(None if column_N1 is None else column_N1[part] for column_N1 in self))  # type: ignore[arg-type]

    def pick(self, z_NP: Tensor) -> Tensor:
        """The logit of each token's target, or the mixture of its targets' logits (N, 1)."""
        z_N1 = z_NP.gather(1, self.first_N1).to(self.weight_N1.dtype)
        if self.second_N1 is not None and self.share_N1 is not None:
            z_N1 = torch.lerp(z_NP.gather(1, self.second_N1).to(z_N1.dtype), z_N1, self.share_N1)
        return z_N1

    def subtract(self, value_N1: Tensor, grad_NP: Tensor) -> None:
        """Subtract a value from the gradient of what ``pick`` picked."""
        if self.second_N1 is not None and self.share_N1 is not None:
            _subtract_at(self.second_N1, value_N1 * (1 - self.share_N1), grad_NP)
            value_N1 = value_N1 * self.share_N1
        _subtract_at(self.first_N1, value_N1, grad_NP)


def _subtract_at(token_R1: Tensor, value_R1: Tensor, grad_RP: Tensor) -> None:
    """Subtract a value from one entry of each row."""
    if torch.compiler.is_compiling():  # a comparison is part of the loop that forms the gradient, scattering is not
        columns_P = torch.arange(grad_RP.shape[1], device=grad_RP.device)
        grad_RP.sub_(torch.where(columns_P == token_R1, value_R1, 0))
    else:
        grad_RP.scatter_add_(1, token_R1, -value_R1)


def _exact(z_RP: Tensor, vocabulary: int) -> Tensor:
    """The logits in the dtype of the calculation, those of the padding without any probability."""
    z_RP = z_RP if z_RP.dtype == torch.float64 else z_RP.float()
    padding = z_RP.shape[1] - vocabulary
    return F.pad(z_RP[:, :vocabulary], (0, padding), value=ABSENT) if padding else z_RP


def _sums(z_RP: Tensor, vocabulary: int, smoothing: bool, entropy: bool) -> dict[str, Tensor]:
    """What is to be known of each row of logits before its gradient can be formed, each (R, 1).

    The highest logit m, the sum of e^(z-m), with entropy the sum of (z-m)·e^(z-m), with smoothing that of z.
    """
    x_RP = _exact(z_RP, vocabulary)
    highest_R1 = x_RP.amax(1, keepdim=True)
    x_RP = x_RP - highest_R1
    e_RP = x_RP.exp() if entropy else x_RP.exp_()
    found = {"highest": highest_R1, "partition": e_RP.sum(1, keepdim=True)}
    if entropy:
        found["moment"] = x_RP.mul_(e_RP).sum(1, keepdim=True)
    if smoothing:  # the padding is 0
        found["logits"] = z_RP.sum(1, keepdim=True, dtype=x_RP.dtype)
    return found


def _replace_by_gradient(
    z_RP: Tensor,
    vocabulary: int,
    tokens: _Tokens,
    factors: dict[str, Tensor],
    difference_RP: Tensor | None = None,
) -> None:
    """Logits become (probability + entropy·log p)·p - others - on_target·target + difference·(softmax(z/T) - q).

    Args:
        z_RP: the logits, whose memory is used.
        vocabulary: the columns that are no padding; the gradient of the padding is finite and means nothing.
        tokens: whose targets are meant.
        factors: those of the names above that there are, and the log-partition, each (R, 1).
        difference_RP: what ``_diverge`` found.
    """
    x_RP = _exact(z_RP, vocabulary).sub_(factors["log_z"])
    if "entropy" in factors:
        p_RP = x_RP.exp()
        x_RP.mul_(factors["entropy"]).add_(factors["probability"]).mul_(p_RP)
    else:
        x_RP.exp_().mul_(factors["probability"])
    if "others" in factors:
        x_RP.sub_(factors["others"])
    tokens.subtract(factors["on_target"], x_RP)
    if difference_RP is not None:
        x_RP.add_(difference_RP.mul(factors["difference"]))
    z_RP.copy_(x_RP)


def _diverge(z_RP: Tensor, vocabulary: int, mean_RP: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence (R, 1) of softmax(z/T) from the teachers' mean q, and softmax(z/T) - q (R, P)."""
    log_p_RP = (_exact(z_RP, vocabulary) / temperature).log_softmax(1)
    # A probability that is rounded to 0 counts nothing, and its logarithm must not be infinite.
    log_mean_RP = mean_RP.clamp(min=torch.finfo(mean_RP.dtype).tiny).log_()
    loss_R1 = log_mean_RP.sub_(log_p_RP).mul_(mean_RP).sum(1, keepdim=True)
    return loss_R1, log_p_RP.exp_().sub_(mean_RP)


def _add_prediction(mean_RP: Tensor, z_RP: Tensor, vocabulary: int, share_R1: Tensor, temperature: Tensor) -> None:
    """Add a teacher's share to the mean of the probabilities softmax(z/T)."""
    mean_RP.add_((_exact(z_RP, vocabulary) / temperature).softmax(1).mul_(share_R1))


def _weigh(
    sums: dict[str, Tensor],
    z_target_R1: Tensor,
    divergence_R1: Tensor | None,
    weight_R1: Tensor,
    config: Regularizers,
    vocabulary: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The objective's terms of R tokens, each (R, 1), and the factors of its gradient (see _replace_by_gradient)."""
    log_partition_R1 = sums["partition"].log()
    log_z_R1 = sums["highest"] + log_partition_R1
    loss_R1 = log_z_R1 - z_target_R1
    terms = {"objective": loss_R1, "loss": loss_R1}
    factors = {"log_z": log_z_R1, "on_target": weight_R1}
    kept = 1.0  # share of the cross-entropy, smoothed or not
    if divergence_R1 is not None:
        kept -= config.distillation_weight
        terms["distillation_loss"] = divergence_R1
        factors["difference"] = config.distillation_weight * config.distillation_temperature * weight_R1
    if config.label_smoothing:
        spread = config.label_smoothing / (vocabulary - 1)
        on_target_R1 = (1 - config.label_smoothing) * z_target_R1
        terms["objective"] = log_z_R1 - on_target_R1 - spread * (sums["logits"] - z_target_R1)
        factors["others"] = kept * spread * weight_R1
        factors["on_target"] = (1 - config.label_smoothing - spread) * weight_R1
    factors["probability"] = kept * weight_R1
    factors["on_target"] = kept * factors["on_target"]
    if divergence_R1 is not None:
        scale = config.distillation_weight * config.distillation_temperature**2
        terms["objective"] = kept * terms["objective"] + scale * divergence_R1
    if config.z_loss:
        terms["z_loss"] = config.z_loss * log_z_R1.square()
        terms["objective"] = terms["objective"] + terms["z_loss"]
        factors["probability"] = weight_R1 * (kept + 2 * config.z_loss * log_z_R1)
    if config.entropy_penalty:
        terms["entropy"] = log_partition_R1 - sums["moment"] / sums["partition"]
        penalty_R1 = config.entropy_penalty * terms["entropy"]
        terms["objective"] = terms["objective"] - penalty_R1
        factors["entropy"] = config.entropy_penalty * weight_R1
        factors["probability"] = factors["probability"] + weight_R1 * penalty_R1
    return terms, factors


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled once for all chunks of a run, and for the runs of a study that differ only in values."""
    return torch.compile(function, dynamic=False)


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
        compiled: bool,
    ) -> tuple[Tensor, ...]:
        kind, vocabulary, dtype = hidden_ND.device.type, len(weight_VD), hidden_ND.dtype
        padding = -vocabulary % VOCABULARY_MULTIPLE.get(kind, 1)
        weight_PD = padded(weight_VD.to(dtype), rows=padding)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        # Equal chunks, so that one compiled form fits all: the last is filled up with rows of weight 0.
        chunks = -(-len(hidden_ND) // max(64, CHUNK_ELEMENTS.get(kind, 2**24) // vocabulary))
        rows = -(-len(hidden_ND) // chunks)
        missing = chunks * rows - len(hidden_ND)
        filled_ND = padded(hidden_ND, rows=missing)
        all_tokens = _Tokens.of(targets_N, (targets_N >= 0).to(exact) / n_targets, ordinary_N, mixed, missing)
        teachers = [one.filled(missing, padding, exact) for one in taught]
        temperature = filled_ND.new_full((), config.distillation_temperature, dtype=exact)
        needs_hidden, needs_weight = context.needs_input_grad[:2]
        hidden_grad = torch.empty_like(filled_ND) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        sums = {name: torch.zeros((), dtype=exact, device=hidden_ND.device) for name in TERMS}
        steps = (_add_prediction, _diverge, _sums, _replace_by_gradient)
        add_prediction, diverge, sums_of, replace_by_gradient = map(_compiled, steps) if compiled else steps
        z_RP = filled_ND.new_empty(rows, len(weight_PD))
        with torch.autocast(kind, enabled=False):
            for start in range(0, chunks * rows, rows):
                part, divergence_R1, difference_RP = slice(start, start + rows), None, None
                if teachers:
                    mean_RP = torch.zeros_like(z_RP, dtype=exact)
                    for theirs_ND, theirs_PD, share_N1 in teachers:
                        torch.mm(theirs_ND[part], theirs_PD.T, out=z_RP)
                        add_prediction(mean_RP, z_RP, vocabulary, share_N1[part], temperature)
                torch.mm(filled_ND[part], weight_PD.T, out=z_RP)
                # Compiled code reads and writes what the products do; else it is converted once.
                x_RP = z_RP if compiled else z_RP.to(exact)
                if teachers:
                    divergence_R1, difference_RP = diverge(x_RP, vocabulary, mean_RP, temperature)
                    del mean_RP
                tokens = all_tokens.chunk(part)
                found = sums_of(x_RP, vocabulary, config.label_smoothing > 0, config.entropy_penalty > 0)
                terms_R1, factors = _weigh(
                    found, tokens.pick(x_RP), divergence_R1, tokens.weight_N1, config, vocabulary
                )
                for name, term_R1 in terms_R1.items():
                    sums[name] += ((tokens.ordinary_N1 if name == "loss" else tokens.weight_N1) * term_R1).sum()
                replace_by_gradient(x_RP, vocabulary, tokens, factors, difference_RP)
                z_RP.copy_(x_RP)
                if hidden_grad is not None:
                    torch.mm(z_RP, weight_PD, out=hidden_grad[part])
                if weight_grad is not None:
                    _add_product(weight_grad, z_RP, filled_ND[part])
        hidden_grad = hidden_grad[: len(hidden_ND)] if hidden_grad is not None else None
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
        return scaled[0], scaled[1], None, None, None, None, None, None, None


def _add_product(weight_grad: Tensor, grad_RP: Tensor, hidden_RD: Tensor) -> None:
    """Add a chunk's gradient of the output matrix, which has no padding, in place."""
    if weight_grad.dtype == hidden_RD.dtype and len(weight_grad) == grad_RP.shape[1]:
        weight_grad.addmm_(grad_RP.T, hidden_RD)
    else:
        weight_grad += (grad_RP.T @ hidden_RD)[: len(weight_grad)]
