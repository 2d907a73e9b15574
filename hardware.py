"""What a run computes on: every ``auto`` of the run section, resolved from config and machine, never from timing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import sys
import sysconfig
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from config import BadInput, Config, Run
from program import cores, has_own_cores, warn

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
WORTH_COMPILING = 600  # estimated seconds of a run on CPUs: compiling takes 10 to 30 s and saves 2 to 25% of a step
WORTH_STARTING_COMPILED = 60  # the same for one of many runs: each takes some seconds to find what was compiled before
OPERATIONS_PER_SECOND = 1e11  # floating-point operations of matrix products that one core does in an estimate
# Of dense bf16 matrix products, added up in fp32, from NVIDIA's data sheets; of V100 and T4, without bf16, in fp16.
PEAK_OPERATIONS_PER_SECOND = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
SECONDS_PER_LAYER = 1e-3  # of each micro-batch, whatever its size: the time in which nothing is computed


@dataclass(frozen=True)
class Hardware:
    """The processes of a run and what each computes on."""

    rank: int
    world: int
    device: torch.device
    precision: str
    compile: bool  # False until resolve_compile
    threads: int
    parts: int = 1  # in which the model lies on the processes (run.shard)
    hang_timeout: int = 600  # seconds to wait for another process
    store: Any = field(default=None, repr=False, compare=False)  # torch's key-value store of the launch

    @property
    def main(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    @property
    def compiles_blocks(self) -> bool:
        """Whether a block is compiled for itself: in seconds, once for all blocks and the next runs, and so that FSDP2
        can gather weights between blocks. On CPUs whole models take 10 times as long, and then win up to 11% a step."""
        return self.compile and (self.device.type == "cuda" or self.parts > 1)

    @property
    def saves_in_background(self) -> bool:
        """Whether checkpoints are written while training goes on: where training leaves the cores and the memory."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Type of matrix products."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision != "fp32")

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
            "parts": self.parts,
        }

    def as_stored(self, stored: dict[str, Any]) -> bool:
        """Whether a run that began on ``stored`` hardware has the same kind of device and number of processes now."""
        return bool(stored.get("device") == self.device.type and stored.get("processes") == self.world)


