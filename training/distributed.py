"""What the processes of one run share. With a single process nothing here communicates."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import BadInput, Config, Failure, Run

SECONDS_FOR_ROLL_CALL = 5  # in which a process that still runs answers
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Hardware:
    """The processes of a run and what each computes on; ``auto`` is resolved from config and machine, never timed."""

    rank: int
    world: int
    device: torch.device
    precision: str
    compile: bool  # False until decide_compile
    threads: int
    hang_timeout: int = 600
    store: Any = field(default=None, repr=False, compare=False)  # torch's key-value store of the launch

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


def start(config: Run, stored: dict[str, Any] | None = None, hang_timeout: int = 600) -> Hardware:
    """Join the other processes, if torchrun or srun started several, and resolve every ``auto``.

    ``stored`` is the hardware a run began with: its values win over ``auto``. ``hang_timeout``: seconds to wait
    for another process. Raises BadInput for a device this machine does not have.
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
    threads = config.threads
    if threads == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = stored["threads"] if same_device else max(1, cores // local_world)
    torch.set_num_threads(int(threads))
    store = None
    if world > 1 and not dist.is_initialized():
        patience = timedelta(seconds=hang_timeout)
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=patience))
        # torchrun keeps its store when it starts the processes anew: the addresses of the dead must not be found there.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    # Or else compiled code, and a GPU's, adds up the gradients of embeddings in whatever order its threads come.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed_memory()
    return Hardware(rank, world, device, precision, False, int(threads), hang_timeout, store)


def keep_freed_memory() -> None:
    """Have the C library hold freed memory for the next step: given back and fetched anew it costs a small step 10%."""
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone has mallopt
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes: larger blocks are mapped each time
        library.mallopt(M_TRIM_THRESHOLD, 2**30)


def decide_compile(
    hardware: Hardware, config: Config, stored: dict[str, Any], n_parameters: int, total_steps: int
) -> Hardware:
    """The hardware with ``run.compile`` resolved, from config and machine alone.

    auto: what the run began with (``stored``); else on for GPUs, and on CPUs that have a compiler for runs of an
    estimated ten minutes and more: compiling takes 10 to 30 s there and saves 2 to 25% of a step. Raises BadInput
    when it is asked for and cannot be had.
    """
    wanted, cpu = config.run.compile, hardware.device.type == "cpu"
    if wanted == "auto" and stored.get("device") == hardware.device.type and stored.get("processes") == hardware.world:
        wanted = "on" if stored.get("compile") else "off"
    missing = missing_for_compile() if cpu and wanted != "off" else None
    if wanted == "on" and missing:
        raise BadInput(f"run.compile=on needs {missing}; install it (Debian: g++, python3-dev) or use run.compile=off")
    if wanted == "auto":
        seconds = estimated_seconds(hardware, config, n_parameters, total_steps)
        wanted = "on" if hardware.device.type == "cuda" or (cpu and not missing and seconds >= 600) else "off"
    return replace(hardware, compile=wanted == "on")


def estimated_seconds(hardware: Hardware, config: Config, n_parameters: int, total_steps: int) -> float:
    """Roughly how long a run takes on CPUs: a core does 100 billion operations of products a second.

    To that comes 1 ms for each layer of each micro-batch of a process, in which nothing is computed.
    """
    model, training = config.model, config.training
    tokens = training.global_batch_size * model.context_length
    done = tokens * operations_per_token(n_parameters, model.n_layers, model.d_model, model.context_length)
    alone = 1e-3 * model.n_layers * training.micro_batches / hardware.world
    return total_steps * (done / (1e11 * hardware.threads * hardware.world) + alone)


def operations_per_token(n_parameters: int, n_layers: int, d_model: int, context: int) -> int:
    """Floating-point operations of a training step's products: 6·N + 12·L·D·T (Kaplan 2020, PaLM 2022)."""
    return 6 * n_parameters + 12 * n_layers * d_model * context


def missing_for_compile() -> str | None:
    """What torch.compile lacks on this machine for CPU code; None when all is there."""
    if not shutil.which(os.environ.get("CXX", "g++")):
        return "a C++ compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C headers"
    return None


def has_fast_bf16(kind: str) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device, by its features."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def my_micro_batches(hardware: Hardware, micro_batches: int, rank: int | None = None) -> range:
    """The global indices of the micro-batches that this process (or ``rank``) computes, in a contiguous run."""
    share = micro_batches // hardware.world
    first = share * (hardware.rank if rank is None else rank)
    return range(first, first + share)


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
    """What ``work`` returns on the main process (JSON-like), on all; its BadInput, Failure or OSError there is
    raised by all, the last as BadInput."""
    answer: dict[str, Any] = {}
    if hardware.main:
        try:
            answer = {"value": work()}
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


