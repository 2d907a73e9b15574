"""How a model lies on the processes of a run: whole on each of them, or in parts (torch's FSDP2).

    run.shard=none   every process holds the whole model
    run.shard=node   the processes of one machine share it, and the machines hold copies (HSDP)
    run.shard=all    all processes share it

A process's part of a tensor is a range of its rows, as torch.chunk would cut them. Parts are gathered where they are
needed, for a forward or backward pass one block at a time. What happens to weights between the passes (penalties,
clipping, the optimizer, averages) is done on the parts alone, which are plain tensors.

What torch needs for parts is imported where there are some: importing it takes as long as a small run's first steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from hardware import Hardware
from model.gpt import GPT

SAVED_WHOLE = 2_000_000_000  # elements: a larger model in parts is saved in parts, for its moments need 16 GB and more

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Layout:
    """Lays ``model`` out over the processes as run.shard says, on the hardware's device.

    ``weights`` are what this process holds of each parameter, by name; their ``.grad`` is filled by a GradientSum.
    ``shapes`` are those of the whole parameters. The processes are ``copies`` of the model in ``parts`` each; this one
    has the part ``part`` of the copy ``copy``.

    What is said to be collective must be called by all processes together.
    """

    def __init__(self, model: GPT, hardware: Hardware) -> None:
        self.model, self.hardware, self.parts = model, hardware, hardware.parts
        self.copies = hardware.world // self.parts
        self.copy, self.part = divmod(hardware.rank, self.parts)
        self.mesh: DeviceMesh | None = None
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if self.parts > 1:
            self.mesh = share_out(model, hardware.device.type, self.copies, self.parts)
            # Asked for now: while a module's weights are gathered, others stand in their place.
            self.parameters = dict(model.named_parameters())
            self.weights = {name: local(parameter) for name, parameter in self.parameters.items()}
        else:
            self.weights = dict(model.to(hardware.device).named_parameters())

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of which each process has the part that it has of the parameter ``name``. Collective."""
        if self.mesh is None:
            return part
        from torch.distributed.tensor import DTensor

        like = cast("DTensor", self.parameters[name])
        shape, stride = like.shape, like.stride()
        return DTensor.from_local(part, like.device_mesh, like.placements, shape=shape, stride=stride).full_tensor()

    def gathered(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of the main process, nothing elsewhere, gathered one at a time. Collective.

        They are named as the parameters are of which they have the shape, or "parameter/what"; scalars are whole.
        """
        found = {}
        for name, part in sorted(parts.items()):  # all processes in the same order, whatever was loaded first
            whole = self.whole(name.split("/")[0], part) if part.ndim else part
            if self.hardware.main:
                found[name] = whole.cpu()
        return found

    def gradients(self) -> list[Tensor]:
        """This process's gradients as the last backward pass left them, before a GradientSum has completed them."""
        if self.mesh is None:
            return [weight.grad for weight in self.weights.values() if weight.grad is not None]
        return [local(parameter.grad) for parameter in self.parameters.values() if parameter.grad is not None]

    def part_of(self, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor; a scalar is each process's own."""
        return self._rows(whole, self.part, self.parts) if whole.ndim else whole

    def counted(self, part: Tensor) -> Tensor:
        """The rows of this process's part that it alone speaks for where all copies together are to count once."""
        return self._rows(part, self.copy, self.copies)

    def _rows(self, tensor: Tensor, number: int, count: int) -> Tensor:
        rows = -(-len(tensor) // count)
        return tensor[number * rows : (number + 1) * rows]

    @property
    def saves_rows(self) -> bool:
        """Whether each process of a copy writes its part of a checkpoint, and no tensor is gathered."""
        return self.parts > 1 and sum(shape.numel() for shape in self.shapes.values()) > SAVED_WHOLE

    @property
    def team_size(self) -> int:
        """Among how many processes work on whole tensors is shared out: those of one copy, or all that have a copy."""
        return self.hardware.world if self.mesh is None else self.parts

    def to_owner(self, part: Tensor, owner: int, shape: torch.Size) -> Tensor | None:
        """On the ``owner`` within the team the whole matrix of ``shape``, else None. Collective."""
        if self.mesh is None:
            return part if self.hardware.rank == owner else None
        sent = as_bytes(part, -(-shape[0] // self.parts))
        received = [torch.empty_like(sent) for _ in range(self.parts)] if self.part == owner else None
        dist.gather(sent, received, group=self.mesh.get_group("parts"), group_dst=owner)
        return None if received is None else torch.cat(received).view(part.dtype)[: shape[0]]

    def from_owner(self, whole: Tensor | None, owner: int, part: Tensor, shape: torch.Size) -> Tensor:
        """This process's part, like ``part``, of the matrix of ``shape``, whole on its owner alone. Collective."""
        if self.mesh is None:
            whole = torch.empty_like(part) if whole is None else whole.contiguous()
            dist.broadcast(whole.view(torch.uint8), src=owner)
            return whole
        rows = -(-shape[0] // self.parts)
        received = torch.empty(rows, *shape[1:], dtype=part.dtype, device=part.device)
        sent = None if whole is None else list(as_bytes(whole, rows * self.parts).split(rows))
        dist.scatter(received.view(torch.uint8), sent, group=self.mesh.get_group("parts"), group_src=owner)
        return received[: len(part)]

    def release(self) -> None:
        """Forget gathered weights that a forward pass without a backward pass left: the parts are about to change."""
        if self.mesh is not None:
            cast("FSDPModule", self.model).reshard()


def share_out(model: GPT, kind: str, copies: int, parts: int) -> DeviceMesh:
    """Let FSDP2 split each block and the rest of the model into parts, on devices of this kind; returns the mesh."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sizes, names = ((parts,), ("parts",)) if copies == 1 else ((copies, parts), ("copies", "parts"))
    mesh = init_device_mesh(kind, sizes, mesh_dim_names=names)
    for module in (*model.blocks, model):
        sharded = fully_shard(module, mesh=mesh)
        # A micro-batch's gradients are parts of those of the step's mean: they are added, not averaged.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return mesh


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient that is in parts, in the same memory."""
    held: Tensor = cast("DTensor", tensor).to_local()
    return held.detach()


def as_bytes(matrix: Tensor, rows: int) -> Tensor:
    """The bytes of a matrix, with rows of zeros below it up to so many: not every backend can send every type."""
    return F.pad(matrix, (0, 0, 0, rows - len(matrix))).contiguous().view(torch.uint8)
