"""The sum of a step's gradients over its micro-batches and processes, and with it the loss terms.

``GradientSum``       one process: torch adds up its micro-batches in ``.grad``.
``BucketedSum``       each process holds the whole model: flat tensors, one or, on GPUs, one for each block, are added
                      up over the processes. They and their order are fixed by the model. Those of torch's
                      DistributedDataParallel are laid out anew after the first step of every start, so that with three
                      processes or more a resumed run would add in another order than an uninterrupted one (law 4).
``ShardedSum``        each process holds a part of the model: FSDP2 adds up and gives to each process what is its own.
``TreeSum``           strict: float addition does not associate, so the order itself is fixed. The leaves of a binary
                      tree are the global micro-batches; node (level, index) covers leaves index * 2^level and on,
                      2^level of them:

    level 2               0
    level 1       0               1
    level 0     0   1           2   3       4 micro-batches; two processes hold (1, 0) and (1, 1)

                      Each process adds what lies wholly within its own leaves; unmerged nodes are broadcast, and every
                      process completes the same tree. The root is the same to the last bit on any number of processes.
                      The price: a process holds about log2(its micro-batches) gradients more, and each unmerged node
                      is sent to all, twice the bytes of an all-reduce.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from training.layout import Layout, local
from training.processes import my_micro_batches

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


OVERLAPPING = ("cuda",)  # kinds of devices that compute and communicate at the same time


class GradientSum:
    """Collects one step after the other.

    ``add`` after the backward passes of each micro-batch, ``expect_last_pass`` before the very last pass; then
    ``finish``, after which every ``.grad`` of the layout's weights is that of the whole step, and ``norm_and_values``.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.values: Tensor | None = None

    def add(self, micro_batch: int, values: Tensor) -> None:
        """Count a micro-batch whose backward passes are done; ``values`` [n] are to be summed as gradients are."""
        self.values = values if self.values is None else self.values + values

    def expect_last_pass(self) -> None:
        """The next backward pass is the last one of the step on this process."""

    def finish(self) -> None:
        """Complete the gradients."""

    def norm_and_values(self) -> tuple[Tensor, Tensor]:
        """The norm of the whole gradient as it is now, and the summed values [n]: the same on every process."""
        values = self._take_values()
        return torch.nn.utils.get_total_norm(self._gradients()), values

    def _take_values(self) -> Tensor:
        assert self.values is not None, "no micro-batch was added"
        values, self.values = self.values, None
        return values

    def _gradients(self) -> list[Tensor]:
        gradients = {name: weight.grad for name, weight in self.layout.weights.items()}
        missing = [name for name, gradient in gradients.items() if gradient is None]
        assert not missing, f"parameters {missing} got no gradient"
        return [gradient for gradient in gradients.values() if gradient is not None]


