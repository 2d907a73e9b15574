"""How ``auto`` is resolved: from config and machine alone. What several processes share is tested in faults/."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_step import ready
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ours import everything_on
from command_line import parse
from config import BadInput, Config, Run
from data.loader import EvaluationBatches
from data.shards import Corpus
from evaluation.evaluate import evaluate
from hardware import (
    Hardware,
    device_metrics,
    estimated_seconds,
    missing_for_compile,
    moved,
    operations_per_token,
    peak_operations,
    resolve,
    resolve_compile,
    set_up_torch,
    settle_determinism,
    worth_compiling,
)
from program import cores
from training.processes import check_micro_batches
from training.step import training_step

TWO_CORES = Hardware(0, 1, torch.device("cpu"), "fp32", False, 2)
SIZE = {"n_layers": 4, "d_model": 128, "n_heads": 4, "context_length": 64}


def small(compile: str = "auto") -> Config:
    return Config.model_validate(
        {"model": SIZE, "training": {"global_batch_size": 12, "max_steps": 9}, "run": {"compile": compile}}
    )


def test_the_estimate_of_a_run_is_that_worked_by_hand() -> None:
    """768 tokens x (6 x 800,000 + 12 x 4 x 128 x 64) = 3.988e9 operations: 19.94 ms, and 4 for the layers."""
    assert estimated_seconds(TWO_CORES, small(), 800_000, 1000) == pytest.approx(23.94, abs=0.01)
    # Two processes of two threads, one of two micro-batches each: 9.97 ms, and 4 for the layers.
    halves = small().model_copy(update={"training": small().training.model_copy(update={"micro_batch_size": 6})})
    assert estimated_seconds(replace(TWO_CORES, world=2), halves, 800_000, 1000) == pytest.approx(13.97, abs=0.01)


@pytest.mark.parametrize(("name", "tera"), [
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A10", 125),
    ("Tesla V100-SXM2-16GB", 125),
    ("Tesla T4", 65),
    ("NVIDIA L4", 121),
    ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA L40S", None),
    ("NVIDIA A10G", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("cpu", None),
])  # fmt: skip
def test_the_peak_of_a_device(name: str, tera: float | None) -> None:
    assert peak_operations(name) == (None if tera is None else tera * 1e12)


def test_what_is_logged_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 124M needs 6 x 124e6 + 12 x 12 x 768 x 1024 = 0.857e9 operations a token: a million of them 43% of two."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 40 * 10**9)
    operations = operations_per_token(124_000_000, 12, 768, 1024)
    on_two = replace(TWO_CORES, device=torch.device("cuda"), world=2)
    found = device_metrics(on_two, 1e6, operations)
    assert found == {"train/memory_gb": 40.0, "train/mfu": pytest.approx(0.4334, abs=1e-4)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "of next year")
    assert device_metrics(on_two, 1e6, operations) == {"train/memory_gb": 40.0}
    assert device_metrics(TWO_CORES, 1e6, operations) == {}


@pytest.mark.parametrize(("wanted", "steps", "stored", "expected"), [
    ("auto", 25_000, {}, False),  # 9 min 58 s
    ("auto", 25_100, {}, True),
    ("on", 1, {}, True),
    ("off", 10**6, {}, False),
    ("auto", 10**6, {"device": "cpu", "processes": 1, "compile": False}, False),
    ("auto", 1, {"device": "cpu", "processes": 1, "compile": True}, True),
    ("auto", 1, {"device": "cuda", "processes": 1, "compile": True}, False),
])  # fmt: skip
def test_compiling_is_decided_by_the_length_of_the_run(wanted: str, steps: int, stored: dict, expected: bool) -> None:
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    assert resolve_compile(TWO_CORES, small(wanted), stored, 800_000, steps) == replace(TWO_CORES, compile=expected)


def test_many_runs_that_share_what_is_compiled_are_worth_it_together() -> None:
    assert [worth_compiling(60, runs) for runs in (1, 9, 10)] == [False, False, True]
    assert [worth_compiling(seconds, 1000) for seconds in (1, 59, 60)] == [False, False, True]
    assert [worth_compiling(seconds) for seconds in (599, 600)] == [False, True]


def test_without_a_compiler_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not resolve_compile(TWO_CORES, small(), {}, 800_000, 10**6).compile
    with pytest.raises(BadInput, match=r"run.compile=on needs a C\+\+ compiler; .* run.compile=off"):
        resolve_compile(TWO_CORES, small("on"), {}, 800_000, 1)


def test_a_gpu_needs_a_c_compiler_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Triton compiles what starts a kernel with $CC, gcc or clang, whichever there is, and never with $CXX."""
    gpu = replace(TWO_CORES, device=torch.device("cuda"))
    monkeypatch.setattr("hardware.shutil.which", lambda name: {"clang": "/usr/bin/clang"}.get(name))
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **how: None)
    monkeypatch.delenv("CC", raising=False)
    if missing_for_compile("cuda") != "Python's C headers":
        assert resolve_compile(gpu, small(), {}, 800_000, 1).compile
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not resolve_compile(gpu, small(), {}, 800_000, 1).compile
    assert "lacks a C compiler" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"run.compile=on needs a C compiler; .* run.compile=off"):
        resolve_compile(gpu, small("on"), {}, 800_000, 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity") or cores() < 2, reason="needs two cores that can be chosen")
@pytest.mark.parametrize(("bind", "expected"), [
    ("{min(os.sched_getaffinity(0))}", True),  # srun binds each process to cores of its own
    ("os.sched_getaffinity(0)", False),  # torchrun leaves all of its processes all cores
])  # fmt: skip
def test_a_process_knows_whether_its_cores_are_its_own(bind: str, expected: bool) -> None:
    code = f"import os; from program import has_own_cores; os.sched_setaffinity(0, {bind}); print(has_own_cores())"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout == f"{expected}\n", asked.stderr


@pytest.mark.parametrize(("own", "threads"), [(True, 8), (False, 2)])
def test_cores_are_divided_once(own: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardware.cores", lambda: 8)
    monkeypatch.setattr("hardware.has_own_cores", lambda: own)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert resolve(Run(device="cpu")).threads == threads


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "intel", "expected"),
    [
        (True, True, True, "bf16"),
        (False, True, True, "fp32"),  # its AVX512-BF16 gains nothing
        (False, True, False, "bf16"),
        (False, False, False, "fp32"),
    ],
)
def test_a_cpu_takes_bf16_where_it_is_faster(
    amx: bool, avx512_bf16: bool, intel: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr("hardware.is_intel", lambda: intel)
    assert resolve(Run(device="cpu")).precision == expected


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_without_bf16_takes_fp16(bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr("hardware.set_up_torch", lambda *_: None)
    hardware = resolve(Run(device="cuda"))
    assert (hardware.precision, hardware.dtype) == (expected, {"bf16": torch.bfloat16, "fp16": torch.float16}[expected])
    assert resolve(Run(device="cuda"), {"precision": "fp32"}).precision == "fp32"  # what a run began with


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16, 32, 64])
def test_gpt2_small_is_shared_out_evenly(gpus: int) -> None:
    config = parse(["configs/gpt2_small.yaml"])
    assert config.tokens_per_step == 2**19
    check_micro_batches(config, gpus)


