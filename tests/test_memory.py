"""training.micro_batch_size=auto: the largest that fits, by what a step was seen to take, and kept by the run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks.ours import Shape, our_step
from config import BadInput, Config
from hardware import Hardware
from model.gpt import GPT
from tracking.run_directory import read_config, read_summary
from training.memory import build, largest_micro_batch_size, needed, sizes_of_matrices

CPU = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
MODEL = {"family": "gpt2", "n_layers": 4, "d_model": 256, "n_heads": 4, "context_length": 256}


def config(**words: object) -> Config:
    return Config.model_validate({"model": MODEL, "regularizers": {"residual_dropout": 0.1}} | words)


def test_it_is_what_a_step_takes(tmp_path: Path) -> None:
    """24 sequences more: the most memory that torch's profiler saw in tensors during a step."""

    def held(size: int) -> int:
        step = our_step(Shape(4, 256, 4, 256, size, 512), "fp32", {"residual_dropout": 0.1}, "off")
        tokens_BT = torch.zeros(size, 256, dtype=torch.long)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step(tokens_BT, tokens_BT)
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
        return max(accumulate(change for _, change in changes))

    expected = needed(config(), CPU, 512, 32) - needed(config(), CPU, 512, 8)
    assert held(32) - held(8) == pytest.approx(expected, rel=0.2)


def test_weights_by_hand() -> None:
    """Without blocks to speak of: 5 times the weights in fp32, a quarter of that where four processes share them."""
    sizes = {"n_layers": 1, "d_model": 2, "n_heads": 1, "d_ff": 1, "context_length": 2, "family": "gpt2"}
    large = needed(config(model=sizes), CPU, 10**6, 1)
    assert large == pytest.approx(5 * 4 * 2 * 10**6, rel=0.01)
    parts = Hardware(0, 4, torch.device("cpu"), "fp32", False, 1, parts=4)
    assert needed(config(model=sizes), parts, 10**6, 1) == pytest.approx(large / 4, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "knobs"),
    [
        ({"d_model": 100_000, "n_layers": 2}, "model.d_model=100000 or model.n_layers=2"),
        ({"d_model": 64, "n_layers": 1}, "model.d_model=64 or the vocabulary of 1,000,000,000"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_there(sizes: dict[str, int], knobs: str) -> None:
    large = config(model=MODEL | sizes)
    with pytest.raises(BadInput, match=rf"needs [\d,]+ GB with gradients .* GB of cpu; lower {knobs}"):
        build(large, CPU, 10**9 if sizes["n_layers"] == 1 else 257, 100)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_nearly_all_parameters_are_in_matrices(family: str, tied: bool) -> None:
    sizes = {"family": family, "n_layers": 3, "d_model": 192, "n_heads": 6, "n_kv_heads": 2, "tie_embeddings": tied}
    model = Config.model_validate({"model": sizes if family != "gpt2" else sizes | {"n_kv_heads": None}}).model
    assert sum(sizes_of_matrices(model, 1000)) == pytest.approx(GPT(model, 1000).count_parameters(), rel=0.01)


def test_what_a_run_takes_is_told_before_it_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: V·D + T·D of embeddings, 12·D² + 13·D a block, 2·D of the last norm; five times their bytes in fp32."""
    small = config(model={"family": "gpt2", "n_layers": 2, "d_model": 8, "n_heads": 2, "context_length": 16})
    model = build(small, CPU, 300, 10)
    parameters = 300 * 8 + 16 * 8 + 2 * (12 * 64 + 13 * 8) + 2 * 8
    said = capsys.readouterr().out
    assert model.count_parameters() == parameters
    assert said.startswith(f"model      gpt2, {parameters:,} parameters: {20 * parameters / 1e9:.2f} GB with gradients")
    assert "minutes" not in said
    # 6 operations a parameter and token: 10^11 steps of 12 x 16 tokens take 10^4 hours and more at 10^11 a second.
    build(small, CPU, 300, 10**10)
    hours = int(capsys.readouterr().out.split("roughly ")[1].split(" minutes")[0].replace(",", "")) / 60
    assert hours > 6 * parameters * 10**10 * small.tokens_per_step / 1e11 / 3600


def test_the_largest_that_fits_and_that_the_processes_can_share(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(training={"global_batch_size": 24, "micro_batch_size": "auto"})
    three = Hardware(0, 3, torch.device("cpu"), "fp32", False, 1)
    sizes = [1, 2, 4, 8]  # of which 24 sequences on three processes are made
    needs = {size: needed(wanted, three, 512, size) for size in sizes}
    assert sorted(needs.values()) == list(needs.values())
    for size in sizes:
        monkeypatch.setattr("training.memory.memory_of", lambda _, size=size: needs[size] / 0.8 + 1)
        assert largest_micro_batch_size(wanted, three, 512) == size
    monkeypatch.setattr("training.memory.memory_of", lambda _: 0)
    assert largest_micro_batch_size(wanted, three, 512) == 1
    mixed = config(training=wanted.training.model_dump(), regularizers={"mixup_alpha": 0.2})
    assert largest_micro_batch_size(mixed, three, 512) == 2  # it mixes pairs


def test_a_run_keeps_what_it_began_with(
    tiny: Callable[..., list[str]],
    train: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that this machine has room for; and half of it when the run began where there was less."""
    auto = {"training__micro_batch_size": "auto", "training__max_steps": 2, "evaluation__every": 1}
    ended = train(tiny(run__name="large", **auto))
    assert ended.returncode == 0 and "micro-batch 8 sequences at once" in ended.stdout, ended.stderr
    assert read_config(tmp_path / "runs/large").training.micro_batch_size == 8

    model = read_config(tmp_path / "runs/large")
    half = needed(model, CPU, 257, 4) / 0.8 + 1
    with monkeypatch.context() as little:
        little.setattr("training.memory.memory_of", lambda _: half)
        little.setenv("WELLPOSED_FAULT", "weights:0:2:raise")
        assert train(tiny(**auto)).returncode != 0
    ended = train(tiny(**auto))
    assert ended.returncode == 0 and "goes on from step 1" in ended.stdout, ended.stderr
    assert "micro-batch" not in ended.stdout and "bits may differ" not in ended.stderr
    assert read_config(tmp_path / "runs/tiny").training.micro_batch_size == 4
    assert read_summary(tmp_path / "runs/tiny")["status"] == "finished"