def refused_on_main(hardware: Hardware, work: Callable[..., Any], *arguments: Any) -> str:
    """Why the machine refused ``work`` on the main process (an OSError's words), on all; empty when it was done."""

    def attempt() -> str:
        try:
            work(*arguments)
        except OSError as problem:
            return str(problem)
        return ""

    return on_main(hardware, attempt)


def gathered(values: Tensor, hardware: Hardware) -> Tensor:
    """The ``values`` [n] of every process, [world, n]."""
    if hardware.world == 1:
        return values[None]
    everyone = [torch.empty_like(values) for _ in range(hardware.world)]
    dist.all_gather(everyone, values)
    return torch.stack(everyone)


def check_weights(model: nn.Module, step: int, hardware: Hardware) -> None:
    """Raises Failure when a weight is not finite, or differs between processes, naming the tensor and the ranks.

    What each process compares is the sum of each tensor's bits, read as integers: one changed number changes it.
    """
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        if not bool(parameter.isfinite().all()):
            raise Failure(f"step {step}: {name} is not finite any more; it is not saved. Lower optimizer.lr")
    if hardware.world == 1:
        return
    bits = torch.stack([parameter.detach().view(torch.int32).sum(dtype=torch.int64) for parameter in named.values()])
    everyone = gathered(bits, hardware)
    usual = everyone.mode(dim=0).values if hardware.world > 2 else everyone[0]
    differs = everyone != usual  # [world, tensors]
    if differs.any():
        ranks = differs.any(dim=1).nonzero().flatten().tolist()
        tensors = [name for name, one in zip(named, differs.any(dim=0).tolist(), strict=True) if one]
        raise Failure(
            f"step {step}: the weights of rank {', '.join(map(str, ranks))} differ from the others' in "
            f"{', '.join(tensors[:3])}{' and more' if len(tensors) > 3 else ''}; nothing of this step is saved. "
            "Start again to go on from the last checkpoint; if it happens again, look at the memory of that machine"
        )


def explain(problem: Exception, hardware: Hardware) -> Failure | None:
    """Who is to blame when this process cannot go on, as a Failure; None when the problem is its own.

    Whoever stops for a problem of its own says so in the store; who still runs answers; who does neither within
    a few seconds hangs or was killed.
    """
    if hardware.world == 1 or hardware.store is None:
        return None
    own = not (isinstance(problem, dist.DistError) or "gloo" in str(problem))
    words = str(problem).splitlines()[0] if str(problem) else ""
    # Without torchrun the store lives in rank 0, and ends with it.
    blamed = ["rank 0, or torchrun, is gone or hangs, and with it the word of who failed; summary.json may tell"]
    told = f"failed with {type(problem).__name__}: {words}" if own else ""
    calling = Thread(target=_roll_call, args=(hardware, words, told, blamed), daemon=True)
    calling.start()
    calling.join(SECONDS_FOR_ROLL_CALL * (hardware.world + 1))  # the store itself may hang: it lives in a process
    if own:
        return None
    if not blamed:
        return Failure(f"the processes lost each other ({words})")
    return Failure("; ".join(blamed) + ". Start again to go on from the last checkpoint")


def _roll_call(hardware: Hardware, words: str, told: str, blamed: list[str]) -> None:
    """Tell the others of this process's own error, ``told``, or without one put into ``blamed`` who is to blame."""
    store, answers = hardware.store, [f"stopped/{rank}" for rank in range(hardware.world)]
    found = []
    try:
        store.set_timeout(timedelta(seconds=SECONDS_FOR_ROLL_CALL))
        store.set(answers[hardware.rank], told)
        for rank, answer in enumerate([] if told else answers):
            try:
                reason = store.get(answer).decode()
            except dist.DistStoreError:  # nobody wrote it
                timed_out = "timed out" in words.lower()
                reason = f"hangs: nothing came from it for {hardware.hang_timeout} s" if timed_out else "was killed"
            if reason:
                found.append(f"rank {rank} {reason}")
    except dist.DistError:  # the store is gone
        return
    blamed[:] = found


def barrier(hardware: Hardware) -> None:
    """Wait until every process is here."""
    if hardware.world > 1:
        dist.barrier()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
