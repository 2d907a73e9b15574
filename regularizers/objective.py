"""The training objective: cross-entropy and the regularizers that act on the output distribution.

For logits z, log-partition L = logsumexp(z), p = softmax(z), and a token's weight w (1 / the number of targets
of the whole optimizer step, 0 where there is no target), the objective is the sum over tokens of w times

    cross-entropy, smoothed   L − (1−ε)·z_y − ε/(K−1)·Σ_{k≠y} z_k        Szegedy 2016, fairseq's convention
    z-loss                    + c·L²                                      PaLM 2022
    entropy penalty           − β·H,   H = L − Σ p·z                      Pereyra 2017

and its gradient with respect to z has a closed form, which is formed chunk by chunk while the loss is
computed: the logits of all tokens never exist at once, and no matrix product is done twice.

Shape suffixes: N tokens, R tokens of one chunk, D width, V vocabulary, P vocabulary with padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from config import Regularizers

# Numbers in the logits of one chunk: 64 MB in fp32 on a CPU; GPUs want larger products to be busy.
CHUNK_NUMBERS = {"cpu": 2**24, "cuda": 2**28}
# GPUs multiply matrices fast whose rows are aligned: there the products, and nothing else, see V rounded up to this.
VOCABULARY_MULTIPLE = {"cuda": 64}


def objective(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    config: Regularizers,
    n_targets: float,
    mixed: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The objective and its terms, by name.

    Args:
        hidden_ND: final hidden states; their dtype is that of the matrix products.
        weight_VD: output matrix.
        targets_N: token ids; negative where there is no target.
        config: label_smoothing, z_loss and entropy_penalty are read.
        n_targets: number of targets of the whole optimizer step, over all micro-batches and processes, so that
            summing what this returns over those gives the step's means.
        mixed: mixup's second targets (N,) and the share (N,) of the first ones; the cross-entropy, smoothed or not,
            is then the mixture of both, while z-loss and entropy count once.

    Returns:
        ``objective`` is what to differentiate (nats per token). Detached: ``loss`` (plain cross-entropy) and, if
        they are on, ``z_loss`` (the penalty, weighted) and ``entropy`` (nats, unweighted). fp32 scalars, or the
        dtype of hidden_ND if that is float64.
    """
    knobs = (config.label_smoothing, config.z_loss, config.entropy_penalty)
    value, loss, z_loss, entropy = _ChunkedObjective.apply(hidden_ND, weight_VD, targets_N, knobs, n_targets, mixed)
    terms = {"objective": value, "loss": loss}
    if config.z_loss:
        terms["z_loss"] = z_loss
    if config.entropy_penalty:
        terms["entropy"] = entropy
    return terms


