"""What only a GPU can show: ``make gpu-check``. WELLPOSED_GPU_CHECK=cpu tries these tests themselves without one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BREAKABLE, ROOT, flags_of
from torch.profiler import ProfilerActivity, profile

from benchmarks.opponents import Shape
from benchmarks.ours import everything_on, our_step
from config import Config, Model
from files import sha256
from hardware import Hardware, operations_per_token
from model.gpt import GPT
from tracking.metrics import read_metrics
from training.checkpoint import existing
from training.memory import needed

ASKED = os.environ.get("WELLPOSED_GPU_CHECK")
DEVICE = "cpu" if ASKED == "cpu" else "cuda" if torch.cuda.is_available() else "mps"
THERE = DEVICE != "mps" or torch.backends.mps.is_available()
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 2 if DEVICE == "cpu" else 1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not ASKED or not THERE, reason="there is no GPU here; on a machine with one: make gpu-check"),
]

Flags = Callable[..., list[str]]
DOCUMENTS = {"data__isolate_documents": "true"}
COMPILED = {"run__compile": "on"}
EVERYTHING = {f"regularizers__{name}": value for name, value in everything_on(mixup_alpha=0.2).items()}


def bits(run: Path) -> dict[str, str]:
    """The hash of each tensor file of the last checkpoint."""
    return {file.name: sha256(file) for file in existing(run / "checkpoints")[0].glob("*.safetensors")}


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        DOCUMENTS | {"model__context_length": 64},  # where cuDNN's attention would give NaN
        DOCUMENTS | {"regularizers__attention_dropout": 0.1},
        {"model__family": "gpt2", "optimizer__name": "muon"},
        EVERYTHING,
        {"run__precision": "fp16"},
        COMPILED,
        COMPILED | DOCUMENTS,
        COMPILED | EVERYTHING,
    ],
    ids=lambda knobs: "-".join(name.split("__")[1] for name in knobs)[:60] or "plain",
)
def test_a_run_repeats_its_bits(knobs: dict[str, Any], tiny: Flags, train: Callable[..., Any], tmp_path: Path) -> None:
    if "run__compile" in knobs and DEVICE == "mps":
        pytest.skip("nothing is compiled for MPS")
    device = {"run__device": DEVICE, "run__precision": "fp32" if DEVICE == "cpu" else "bf16", "run__compile": "off"}
    for name in ("once", "again"):
        ended = train(tiny(run__name=name, training__max_steps=20, **device | knobs))
        assert ended.returncode == 0, ended.stderr
    once, again = tmp_path / "runs/once", tmp_path / "runs/again"
    assert bits(once) == bits(again)
    losses = [record["train/objective"] for record in read_metrics(once) if "train/objective" in record]
    assert losses[-1] < losses[0]  # false for NaN, too


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_bit_for_bit(processes: int, text_file: Path, tmp_path: Path) -> None:
    if processes > GPUS:
        pytest.skip(f"needs {processes} GPUs, there is {GPUS}")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)

    def start(name: str, fault: str = "") -> subprocess.CompletedProcess[str]:
        flags = flags_of(BREAKABLE, text_file, tmp_path, run__name=name, run__device=DEVICE, run__precision="auto")
        command = [sys.executable, *launcher, str(ROOT / "train.py"), *flags]
        environment = os.environ | {"WELLPOSED_FAULT": fault}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    whole = start("whole")
    assert whole.returncode == 0, whole.stderr
    assert start("killed", "save-begin:0:16:kill").returncode != 0
    resumed = start("killed")
    assert resumed.returncode == 0 and "goes on from step 12" in resumed.stdout, resumed.stderr
    assert bits(tmp_path / "runs/whole") == bits(tmp_path / "runs/killed")


@pytest.mark.skipif(DEVICE != "cuda", reason="flex_attention has a backward pass on CUDA only")
def test_blocks_of_documents_are_the_dense_mask_compiled() -> None:
    model = GPT(Model(context_length=512), 257).initialize(0).to(DEVICE)
    tokens = torch.randint(257, (4, 512), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    documents = (torch.arange(512, device=DEVICE) // 100).expand(4, 512)
    positions = (torch.arange(512, device=DEVICE) % 100).expand(4, 512)
    found = []
    for model.uses_blocks in (False, True):
        model.zero_grad()
        hidden = (torch.compile(model, dynamic=False) if model.uses_blocks else model)(tokens, positions, documents)
        hidden.square().mean().backward()
        found.append([hidden, model.embedding.weight.grad])
    for dense, blocks in zip(*found, strict=True):
        assert (dense - blocks).norm() < 0.01 * dense.norm()


@pytest.mark.skipif(DEVICE != "cuda", reason="what a step takes on a CPU is compared in tests/test_memory.py")
def test_the_memory_of_a_step_is_what_auto_reckons_with() -> None:
    """24 sequences more, in bf16 and not compiled."""

    def held(size: int) -> int:
        step = our_step(Shape(4, 256, 4, 256, size, 512), "bf16", {"residual_dropout": 0.1}, "off")
        tokens = torch.zeros(size, 256, dtype=torch.long, device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        step(tokens, tokens)
        return torch.cuda.max_memory_allocated()

    model = {"family": "gpt2", "n_layers": 4, "d_model": 256, "n_heads": 4, "context_length": 256}
    config = Config.model_validate({"model": model, "regularizers": {"residual_dropout": 0.1}})
    hardware = Hardware(0, 1, torch.device(DEVICE), "bf16", False, 1)
    expected = needed(config, hardware, 512, 32) - needed(config, hardware, 512, 8)
    assert held(32) - held(8) == pytest.approx(expected, rel=0.3)


def test_benchmark_with_a_profile(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Steps of GPT-2 124M in bf16: their speed, the kernels that take longest, and a trace for Perfetto."""
    large = DEVICE == "cuda"
    shape = Shape(12, 768, 12, 1024, 8, 50257) if large else Shape(2, 64, 2, 64, 4, 257)
    step = our_step(shape, "bf16" if large else "fp32", {}, "on" if large else "off")
    tokens = torch.randint(shape.vocab_size, (shape.batch, shape.context), device=DEVICE)
    for _ in range(5):
        step(tokens, tokens)
    begun = time.perf_counter()
    for _ in range(10):
        step(tokens, tokens)
    seconds = (time.perf_counter() - begun) / 10
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if large else [])]
    with profile(activities=kinds) as watched:
        for _ in range(3):
            step(tokens, tokens)
    trace = tmp_path_factory.mktemp("trace") / "steps.json"
    watched.export_chrome_trace(str(trace))
    name = torch.cuda.get_device_name() if large else DEVICE
    rate = tokens.numel() * operations_per_token(124_000_000, 12, 768, 1024) / seconds / 1e12
    print(f"\n{name}: {1000 * seconds:.1f} ms a step, {tokens.numel() / seconds:,.0f} tokens a second")
    print(f"{rate:.0f} TFLOP/s; trace: {trace}" if large else f"trace: {trace}")
    slowest = f"self_{'device' if large else 'cpu'}_time_total"
    print(watched.key_averages().table(sort_by=slowest, row_limit=15))
    assert trace.stat().st_size > 0