class BucketedSum(GradientSum):
    """Adds up whole gradients over the processes, a bucket at a time, and with the last one the values.

    On a GPU the gradients of a block are summed while those of the blocks before it are still being computed. The cores
    of a CPU are all busy computing them, and each message costs more than it saves: there is one bucket, at the end.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        model = layout.model
        overlaps = layout.hardware.device.type in OVERLAPPING
        blocks = [list(block.parameters()) for block in reversed(model.blocks)] if overlaps else []
        inside = {id(parameter) for block in blocks for parameter in block}
        self.buckets = [*blocks, [parameter for parameter in model.parameters() if id(parameter) not in inside]]
        self.waiting: list[set[int]] | None = None  # the parameters of each bucket whose gradients are still to come
        self.launched: list[Any] = []
        for number, block in enumerate(blocks):
            for parameter in block:
                parameter.register_post_accumulate_grad_hook(lambda own, number=number: self._arrived(number, own))

    def expect_last_pass(self) -> None:
        self.waiting = [{id(parameter) for parameter in bucket} for bucket in self.buckets]

    def _arrived(self, number: int, parameter: Tensor) -> None:
        if self.waiting is None:
            return
        self.waiting[number].discard(id(parameter))
        # In a fixed order, so that all processes send the same buckets to each other. The last one is sent by finish():
        # of its parameters not all need take part in the last pass.
        while len(self.launched) < len(self.buckets) - 1 and not self.waiting[len(self.launched)]:
            self._launch()

    def _launch(self, values: Tensor | None = None) -> Tensor:
        bucket = self.buckets[len(self.launched)]
        gradients = [parameter.grad for parameter in bucket]
        assert all(gradient is not None for gradient in gradients), "a parameter got no gradient"
        parts = [gradient.flatten() for gradient in gradients if gradient is not None]
        flat = torch.cat(parts if values is None else [*parts, values])
        sizes = [parameter.numel() for parameter in bucket]
        for parameter, gradient in zip(bucket, flat[: sum(sizes)].split(sizes), strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.launched.append(dist.all_reduce(flat, async_op=True))
        return flat[sum(sizes) :]

    def finish(self) -> None:
        while len(self.launched) < len(self.buckets) - 1:
            self._launch()
        self.values = self._launch(self._take_values())
        for work in self.launched:
            work.wait()
        self.waiting, self.launched = None, []

    def norm_and_values(self) -> tuple[Tensor, Tensor]:
        return square_sum(self._gradients()).sqrt().float(), self._take_values()


class ShardedSum(GradientSum):
    """Has FSDP2 add up the gradients in the last backward pass; before it, they are kept where they were computed."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._synchronize(False)

    def add(self, micro_batch: int, values: Tensor) -> None:
        super().add(micro_batch, values)
        self._synchronize(False)

    def expect_last_pass(self) -> None:
        self._synchronize(True)

    def _synchronize(self, now: bool) -> None:
        model = cast("FSDPModule", self.layout.model)
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)

    def finish(self) -> None:
        for name, parameter in self.layout.parameters.items():
            assert parameter.grad is not None, f"the parameter {name} got no gradient"
            self.layout.weights[name].grad, parameter.grad = local(parameter.grad), None

    def norm_and_values(self) -> tuple[Tensor, Tensor]:
        # Of what several processes hold, each element counts on one of them alone.
        own = square_sum([self.layout.counted(gradient) for gradient in self._gradients()])
        sums = torch.cat([own[None], self._take_values().double()])
        dist.all_reduce(sums)
        return sums[0].sqrt().float(), sums[1:].float()


def square_sum(tensors: list[Tensor]) -> Tensor:
    """The sum of all squares, in float64: rounded to fp32, that of a whole and that of its parts are one."""
    return torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float64)).square().sum()


class TreeSum(GradientSum):
    """Adds up whole gradients in the order of a fixed binary tree over the global micro-batches."""

    def __init__(self, layout: Layout, micro_batches: int) -> None:
        super().__init__(layout)
        self.micro_batches = micro_batches
        self.nodes: dict[tuple[int, int], Any] = {}

    def add(self, micro_batch: int, values: Tensor) -> None:
        flat = torch.cat([*(gradient.flatten() for gradient in self._gradients()), values])
        insert(self.nodes, (0, micro_batch), flat, self.micro_batches)
        for weight in self.layout.weights.values():
            weight.grad = None

    def finish(self) -> None:
        hardware = self.layout.hardware
        for rank in range(hardware.world if hardware.world > 1 else 0):
            # Which nodes that process could not merge follows from the shape of the tree alone.
            unmerged: dict[tuple[int, int], Any] = {}
            for micro_batch in my_micro_batches(hardware, self.micro_batches, rank):
                insert(unmerged, (0, micro_batch), 0, self.micro_batches)
            for node in unmerged:
                mine = rank == hardware.rank
                flat = self.nodes.pop(node) if mine else torch.empty_like(next(iter(self.nodes.values())))
                dist.broadcast(flat, src=rank)
                self.nodes[node] = flat
        (root,) = merged(self.nodes, self.micro_batches).values()
        self.nodes = {}
        weights = self.layout.weights.values()
        sizes = [weight.numel() for weight in weights]
        *gradients, self.values = torch.split(torch.as_tensor(root), [*sizes, len(root) - sum(sizes)])
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.view_as(weight)


def gradient_sum(layout: Layout, micro_batches: int, strict: bool) -> GradientSum:
    """The way in which a run's gradients are added up."""
    if strict:
        return TreeSum(layout, micro_batches)
    if layout.parts > 1:
        return ShardedSum(layout)
    return BucketedSum(layout) if layout.hardware.world > 1 else GradientSum(layout)


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
