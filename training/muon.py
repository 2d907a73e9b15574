"""Muon on several processes: each whole matrix is orthogonalised on one of them.

Momentum, weight decay and the step itself act on each element alone, so each process does them on its part. Only the
orthogonalisation needs the whole matrix: it goes to the process that owns the matrix, and the result comes back. Both
travel in bf16, in which torch.optim.Muon computes it, so the weights are those of torch.optim.Muon to the last bit,
whatever the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from training.layout import Layout


class SharedMuon(torch.optim.Muon):
    """torch.optim.Muon over this process's parts of the matrices; each group has the ``names`` of its parameters."""

    def __init__(self, groups: list[dict[str, Any]], layout: Layout, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.layout = layout
        names = [name for group in self.param_groups for name in group["names"]]
        self.owners = owners_of({name: layout.shapes[name].numel() for name in names}, layout.team_size)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step, as torch.optim.Muon's."""
        shapes = self.layout.shapes
        for group in self.param_groups:
            updates = {}
            for name, weight in zip(group["names"], group["params"], strict=True):
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                updates[name] = weight.grad.lerp(momentum, group["momentum"]).bfloat16()
            settings = group["ns_coefficients"], group["ns_steps"], group["eps"]
            mine = {}
            for name, update in updates.items():
                whole = self.layout.to_owner(update, self.owners[name], shapes[name])
                if whole is not None:
                    mine[name] = _zeropower_via_newtonschulz(whole, *settings)
            for name, weight in zip(group["names"], group["params"], strict=True):
                whole = mine.pop(name, None)
                update = self.layout.from_owner(whole, self.owners[name], updates[name], shapes[name])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], shapes[name]))


def owners_of(sizes: dict[str, int], team: int) -> dict[str, int]:
    """Who owns which tensor, so that each of ``team`` processes has about as much: the largest first, to the idlest."""
    load, owners = [0] * team, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners
