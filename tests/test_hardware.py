"""How ``auto`` is resolved: from config and machine alone. What several processes share is tested in faults/."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from config import BadInput, Config
from hardware import (
    Hardware,
    device_metrics,
    estimated_seconds,
    missing_for_compile,
    operations_per_token,
    peak_operations,
    resolve_compile,
    worth_compiling,
)

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


def test_the_compiler_is_not_imported_where_nothing_is_compiled() -> None:
    """It takes a second of every start; torch.optim imports it, what evaluates and generates has no use for it."""
    code = "from hardware import resolve; from config import Run; import sys; resolve(Run())"
    code += "; print([name for name in sys.modules if name.startswith(('torch._dynamo', 'torch._inductor'))])"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert asked.stdout.strip() == "[]", asked.stderr + asked.stdout