def test_a_gpu_fetches_what_lies_still_and_is_not_waited_for() -> None:
    class Value:
        def pin_memory(self) -> Value:
            return Pinned()

        def to(self, device: torch.device, non_blocking: bool = False) -> tuple[str, bool]:
            return type(self).__name__, non_blocking

    class Pinned(Value):
        pass

    assert moved(Value(), torch.device("cuda")) == ("Pinned", True)  # type: ignore[arg-type, comparison-overlap]
    assert moved(Value(), torch.device("mps")) == ("Value", False)  # type: ignore[arg-type, comparison-overlap]


def test_blocks_are_compiled_on_gpus_and_in_parts() -> None:
    whole, gpu = replace(TWO_CORES, compile=True), replace(TWO_CORES, compile=True, device=torch.device("cuda"))
    assert not whole.compiles_blocks and gpu.compiles_blocks and replace(whole, parts=2).compiles_blocks
    assert not replace(gpu, compile=False).compiles_blocks
    assert gpu.saves_in_background and not whole.saves_in_background


def test_the_compiler_is_not_imported_where_nothing_is_compiled() -> None:
    """It takes a second or two of every start."""
    code = "from hardware import resolve; from config import Run; import sys; resolve(Run())"
    code += "; print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout.strip() == "[]", asked.stderr + asked.stdout