def padded(matrix: Tensor, rows: int = 0, columns: int = 0) -> Tensor:
    """The matrix with so many rows of zeros below it and columns beside it."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


class _ChunkedObjective(torch.autograd.Function):
    """Computes the gradients in the forward pass, one chunk of tokens at a time."""

    @staticmethod
    def forward(
        context: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        knobs: tuple[float, float, float],
        n_targets: float,
        mixed: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        smoothing, c, beta = knobs
        padding = -len(weight_VD) % VOCABULARY_MULTIPLE.get(hidden_ND.device.type, 1)
        weight_PD = padded(weight_VD.to(hidden_ND.dtype), rows=padding)
        exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        vocabulary = len(weight_VD)
        spread = smoothing / (vocabulary - 1)
        needs_hidden, needs_weight = context.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden_ND) if needs_hidden else None
        weight_grad = torch.zeros_like(weight_VD, dtype=exact) if needs_weight else None
        sums = torch.zeros(4, dtype=exact, device=hidden_ND.device)
        rows = max(64, CHUNK_NUMBERS.get(hidden_ND.device.type, 2**24) // vocabulary)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for start in range(0, hidden_ND.shape[0], rows):
                hidden_RD = hidden_ND[start : start + rows]
                target_R1 = targets_N[start : start + rows, None]
                w_R1 = (target_R1 >= 0).to(exact) / n_targets
                target_R1 = target_R1.clamp(min=0)
                z_RV = (hidden_RD @ weight_PD.T)[:, :vocabulary].to(exact)
                z_target_R1 = z_RV.gather(1, target_R1)
                if mixed is not None:
                    other_R1, share_R1 = (part[start : start + rows, None] for part in mixed)
                    z_target_R1 = torch.lerp(z_RV.gather(1, other_R1), z_target_R1, share_R1.to(exact))
                z_sum_R1 = z_RV.sum(1, keepdim=True) if spread else None
                highest_R1 = z_RV.amax(1, keepdim=True)
                if beta:
                    z_RV = z_RV.sub_(highest_R1)
                    p_RV = z_RV.exp()
                else:  # the logits are not needed again: their memory becomes the probabilities'
                    p_RV = z_RV.sub_(highest_R1).exp_()
                partition_R1 = p_RV.sum(1, keepdim=True)
                log_z_R1 = highest_R1 + partition_R1.log()
                p_RV.div_(partition_R1)

                loss_R1 = log_z_R1 - z_target_R1
                objective_R1 = loss_R1
                if z_sum_R1 is not None:
                    objective_R1 = log_z_R1 - (1 - smoothing) * z_target_R1 - spread * (z_sum_R1 - z_target_R1)
                if c:
                    z_loss_R1 = c * log_z_R1.square()
                    objective_R1 = objective_R1 + z_loss_R1
                    sums[2] += (w_R1 * z_loss_R1).sum()
                if beta:
                    log_p_RV = z_RV.sub_(partition_R1.log())
                    entropy_R1 = -(p_RV * log_p_RV).sum(1, keepdim=True)
                    objective_R1 = objective_R1 - beta * entropy_R1
                    sums[3] += (w_R1 * entropy_R1).sum()
                sums[0] += (w_R1 * objective_R1).sum()
                sums[1] += (w_R1 * loss_R1).sum()
                if hidden_grad is None and weight_grad is None:
                    continue

                # d objective / dz = w·[(1 + 2cL + β(log p + H))·p − smoothed target]
                scale_R1 = w_R1 * (1 + 2 * c * log_z_R1) if c else w_R1
                if beta:
                    log_p_RV.add_(entropy_R1).mul_(beta * w_R1).add_(scale_R1)
                    grad_RV = p_RV.mul_(log_p_RV)
                else:
                    grad_RV = p_RV.mul_(scale_R1)
                if spread:
                    grad_RV.sub_(spread * w_R1)
                on_target_R1 = -(1 - smoothing - spread) * w_R1
                if mixed is not None:
                    grad_RV.scatter_add_(1, other_R1, on_target_R1 * (1 - share_R1))
                    on_target_R1 = on_target_R1 * share_R1
                grad_RV.scatter_add_(1, target_R1, on_target_R1.to(exact))
                grad_RP = padded(grad_RV.to(hidden_ND.dtype), columns=padding)
                if hidden_grad is not None:
                    torch.mm(grad_RP, weight_PD, out=hidden_grad[start : start + rows])
                if weight_grad is not None:
                    if exact == hidden_ND.dtype and not padding:
                        weight_grad.addmm_(grad_RP.T, hidden_RD)
                    else:
                        weight_grad += (grad_RP.T @ hidden_RD)[:vocabulary]
        weight_grad = weight_grad.to(weight_VD.dtype) if weight_grad is not None else None
        context.save_for_backward(hidden_grad, weight_grad)
        value, loss, z_loss, entropy = sums.unbind()
        context.mark_non_differentiable(loss, z_loss, entropy)
        return value.clone(), loss, z_loss, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, value_grad: Tensor, *ignored: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = context.saved_tensors
        # The objective is the last thing before backward(): its own gradient is a scalar, nearly always 1.
        scaled = [grad if grad is None else grad * value_grad.to(grad.dtype) for grad in (hidden_grad, weight_grad)]
        return scaled[0], scaled[1], None, None, None, None