def moved(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``value``, of the CPU, on ``device``. A GPU fetches it in its own time: from ordinary memory all would wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def resolve(config: Run, stored: dict[str, Any] | None = None, fast: bool = False) -> Hardware:
    """The hardware of this process, and torch set up for it.

    ``stored`` is the hardware a run began with: its values win over ``auto``. ``fast``: a GPU need not repeat its bits
    (see ``settle_determinism``). torchrun's or srun's variables tell of other processes; ``training.processes.join``
    meets them. Raises BadInput for a device this machine does not have.
    """
    stored = stored or {}
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind: str = config.device
    if kind == "auto":
        before = stored.get("device", "")
        kind = before if available.get(before) else next(name for name, here in available.items() if here)
    if not available[kind]:
        here = ", ".join(name for name, there in available.items() if there)
        raise BadInput(f"run.device={kind}: this machine has none; it has {here}")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    precision: str = config.precision
    if precision == "auto":
        half = "fp16" if kind == "cuda" else "fp32"
        precision = stored.get("precision") or ("bf16" if has_fast_bf16(kind) else half)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    nearby = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # srun and the like may have bound each process to cores of its own; torchrun's processes share theirs.
    threads = max(1, cores() // (1 if has_own_cores() else nearby))
    shares: dict[str, int] = {"none": 1, "node": nearby, "all": world}
    hardware = Hardware(rank, world, device, precision, compile=False, threads=threads, parts=shares[config.shard])
    if config.threads != "auto":
        hardware = replace(hardware, threads=config.threads)
    elif hardware.as_stored(stored):
        hardware = replace(hardware, threads=stored["threads"])
    set_up_torch(hardware, fast)
    return hardware


def set_up_torch(hardware: Hardware, fast: bool = False) -> None:
    """Threads, TF32, vector math, deterministic algorithms, and memory that is kept."""
    if hardware.device.type == "cuda":
        torch.cuda.set_device(hardware.device)
        # Not by fp32_precision: after it torch refuses to say which precision is set, and its compiler asks.
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(hardware.threads)
    settle_vector_math()
    settle_determinism(hardware.device.type, fast)
    with contextlib.suppress(OSError, AttributeError):  # glibc's alone has mallopt
        # Memory that is given back and fetched anew costs a small step 10%.
        library = ctypes.CDLL(None)
        if hardware.parts > 1:  # but weights that are gathered for one block must not stay where the next are put
            library.mallopt(M_MMAP_THRESHOLD, 2**16)
            return
        library.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most it takes: larger blocks are mapped each time
        library.mallopt(M_TRIM_THRESHOLD, 2**30)


def settle_determinism(kind: str, fast: bool = False) -> None:
    """Make the same computation give the same bits each time on this ``kind`` of device.

    ``fast`` (training.deterministic) gives that up on CUDA, for attention's backward pass, sums over GPUs and compiled
    code that are chosen for their speed alone; elsewhere it changes nothing. The variables are those that NCCL and
    cuBLAS read when they are first used; what the user set stays.
    """
    mode = "warn"
    if kind == "cuda":
        # Fused attention is deterministic only where torch would raise an error for what is not, and not when it would
        # merely warn. cuDNN's has no deterministic backward, and with a mask it can give NaN (pytorch#196678).
        mode = "default" if fast else "error"
        torch.backends.cuda.enable_cudnn_sdp(False)
    if kind == "cuda" and not fast:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if "NCCL_ALGO" not in os.environ:  # sums inside the switch of an NVLink network differ from call to call
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    # Not by torch.use_deterministic_algorithms, which imports the compiler (a second or two).
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def settle_vector_math() -> None:
    """Make MKL's vector functions, by which torch takes exp, log, sqrt, sin and cos on a CPU, choose their code now.

    They choose it for all of them at the first call, by the kind of processor. MKL 2024, the one in torch's wheels,
    notes that kind first in one numbering and then in another, without a lock. A second thread whose own first call
    comes between the two misreads it and computes its half of that one tensor with the code of lowest accuracy: exp
    to 1e-4 instead of 1e-7, in some processes and not in others. So the first call is made here, by a single thread.
    """
    torch.zeros(1).exp()


def resolve_compile(
    hardware: Hardware, config: Config, stored: dict[str, Any], n_parameters: int, total_steps: int
) -> Hardware:
    """The hardware with ``run.compile`` resolved, from config and machine alone.

    auto: what the run began with (``stored``); else on for GPUs, and on CPUs that have a compiler for runs that are
    estimated to be WORTH_COMPILING. Raises BadInput when it is asked for and cannot be had.
    """
    wanted, kind = config.run.compile, hardware.device.type
    if wanted == "auto" and hardware.as_stored(stored):
        wanted = "on" if stored.get("compile") else "off"
    missing = missing_for_compile(kind) if kind != "mps" and wanted != "off" else None
    if wanted == "on" and missing:
        raise BadInput(f"run.compile=on needs {missing}; install it (Debian: g++, python3-dev) or use run.compile=off")
    if wanted == "auto":
        gains = worth_compiling(estimated_seconds(hardware, config, n_parameters, total_steps))
        if kind == "cuda" and missing and hardware.main:
            warn(f"nothing is compiled, which costs a GPU much of its speed: this machine lacks {missing}")
        wanted = "on" if not missing and (kind == "cuda" or (kind == "cpu" and gains)) else "off"
    if wanted == "on" and (kind != "cuda" or config.training.deterministic != "fast"):
        # Compiled code, too, would add up gradients in any order.
        torch.use_deterministic_algorithms(True, warn_only=kind != "cuda")
    return replace(hardware, compile=wanted == "on")


def worth_compiling(seconds: float, runs: int = 1) -> bool:
    """Whether ``runs`` that share what the first compiles, each of so many ``seconds``, gain by it on CPUs."""
    return seconds >= WORTH_STARTING_COMPILED and seconds * runs >= WORTH_COMPILING


def estimated_seconds(hardware: Hardware, config: Config, n_parameters: int, total_steps: int) -> float:
    """Roughly how long a run takes on CPUs."""
    model, training = config.model, config.training
    done = config.tokens_per_step * operations_per_token(
        n_parameters, model.n_layers, model.d_model, model.context_length
    )
    alone = SECONDS_PER_LAYER * model.n_layers * training.micro_batches / hardware.world
    return total_steps * (done / (OPERATIONS_PER_SECOND * hardware.threads * hardware.world) + alone)


def operations_per_token(n_parameters: int, n_layers: int, d_model: int, context: int) -> int:
    """Floating-point operations of a training step's products: 6·N + 12·L·D·T (Kaplan 2020, PaLM 2022)."""
    return 6 * n_parameters + 12 * n_layers * d_model * context


def peak_operations(device_name: str) -> float | None:
    """Floating-point operations a second of which a device of this name is capable at most; None if it is not known.

    A part of a device, as MIG cuts it, and the slower ones of the same name are not known.
    """
    if re.search(r"\b(MIG|Laptop|D)\b", device_name):
        return None
    names = (name for name in PEAK_OPERATIONS_PER_SECOND if re.search(rf"\b{name}\b", device_name))
    return next((PEAK_OPERATIONS_PER_SECOND[name] for name in names), None)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: allocated on its GPU, else resident in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_metrics(hardware: Hardware, tokens_per_second: float, operations: int) -> dict[str, float]:
    """On CUDA what is logged of the devices, at this speed of all of them and so many ``operations`` a token.

    ``train/mfu`` (PaLM 2022) is the share of the devices' peak that forward and backward pass of the network need,
    missing where the peak is not known; ``train/memory_gb`` the most memory that the main process has held.
    """
    if hardware.device.type != "cuda":
        return {}
    metrics = {"train/memory_gb": peak_memory(hardware.device) / 1e9}
    peak = peak_operations(hardware.describe()["device_name"])
    return metrics | ({"train/mfu": tokens_per_second * operations / (peak * hardware.world)} if peak else {})


def missing_for_compile(kind: str = "cpu") -> str | None:
    """What torch.compile lacks on this machine for this ``kind`` of device; None when all is there.

    A GPU's code needs a compiler of the host, too: for what starts it.
    """
    if kind == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return "a C++ compiler"
    if kind == "cuda" and not any(map(shutil.which, [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"])):
        return "a C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C headers"
    return None


def has_fast_bf16(kind: str) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device, by its features."""
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if kind != "cpu":
        return False
    # Intel's AVX512-BF16 is no faster than its fp32, and there is the conversion: without AMX a product of large
    # matrices was measured at 70 GFLOP/s in bf16 and 131 in fp32, and a small step took a third longer.
    return bool(torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not is_intel()))


def is_intel() -> bool:
    """Whether Linux says so of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "GenuineIntel" in cpuinfo.read_text()