# ---------------------------------------------------------------------------------------------- determinism on a GPU


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[Any, ...]]]:
    """What torch, cuBLAS and NCCL are told; as it was before, after the test."""
    variables = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_NVLS_ENABLE", "NCCL_ALGO")
    for name in variables:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    mode, compiled = torch.get_deterministic_debug_mode(), torch._inductor.config.deterministic
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield lambda: (
        torch.get_deterministic_debug_mode(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        *map(os.environ.get, variables[:2]),
    )
    torch.set_deterministic_debug_mode(mode)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch._inductor.config.deterministic = compiled


def test_a_gpu_is_deterministic_unless_it_may_be_fast(settings: Callable[[], Any], monkeypatch: Any) -> None:
    """2: an error for what has no deterministic form. 1: a warning, with which attention would not be deterministic."""
    settle_determinism("cpu", fast=True)
    assert settings() == (1, True, None, None)
    settle_determinism("cuda", fast=True)
    assert settings() == (0, False, None, None)
    settle_determinism("cuda")
    assert settings() == (2, False, ":4096:8", "0")
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    settle_determinism("cuda")
    assert settings() == (2, False, ":4096:8", None)


@pytest.mark.parametrize(("kind", "wanted", "expected"), [
    ("cuda", "ordinary", (2, True)), ("cuda", "strict", (2, True)), ("cuda", "fast", (0, False)),
    ("cpu", "ordinary", (1, True)), ("cpu", "fast", (1, True)),
])  # fmt: skip
def test_compiled_code_is_as_deterministic(
    settings: Callable[[], Any], monkeypatch: Any, kind: str, wanted: str, expected: tuple[int, bool]
) -> None:
    monkeypatch.setattr("hardware.missing_for_compile", lambda *_: None)
    settle_determinism(kind, fast=wanted == "fast")
    torch._inductor.config.deterministic = False
    config = small("on").model_copy(
        update={"training": small().training.model_copy(update={"deterministic": wanted, "max_steps": 1})}
    )
    hardware = replace(TWO_CORES, device=torch.device(kind))
    assert resolve_compile(hardware, config, {}, 800_000, 1).compile
    assert (torch.get_deterministic_debug_mode(), torch._inductor.config.deterministic) == expected


def test_the_tf32_setting_of_a_gpu_can_be_read(settings: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's own compiler does when it looks for the fastest kernel."""
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.get_float32_matmul_precision()
    set_up_torch(replace(TWO_CORES, device=torch.device("cuda", 0), threads=torch.get_num_threads()))
    try:
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def refused() -> set[str]:
    """Operations that torch refuses on a GPU where all must be deterministic, as far as they could be met here."""
    told = str(torch.use_deterministic_algorithms.__doc__).split("operations will throw a")[1].split("In addition")[0]
    names = set(re.findall(r":func:`torch\.(?:Tensor\.)?(\w+)`", told))
    return names - {"interpolate"} | {"nll_loss2d_forward", "_embedding_bag", "reflection_pad1d_backward"}


class Operations(TorchDispatchMode):
    """The names of all operations of torch that are called, with the type of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, Any]] = set()

    def __torch_dispatch__(self, called: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = called(*arguments, **(options or {}))
        self.seen.add((called.__name__.split(".")[0], getattr(found, "dtype", None)))
        return found


def test_steps_and_evaluation_do_nothing_that_a_gpu_refuses(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """With every regularizer on; the only cumulative sum of fractions, of the offsets' probabilities, is a CPU's."""
    knobs = everything_on(weight_decay_schedule="linear", target_offset=3)
    learner, batches = ready(tiny(**{f"regularizers__{name}": value for name, value in knobs.items()}), tmp_path)
    (manifest,) = tmp_path.glob("*/manifest.json")
    val = EvaluationBatches(Corpus.open(manifest.parent).split("val"), 32, 8)
    with Operations() as operations:
        training_step(learner, batches, 0)
        evaluate(learner.model, val, learner.hardware, 1.0)
    names = {name for name, kind in operations.seen if (name, kind) != ("cumsum", torch.float64)}
    assert {"scatter_add_", "embedding_dense_backward"} <= names  # what a GPU has a deterministic form for
    assert not names & refused(), names & refused()
    assert {"cumsum", "histc", "bincount", "median", "put_"} <= refused()
