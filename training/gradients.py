"""The sum of a step's gradients over its micro-batches and processes, and with it the loss terms.

Ordinary: each process adds up its own micro-batches, and one all-reduce of one flat tensor adds up the processes.
torch's DistributedDataParallel is not used: it lays its buckets out anew after the first step of every start, so
that with three processes or more a resumed run adds in another order than an uninterrupted one (law 4).

Strict: float addition does not associate, so the order itself is fixed. The leaves of a binary tree are the global
micro-batches; node (level, index) covers leaves index * 2^level and on, 2^level of them:

    level 2               0
    level 1       0               1
    level 0     0   1           2   3       4 micro-batches; two processes hold (1, 0) and (1, 1)

Each process adds what lies wholly within its own leaves; unmerged nodes are broadcast, and every process completes
the same tree. The root is the same to the last bit on any number of processes. The price: a process holds about
log2(its micro-batches) gradients more, and each unmerged node is sent to all, twice the bytes of an all-reduce.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardware import Hardware
from training.processes import my_micro_batches


class GradientSum:
    """Collects one step after the other: ``add`` after each backward pass, then ``total`` once."""

    def __init__(self, model: nn.Module, hardware: Hardware, micro_batches: int, strict: bool) -> None:
        self.parameters = list(model.parameters())
        self.hardware, self.micro_batches, self.strict = hardware, micro_batches, strict
        self.values: Tensor | None = None
        self.nodes: dict[tuple[int, int], Any] = {}

    def add(self, micro_batch: int, values: Tensor) -> None:
        """Count a micro-batch whose gradients are in ``.grad``; ``values`` [n] are summed along with them."""
        if self.strict:
            insert(self.nodes, (0, micro_batch), self._flat(values), self.micro_batches)
            for parameter in self.parameters:
                parameter.grad = None
        else:
            self.values = values if self.values is None else self.values + values

    def total(self) -> Tensor:
        """The step's sums: gradients in ``.grad``, the values returned [n]. The same on every process."""
        if self.strict:
            flat = self._finish_tree()
        else:
            assert self.values is not None, "no micro-batch was added"
            values, self.values = self.values, None
            if self.hardware.world == 1:
                return values
            flat = self._flat(values)
            dist.all_reduce(flat)
        sizes = [parameter.numel() for parameter in self.parameters]
        *gradients, values = torch.split(flat, [*sizes, len(flat) - sum(sizes)])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return values

    def _flat(self, values: Tensor) -> Tensor:
        gradients = [parameter.grad for parameter in self.parameters]
        missing = [index for index, gradient in enumerate(gradients) if gradient is None]
        assert not missing, f"parameters {missing} got no gradient"
        return torch.cat([*(gradient.flatten() for gradient in gradients if gradient is not None), values])

    def _finish_tree(self) -> Tensor:
        for rank in range(self.hardware.world if self.hardware.world > 1 else 0):
            # Which nodes that process could not merge follows from the shape of the tree alone.
            unmerged: dict[tuple[int, int], Any] = {}
            for micro_batch in my_micro_batches(self.hardware, self.micro_batches, rank):
                insert(unmerged, (0, micro_batch), 0, self.micro_batches)
            for node in unmerged:
                mine = rank == self.hardware.rank
                flat = self.nodes.pop(node) if mine else torch.empty_like(next(iter(self.nodes.values())))
                dist.broadcast(flat, src=rank)
                self.nodes[node] = flat
        (root,) = merged(self.nodes, self.micro_batches).values()
        self.nodes = {}
        return torch.as_tensor(root)


def insert(nodes: dict[tuple[int, int], Any], node: tuple[int, int], value: Any, leaves: int) -> None:
    """Put a node into the tree; while its sibling is there, or lies beyond the last leaf, their parent takes over."""
    level, index = node
    while 2**level < leaves:
        sibling = (level, index ^ 1)
        if sibling in nodes:
            other = nodes.pop(sibling)
            value = other + value if index % 2 else value + other
        elif index % 2 or sibling[1] * 2**level < leaves:
            break
        level, index = level + 1, index // 2
    nodes[level, index] = value


def merged(nodes: dict[tuple[int, int], Any], leaves: int) -> dict[tuple[int, int], Any]:
    """The tree after all its nodes have met: only the root is left."""
    done: dict[tuple[int, int], Any] = {}
    for node in sorted(nodes, key=lambda node: node[1] * 2 ** node[0]):
        insert(done, node, nodes[node], leaves)
    return done
