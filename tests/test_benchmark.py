"""The benchmark's arithmetic, by hand; what it measures is no test's business."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from benchmarks.losses import cross_entropy, ours, plain
from benchmarks.opponents import Block, PlainGPT2, Shape, hugging_face
from benchmarks.ours import everything_on, our_step
from benchmarks.processes import launches, table
from benchmarks.steps import table as table_of_steps
from benchmarks.timing import in_turn, ratio, spread
from command_line import parse
from data.loader import TrainingLoader
from data.shards import Corpus
from tracking.metrics import read_metrics
from tracking.run_directory import read_summary


def test_spread_and_ratio() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    assert ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == (3.0, 2.5, 3.5)  # 2, 3, 4: round by round


def test_works_take_turns() -> None:
    done: list[str] = []
    seconds = in_turn({name: lambda name=name: done.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert done == ["a", "b"] * 3
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_processes_share_the_same_cores() -> None:
    for cores in (1, 2, 8):
        used = {processes * threads for processes, threads, _ in list(launches(cores).values())[:-1]}
        assert used == {max(2, cores)}


def test_the_table_of_processes() -> None:
    steps = {"1 process": [10.0, 20.0], "2 processes": [5.0, 30.0]}  # ratios 0.5 and 1.5
    timed = {"step_ms": steps, "checkpoint_ms": [30.0, 30.0]}
    one, two, checkpoint, _, whole, parts = table({"small": timed, "held": {1: 400e6, 4: 100e6}})[1:]
    assert whole.split()[0] == "1.00" and parts.split() == ["0.25", "in", "4", "parts", "100.0", "MB"]
    assert one.split()[:3] == ["1.00", "1", "process"]
    assert two.split() == ["1.00", "2", "processes", "17.5", "ms", "a", "step", "(11.2", "to", "23.8)"]
    assert checkpoint.split()[0] == "2.00"


def test_the_table_of_steps_says_who_is_left_out() -> None:
    names = ["ours fp32, nothing on", "ours fp32, dropout 0.2", "plain GPT-2 fp32, dropout 0"]
    seconds = {name: [1.0] for name in [*names, "plain GPT-2 fp32, dropout 0.2"]}
    products = {"fp32": [1.0], "bf16": [1.0]}
    shape = {"first": {}, "memory": {}, "tokens": 1, "flops": 1.0, "products": products}
    without = table_of_steps({"small": {"seconds": seconds, **shape}})
    (line,) = [line for line in without if "left out" in line]
    assert "Hugging Face's GPT-2" in line and "'.[bench]'" in line
    seconds["Hugging Face fp32, dropout 0.2"] = [1.0]
    assert "left out" not in "".join(table_of_steps({"small": {"seconds": seconds, **shape}}))


def test_an_unknown_part_is_told() -> None:
    command = [sys.executable, "-m", "scripts.benchmark", "proceses"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert (
        ended.stderr
        == "error: no part is called proceses; there are steps, losses, pipeline, processes, precision, race\n"
    )


def test_the_plain_gpt2_is_the_gpt2_of_hugging_face() -> None:
    """With its weights, and a GELU without the approximation, it has the same loss; dropout acts in training alone."""
    shape = Shape(2, 32, 4, 16, 3, 65)
    plain_model = PlainGPT2(shape, dropout=0.2).eval()
    loss_of, theirs = hugging_face(shape, 0.0, torch.device("cpu"))
    tables = {"wte": plain_model.embedding, "wpe": plain_model.positions, "ln_f": plain_model.norm}
    weights = {f"{name}.weight": module.weight for name, module in tables.items()}
    for number, block in enumerate(plain_model.blocks):
        assert isinstance(block, Block)
        (norm_1, heads), (norm_2, widen, _) = block.to_heads, block.widen
        norms = {"ln_1": norm_1.weight, "ln_2": norm_2.weight}
        products = {
            "attn.c_attn": heads,
            "attn.c_proj": block.from_heads,
            "mlp.c_fc": widen,
            "mlp.c_proj": block.narrow,
        }
        norms |= {name: matrix.weight.T for name, matrix in products.items()}
        weights |= {f"h.{number}.{name}.weight": weight for name, weight in norms.items()}
    transformer: Any = theirs.transformer
    left = transformer.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys and all(name.endswith("bias") for name in left.missing_keys)  # theirs begin at 0
    for block in transformer.h:
        block.mlp.act = torch.nn.GELU()
    tokens_BT, targets_BT = torch.randint(65, (2, 3, 16), generator=torch.Generator().manual_seed(0))
    expected = loss_of(tokens_BT, targets_BT)
    torch.testing.assert_close(plain_model(tokens_BT, targets_BT), expected)
    assert abs(plain_model.train()(tokens_BT, targets_BT) - expected) > 1e-4


def test_the_step_that_is_timed_is_that_of_train_py(
    train: Callable[..., Any], tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """With everything on: the same objective at each step, to the last bit."""
    knobs = everything_on()
    words = {f"regularizers__{name}": value for name, value in knobs.items()}
    words |= {
        "schedule__name": "constant",
        "schedule__warmup_steps": 0,
        "tracking__log_every": 1,
        "run__threads": "auto",
    }
    assert train(tiny(model__family="gpt2", training__max_steps=4, **words)).returncode == 0
    run = tmp_path / "runs/tiny"
    config = parse([str(run / "config.yaml")])
    corpus = Corpus.open(tmp_path / read_summary(run)["corpus_directory"])
    loader = TrainingLoader(corpus.split("train"), config.data, 0, 32, 8)
    step = our_step(Shape(2, 32, 2, 32, 8, corpus.vocab_size), "fp32", knobs, family="gpt2")
    batches = [loader.batch(number) for number in range(4)]
    objectives = [step(batch.tokens_BT, batch.targets_BT) for batch in batches]
    assert objectives == [record["train/objective"] for record in read_metrics(run)]


def test_the_forms_of_the_objective_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.losses.VOCABULARY", 11)
    monkeypatch.setattr("benchmarks.losses.TOKENS", 6)
    generator = torch.Generator().manual_seed(1)
    hidden_ND, weight_VD = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) for rows in (6, 11))
    targets_N = torch.tensor([0, 3, 10, 5, 5, 2])
    mine, theirs = ours(hidden_ND, weight_VD, targets_N), plain(hidden_ND, weight_VD, targets_N)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    assert abs(mine - cross_entropy(hidden_ND, weight_VD, targets_N)) > 0.01
