"""What the processes of one run share. With a single process nothing here communicates."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import BadInput, Config, Run


@dataclass(frozen=True)
class Hardware:
    """The processes of a run and what each computes on; ``auto`` is resolved from config and machine, never timed."""

    rank: int
    world: int
    device: torch.device
    precision: str
    compile: bool
    threads: int

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision == "bf16")

    def describe(self) -> dict[str, Any]:
        """What is stored with the run and compared on resume."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return {
            "device": self.device.type,
            "device_name": name,
            "precision": self.precision,
            "compile": self.compile,
            "threads": self.threads,
            "processes": self.world,
        }


def start(config: Run, stored: dict[str, Any] | None = None) -> Hardware:
    """Join the other processes, if torchrun started several, and resolve every ``auto``.

    ``stored`` is the hardware a run began with: its values win over ``auto``. Raises BadInput for a device
    this machine does not have.
    """
    stored = stored or {}
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind: str = config.device
    if kind == "auto":
        before = stored.get("device", "")
        kind = before if available.get(before) else next(name for name, here in available.items() if here)
    if not available[kind]:
        here = ", ".join(name for name, there in available.items() if there)
        raise BadInput(f"run.device={kind}: this machine has none; it has {here}")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    same_device = stored.get("device") == kind and stored.get("processes") == world
    precision: str = config.precision
    if precision == "auto":
        precision = stored.get("precision") or ("bf16" if has_fast_bf16(kind) else "fp32")
    compiled = config.compile == "on"
    if config.compile == "auto":
        compiled = bool(stored.get("compile")) if same_device else kind == "cuda"
    threads = config.threads
    if threads == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = stored["threads"] if same_device else max(1, cores // local_world)
    torch.set_num_threads(int(threads))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return Hardware(rank, world, device, precision, compiled, int(threads))


def has_fast_bf16(kind: str) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device, by its features."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def my_micro_batches(hardware: Hardware, micro_batches: int) -> range:
    """The global indices of the micro-batches that this process computes in each step, in a contiguous run."""
    share = micro_batches // hardware.world
    return range(hardware.rank * share, (hardware.rank + 1) * share)


def check_micro_batches(config: Config, world: int) -> None:
    """Raises BadInput when the micro-batches of a step cannot be shared evenly, naming sizes that can."""
    count, size = config.training.micro_batches, config.training.global_batch_size
    if count % world == 0:
        return
    fitting = [micro for micro in range(1, size + 1) if size % micro == 0 and (size // micro) % world == 0]
    processes = [number for number in range(1, count + 1) if count % number == 0]
    way = f"training.micro_batch_size one of {fitting[-6:]}" if fitting else f"a global_batch_size divisible by {world}"
    raise BadInput(
        f"{count} micro-batches of {config.training.micro_size} sequences cannot be shared by {world} processes; "
        f"use {way}, or a number of processes out of {processes}"
    )


def sum_gradients(model: nn.Module, hardware: Hardware) -> None:
    """Add the gradients of all processes, in place; they were divided by the step's global count of targets."""
    if hardware.world == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(summed)


def total(values: Tensor, hardware: Hardware) -> Tensor:
    """The sum of ``values`` over all processes."""
    if hardware.world > 1:
        dist.all_reduce(values)
    return values


def from_main(value: Any, hardware: Hardware) -> Any:
    """The value that the main process holds, on every process: one decision for all. Travels as JSON, not pickled."""
    if hardware.world == 1:
        return value
    text = json.dumps(value).encode() if hardware.main else b""
    length = torch.tensor([len(text)], device=hardware.device)
    dist.broadcast(length, src=0)
    characters = torch.zeros(int(length), dtype=torch.uint8, device=hardware.device)
    if hardware.main:
        characters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(characters, src=0)
    return json.loads(bytes(characters.tolist()))


def on_main(hardware: Hardware, work: Callable[[], Any]) -> Any:
    """What ``work`` returns on the main process (JSON-like), on all; a BadInput there is raised by all."""
    answer: dict[str, Any] = {}
    if hardware.main:
        try:
            answer = {"value": work()}
        except (BadInput, OSError) as mistake:
            answer = {"mistake": str(mistake)}
    answer = from_main(answer, hardware)
    if "mistake" in answer:
        raise BadInput(answer["mistake"])
    return answer["value"]


def any_process(flag: bool, hardware: Hardware) -> bool:
    """Whether the flag is up on any process."""
    if hardware.world == 1:
        return flag
    raised = torch.tensor([int(flag)], device=hardware.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def barrier(hardware: Hardware) -> None:
    """Wait until every process is here."""
    if hardware.world > 1:
        dist.barrier()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
