"""What the processes of one run share. With a single process nothing here communicates."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from config import BadInput, Config, Failure
from hardware import Hardware

SECONDS_BETWEEN_LOOKS = 0.05  # at whether the main process has done something that takes it long


def join(hardware: Hardware, hang_timeout: int) -> Hardware:
    """Meet the other processes, if torchrun or srun started several; ``hang_timeout``: seconds to wait for one."""
    if hardware.world == 1 or dist.is_initialized():
        return hardware
    timeout = timedelta(seconds=hang_timeout)
    store, _, _ = next(rendezvous("env://", hardware.rank, hardware.world, timeout=timeout))
    # torchrun keeps its store when it starts the processes anew: the addresses of the dead must not be found there.
    store = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # Decisions travel over gloo, beside the tensors of a GPU: a process that waits for one of them is Python that can
    # tell who failed, while NCCL's watchdog would end it without a word.
    on_gpu = hardware.device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=hardware.rank,
        world_size=hardware.world,
        timeout=timeout,
        device_id=hardware.device if on_gpu else None,
    )
    return replace(hardware, hang_timeout=hang_timeout, store=store)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def my_micro_batches(hardware: Hardware, micro_batches: int, rank: int | None = None) -> range:
    """The global indices of the micro-batches that this process (or ``rank``) computes, in a contiguous run."""
    share = micro_batches // hardware.world
    first = share * (hardware.rank if rank is None else rank)
    return range(first, first + share)


def check_micro_batches(config: Config, world: int) -> None:
    """Raises BadInput when the micro-batches of a step cannot be shared evenly, naming sizes that can."""
    training = config.training
    if config.regularizers.mixup_alpha and training.global_batch_size < 2 * world:
        raise BadInput(
            f"regularizers.mixup_alpha mixes pairs, and {training.global_batch_size} sequences on {world} processes "
            f"leave some with one: raise training.global_batch_size to {2 * world} or more, or start fewer processes"
        )
    count = training.micro_batches if isinstance(training.micro_batch_size, int) else training.global_batch_size
    if count % world == 0:
        return
    fitting = config.training.micro_sizes(world)
    processes = [number for number in range(1, count + 1) if count % number == 0]
    way = f"training.micro_batch_size one of {fitting[-6:]}" if fitting else f"a global_batch_size divisible by {world}"
    raise BadInput(
        f"{count} micro-batches of {config.training.micro_size} sequences cannot be shared by {world} processes; "
        f"use {way}, or a number of processes out of {processes}"
    )


def total(values: Tensor, hardware: Hardware) -> Tensor:
    """The sum of ``values`` over all processes."""
    if hardware.world > 1:
        dist.all_reduce(values)
    return values


def gathered(values: Tensor, hardware: Hardware) -> Tensor:
    """The ``values`` [n] of every process, [world, n]."""
    if hardware.world == 1:
        return values[None]
    everyone = [torch.empty_like(values) for _ in range(hardware.world)]
    dist.all_gather(everyone, values)
    return torch.stack(everyone)


def from_main(value: Any, hardware: Hardware) -> Any:
    """The value that the main process holds, on every process: one decision for all. Travels as JSON, not pickled."""
    if hardware.world == 1:
        return value
    text = json.dumps(value).encode() if hardware.main else b""
    length = torch.tensor([len(text)])
    dist.broadcast(length, src=0)
    characters = torch.zeros(int(length), dtype=torch.uint8)
    if hardware.main:
        characters.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(characters, src=0)
    return json.loads(bytes(characters.tolist()))


def on_main(hardware: Hardware, work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns on the main process (something that JSON can hold), on all.

    Its BadInput, Failure or OSError there is raised by all, the last as BadInput.
    """
    answer: dict[str, Any] = {}
    if hardware.main:
        try:
            answer = {"value": work(*arguments)}
        except (BadInput, OSError) as mistake:
            answer = {"mistake": str(mistake)}
        except Failure as failure:
            answer = {"failure": str(failure)}
    answer = from_main(answer, hardware)
    if "mistake" in answer:
        raise BadInput(answer["mistake"])
    if "failure" in answer:
        raise Failure(answer["failure"])
    return answer["value"]


def main_first(hardware: Hardware, work: Callable[[bool], Any]) -> Any:
    """What ``work`` returns, done by the main process and then by the others; it is told whether this one is the main.

    For what takes the main process long: in a collective the others would wait no longer than the hang timeout. When
    it fails there, the others go on, and find out in the next collective.
    """
    ready = "the main process is ready"
    if hardware.store is not None and not hardware.main:
        while not hardware.store.check([ready]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
    try:
        return work(hardware.main)
    finally:
        if hardware.store is not None and hardware.main:
            hardware.store.set(ready, "")


def barrier(hardware: Hardware) -> None:
    """Wait until every process is here."""
    total(torch.zeros(1), hardware)
