"""AdamW, or Muon for the matrices of the blocks, both torch.optim's, over named groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from config import BadInput, Config, Regularizers
from model.gpt import AUXILIARY
from regularizers.weights import first_weight_decay
from training.layout import Layout
from training.muon import SharedMuon

# torch.optim hides its methods from torch's compiler and imports that to do so, which takes a second or two of each
# start. Nothing here compiles an optimizer, so its methods are called as they are behind that.
for _method in (torch.optim.Optimizer.add_param_group, torch.optim.Optimizer.zero_grad):
    setattr(inspect.unwrap(_method), "__dynamo_disable", inspect.unwrap(_method))


class AdamW(torch.optim.AdamW):
    """torch.optim's, whose step does not import the compiler."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(torch.optim.Muon):
    """torch.optim's, whose step does not import the compiler."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Muon.step))


# The optimizers of a run, in a fixed order: one AdamW, and one Muon before it if it is asked for.
Optimizers = list[torch.optim.Optimizer]


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Every parameter in exactly one group, ``{group: {name: parameter}}``; groups without any are left out.

    ``matrices`` are the weights of the blocks; ``output`` is the output matrix when it is not tied; ``vectors`` are
    biases and the gains of norms; ``auxiliary`` is what only regularizers use. The last two never decay.
    """
    kinds = ("matrices", "embeddings", "output", "vectors", "auxiliary")
    groups: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in kinds}
    for name, parameter in model.named_parameters():
        if name.startswith(AUXILIARY):
            groups["auxiliary"][name] = parameter
        elif parameter.ndim < 2:
            groups["vectors"][name] = parameter
        elif name.startswith("blocks."):
            groups["matrices"][name] = parameter
        elif name in ("embedding.weight", "positions.weight"):
            groups["embeddings"][name] = parameter
        elif name == "output.weight":
            groups["output"][name] = parameter
        else:
            raise ValueError(f"the parameter {name} belongs to no optimizer group")
    return {group: members for group, members in groups.items() if members}


def build_optimizers(layout: Layout, config: Config, steps_per_epoch: float) -> Optimizers:
    """The run's optimizers; each group carries its name, its parameters' names, their elements on all processes, its
    peak lr, its first weight decay and whether it decays."""
    settings = config.optimizer
    adamw: list[dict[str, Any]] = []
    muon: list[dict[str, Any]] = []
    for group, members in parameter_groups(layout.model).items():
        decays = group in ("matrices", "output") or (group == "embeddings" and config.regularizers.decay_embeddings)
        by_muon = settings.name == "muon" and group == "matrices"
        peak_lr = settings.matrix_lr if by_muon else settings.lr
        first_decay = first_weight_decay(config.regularizers, peak_lr, steps_per_epoch)
        entry = {
            "params": [layout.weights[name] for name in members],
            "group_name": group,
            "names": list(members),
            "elements": sum(layout.shapes[name].numel() for name in members),
            "decays": decays,
            "peak_lr": peak_lr,
            "first_decay": first_decay,
            "weight_decay": first_decay if decays else 0.0,
        }
        (muon if by_muon else adamw).append(entry)
    optimizers: Optimizers = []
    if muon:
        lr, momentum = settings.matrix_lr, settings.matrix_momentum
        if layout.hardware.world > 1:
            optimizers.append(SharedMuon(muon, layout, lr=lr, momentum=momentum))
        else:
            optimizers.append(Muon(muon, lr=lr, momentum=momentum))
    optimizers.append(AdamW(adamw, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True))
    return optimizers


def set_learning_rate(optimizers: Optimizers, ratio: float) -> None:
    """Give each group its peak learning rate times ``ratio``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * ratio


def set_weight_decay(optimizers: Optimizers, decay_from: Callable[[float], float]) -> None:
    """Give each group that decays what ``decay_from`` makes of its first weight decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = decay_from(group["first_decay"]) if group["decays"] else 0.0


def decayed_parameters(optimizers: Optimizers) -> dict[str, Tensor]:
    """The parameters on which weight decay, L1 and L2 act, by name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if group["decays"]]
    return {name: weight for group in groups for name, weight in zip(group["names"], group["params"], strict=True)}


def describe_groups(optimizers: Optimizers, config: Regularizers, steps_per_epoch: float) -> list[str]:
    """A line for each group: optimizer, tensors, elements, peak learning rate, first decay and its timescale."""
    lines = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lines.append(
                f"{group['group_name']:<10} {type(optimizer).__name__:<5} {len(group['params']):>4} tensors "
                f"{group['elements']:>13,} elements  lr {group['peak_lr']:g}  "
                + describe_decay(group, config, steps_per_epoch)
            )
    return lines


def describe_decay(group: dict[str, Any], config: Regularizers, steps_per_epoch: float) -> str:
    """A group's first weight decay, and over how many steps and epochs its weights average its updates: 1/(lr·λ)."""
    decay, constant = group["first_decay"], config.weight_decay_schedule == "constant"
    if not group["decays"] or (constant and not decay):
        return "no decay"
    words = f"weight decay {'' if constant else 'at first '}{decay:g}"
    if not decay:
        return words
    steps = 1 / (group["peak_lr"] * decay)
    return f"{words} (timescale {steps:,.0f} steps, {steps / steps_per_epoch:,.2f} epochs)"


def clip_gradients(weights: Iterable[Tensor], limit: float, norm: Tensor) -> None:
    """Scale all gradients, whose joint norm is ``norm``, so that it is at most ``limit`` (0: no limit)."""
    if limit > 0 and (norm.device.type != "cpu" or norm > limit):  # a GPU is not waited for: it multiplies by 1
        torch.nn.utils.clip_grads_with_norm_(weights, limit, norm)


def optimizer_state(optimizers: Optimizers) -> dict[str, Tensor]:
    """All moments and step counts by parameter name, ``{"blocks.0.mlp.input.weight/exp_avg": tensor}``."""
    state = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    state[f"{name}/{key}"] = torch.as_tensor(value)
    return state


def load_optimizer_state(optimizers: Optimizers, state: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_state`` gave; raises BadInput when names or shapes do not fit the model."""
    left = set(state)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                own = {key.rsplit("/", 1)[1]: key for key in left if key.rsplit("/", 1)[0] == name}
                for short, key in own.items():
                    value = state[key]
                    if value.ndim and value.shape != parameter.shape:
                        raise BadInput(f"optimizer state {key} has shape {tuple(value.shape)}, not the parameter's")
                    # All on the parameter's device, where fused AdamW has its step counts too.
                    optimizer.state[parameter][short] = value.to(parameter.device, copy=True)
                left -= set(own.values())
    if left:
        raise BadInput(f"the optimizer state holds tensors of no parameter: {', '.join(sorted(left)[:3])}")
