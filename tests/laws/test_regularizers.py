"""Laws 1 to 3 over every knob of the regularizers section: a new knob is tested by the kind it declares.

1. Off is absent: bit for bit the code with its path taken out.
2. On acts, in training only: it changes what its kind says, never the evaluation of given weights.
3. Expectation is kept at its own site by each activation knob.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor

import train as program
from config import Model, Regularizers
from data.loader import evaluation_batches
from data.shards import Corpus
from model.gpt import GPT
from randomness import seed_for
from regularizers import activations, objective
from training.checkpoint import existing, read_tensors
from training.distributed import Hardware
from training.evaluation import evaluate
from training.tracking import read_metrics

FIELDS = Regularizers.model_fields
DECLARED: dict[str, dict[str, Any]] = {
    name: field.json_schema_extra for name, field in FIELDS.items() if isinstance(field.json_schema_extra, dict)
}
OFF = {name: knob["off"] for name, knob in DECLARED.items()}
KINDS = {"input", "activation", "objective", "weights", "average", "stopping", "modifier"}
# A modifier acts on other knobs, which must be on for it to be seen.
COMPANIONS: dict[str, dict[str, Any]] = {"decay_embeddings": {"weight_decay": 0.1}}


def of_kind(*kinds: str) -> list[str]:
    return [name for name, knob in DECLARED.items() if knob["kind"] in kinds]


def test_every_knob_declares_its_kind() -> None:
    assert set(DECLARED) == set(FIELDS), f"no kind: {set(FIELDS) - set(DECLARED)}"
    for name, knob in DECLARED.items():
        assert knob["kind"] in KINDS, name
        assert knob["typical"] != knob["off"], name
        Regularizers.model_validate({name: knob["off"]})
        Regularizers.model_validate({name: knob["typical"]})
    assert set(COMPANIONS) == set(of_kind("modifier"))


@dataclass
class Outcome:
    """What five steps of training left."""

    losses: list[float]
    objectives: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    directory: Path


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Outcome]:
    """Five steps of the real program with every regularizer off but those given."""
    home = tmp_path_factory.mktemp("laws")
    count = iter(range(1000))

    def run(**knobs: Any) -> Outcome:
        changes = TINY | {"data.path": str(text_file), "run.name": f"run{next(count)}", "tracking.log_every": "1"}
        changes |= {"training.max_steps": "5", "evaluation.every": "5", "evaluation.sample_tokens": "0"}
        changes |= {"training.micro_batch_size": "4", "evaluation.max_tokens": "300"}
        changes |= {f"regularizers.{name}": "null" if v is None else str(v) for name, v in (OFF | knobs).items()}
        before = os.getcwd()
        os.chdir(home)
        try:
            assert program.main([f"--{key}={value}" for key, value in changes.items()]) == 0
        finally:
            os.chdir(before)
        directory = home / "runs" / changes["run.name"]
        records = read_metrics(directory)
        columns = [[r[name] for r in records] for name in ("train/loss", "train/objective", "train/grad_norm")]
        return Outcome(*columns, read_tensors(existing(directory / "checkpoints")[0], "model"), directory)

    return run


@pytest.fixture(scope="module")
def all_off(five_steps: Callable[..., Outcome]) -> Outcome:
    return five_steps()


def same_bits(one: Outcome, other: Outcome) -> bool:
    numbers = (one.losses, one.objectives, one.norms) == (other.losses, other.objectives, other.norms)
    return numbers and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def without_objective_terms() -> Any:
    """The objective's module with every branch on a knob taken out of its source."""
    source = inspect.getsource(objective)
    for branch in ("if beta:", "if c:", "if spread:", "if z_sum_R1 is not None:"):
        assert branch in source
        source = source.replace(branch, "if False:")
    source = source.replace("w_R1 * (1 + 2 * c * log_z_R1) if c else w_R1", "w_R1")
    source = source.replace("z_RV.sum(1, keepdim=True) if spread else None", "None")
    source = source.replace("-(1 - smoothing - spread) * w_R1", "-w_R1")
    source = source.replace(
        "knobs = (config.label_smoothing, config.z_loss, config.entropy_penalty)", "knobs = (0, 0, 0)"
    )
    namespace: dict[str, Any] = {"__name__": "objective_without_terms"}
    exec(compile(source, "objective_without_terms", "exec"), namespace)
    return namespace["objective"]


def take_out(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Take the path of every regularizer of one kind out of the code."""
    if kind == "activation":
        patch.setattr(activations.Dropout, "forward", lambda self, x: x)
        patch.setattr(activations.Dropout, "rate", property(lambda self: 0.0))
    elif kind == "objective":
        patch.setattr(objective, "objective", without_objective_terms())
    elif kind in ("weights", "modifier"):
        # Adam has no decay at all.
        plain = torch.optim.Adam

        def adam(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
            return plain([{k: v for k, v in group.items() if k != "weight_decay"} for group in groups], **settings)

        patch.setattr(torch.optim, "AdamW", adam)
        patch.setattr("training.optimizer.describe_groups", lambda optimizers: [])
    else:
        raise AssertionError(f"law 1 does not know how to take out regularizers of the kind {kind!r}")


@pytest.mark.parametrize("kind", sorted({knob["kind"] for knob in DECLARED.values()}))
def test_off_is_absent(kind: str, five_steps: Callable[..., Outcome], all_off: Outcome) -> None:
    with pytest.MonkeyPatch.context() as patch:
        take_out(kind, patch)
        assert same_bits(five_steps(), all_off)


@pytest.mark.parametrize("name", list(DECLARED))
def test_on_acts_in_training_only(
    name: str, five_steps: Callable[..., Outcome], all_off: Outcome, text_file: Path
) -> None:
    knob, companions = DECLARED[name], COMPANIONS.get(name, {})
    base = five_steps(**companions) if companions else all_off
    on = five_steps(**companions, **{name: knob["typical"]})
    assert not same_bits(on, base), f"{name} changes nothing"
    kind = knob["kind"]
    if kind in ("activation", "input"):
        assert on.losses[0] != base.losses[0]
    elif kind == "objective":
        assert on.losses[0] == base.losses[0] and on.objectives[0] != base.objectives[0]
    elif kind in ("weights", "modifier"):
        assert on.losses[0] == base.losses[0] and on.losses[-1] != base.losses[-1]
    # The evaluation of given weights, by models with and without it, is the same to the last bit.
    corpus = Corpus.open(next((on.directory.parent.parent / "corpora").glob("[!.]*")))
    batches = evaluation_batches(corpus.split("val"), 32, 8, max_tokens=300)
    shape = Model(n_layers=2, d_model=32, n_heads=2, context_length=32)
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    results = []
    for values in (OFF, OFF | companions | {name: knob["typical"]}):
        model = GPT(shape, corpus.vocab_size, Regularizers.model_validate(values))
        model.load_state_dict(on.weights)
        results.append(evaluate(model.train(), batches, hardware, 1.0)[0])
        assert model.training
    assert results[0] == results[1]


@pytest.mark.parametrize("name", of_kind("activation"))
@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.5])
def test_expectation_is_kept(name: str, p: float) -> None:
    """At its own site the mean of what comes out is what went in, within 4 standard errors."""
    model = GPT(Model(n_layers=1, d_model=8, n_heads=2, context_length=8), 11, Regularizers.model_validate({name: p}))
    sites = [module for module in model.modules() if isinstance(module, activations.Dropout) and module.p > 0]
    assert sites
    torch.manual_seed(seed_for(0, name, round(100 * p)))
    for site in sites:
        draws = 400_000
        kept = site.train()(torch.ones(draws))
        q = (kept == 0).double().mean().item()
        rate = activations.mask_rate(p)[2]
        error = (rate * (1 - rate) / draws) ** 0.5
        assert abs(q - rate) < 4 * error and abs(rate - p) <= p / 50
        assert kept.max().item() == pytest.approx(1 / (1 - rate), rel=1e-6)
        assert kept.double().mean().item() == pytest.approx(1.0, abs=4 * error / (1 - rate))
        assert site.eval()(kept) is kept
