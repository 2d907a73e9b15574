"""Laws 1 to 3 over every knob of the regularizers section: a new knob is tested by the kind it declares.

1. Off is absent: bit for bit the code with its path taken out.
2. On acts, in training only: it changes what its kind says, never the evaluation of given weights.
3. Expectation is kept at its own site by each activation knob.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import same_bits as same_bits_runs
import test_regularized_run
import test_replay
import torch
from conftest import TINY
from torch import Tensor

import train as program
import training.optimizer
from config import Model, Regularizers
from data.loader import EvaluationBatches
from data.shards import Corpus
from evaluation.evaluate import evaluate
from hardware import Hardware
from model import gpt
from model.gpt import AUXILIARY, GPT
from randomness import seed_for
from regularizers import activations, averaging, inputs, objective
from tracking import run
from tracking.metrics import read_metrics
from training import learner, progress, step
from training.checkpoint import existing, read_tensors

FIELDS = Regularizers.model_fields
DECLARED: dict[str, dict[str, Any]] = {
    name: field.json_schema_extra for name, field in FIELDS.items() if isinstance(field.json_schema_extra, dict)
}
OFF = {name: knob["off"] for name, knob in DECLARED.items()}
KINDS = {"input", "activation", "objective", "weights", "average", "stopping", "modifier"}
# A modifier acts on other knobs, which must be on for it to be seen.
COMPANIONS: dict[str, dict[str, Any]] = {
    "masked_input_rate": {"masked_input_weight": 0.4},
    "weight_decay_schedule": {"weight_decay": 0.1},
    "weight_decay_end": {"weight_decay": 0.1, "weight_decay_schedule": "linear"},
    "cautious_weight_decay": {"weight_decay": 0.1},
    "dropout_from": {"residual_dropout": 0.1, "token_dropout": 0.1, "stochastic_depth": 0.1},
    "dropout_until": {"attention_dropout": 0.1, "token_dropout": 0.1, "stochastic_depth": 0.1},
    "distillation_temperature": {"distillation_weight": 0.5},
    "decay_embeddings": {"weight_decay": 0.1},
    "swa_every": {"swa_start": 0.0},
    "early_stopping_min_delta": {"early_stopping_patience": 1},
}
# Modifiers that are read in the middle of what they modify, where only their off value can take them out.
READ_INSIDE = (
    "masked_input_rate",
    "distillation_temperature",
    "decay_embeddings",
    "swa_every",
    "early_stopping_min_delta",
)
# Typical values that would act too late to be seen within five steps.
WITHIN_FIVE_STEPS = {"swa_every": 2, "swa_start": 0.4, "early_stopping_patience": 1, "early_stopping_min_delta": 9.0}
# Inputs whose expectation changes, and with it what is to be learnt.
CHANGE_THE_TASK = ("token_replacement", "mixup_alpha", "reversed_fraction", "target_offset")
# With these five evaluations, one a step, none counts as an improvement after the first.
NEVER_BETTER = {"early_stopping_min_delta": 9.0}


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
    average: dict[str, Tensor]
    directory: Path


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory: pytest.TempPathFactory, text_file: Path, whole_run: Path) -> Callable[..., Outcome]:
    """Five steps of the real program with every regularizer off but those given; distillation is from ``whole_run``."""
    home = tmp_path_factory.mktemp("laws")
    count = iter(range(1000))

    def run(**knobs: Any) -> Outcome:
        changes = TINY | {"data.path": str(text_file), "run.name": f"run{next(count)}", "tracking.log_every": "1"}
        changes |= {"training.max_steps": "5", "evaluation.every": "1", "evaluation.sample_tokens": "0"}
        changes |= {"training.micro_batch_size": "4", "evaluation.max_tokens": "300"}
        changes |= {f"regularizers.{name}": "null" if v is None else str(v) for name, v in (OFF | knobs).items()}
        if knobs.get("distillation_weight"):
            changes["run.teachers"] = f"[{whole_run}]"
        before = os.getcwd()
        os.chdir(home)
        try:
            assert program.main([f"--{key}={value}" for key, value in changes.items()]) == 0
        finally:
            os.chdir(before)
        directory = home / "runs" / changes["run.name"]
        records = read_metrics(directory)
        columns = [[r[name] for r in records] for name in ("train/loss", "train/objective", "train/grad_norm")]
        last = existing(directory / "checkpoints")[0]
        average = read_tensors(last, "average") if (last / "average.safetensors").exists() else {}
        return Outcome(*columns, read_tensors(last, "model"), average, directory)

    return run


@pytest.fixture(scope="module")
def all_off(five_steps: Callable[..., Outcome]) -> Outcome:
    return five_steps()


def same_bits(one: Outcome, other: Outcome) -> bool:
    numbers = (one.losses, one.objectives, one.norms) == (other.losses, other.objectives, other.norms)
    return numbers and same_tensors(one.weights, other.weights) and same_tensors(one.average, other.average)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_objective_terms() -> Any:
    """The objective's module with every branch on a knob taken out of its source."""
    source = inspect.getsource(objective)
    second_targets = "if self.second_N1 is not None and self.share_N1 is not None:"
    conditions = ("if config.label_smoothing:", "if config.z_loss:", "if config.entropy_penalty:")
    inside = ("if smoothing:", "if entropy:", 'if "others" in factors:', 'if "entropy" in factors:')
    distilled = ("if taught:", "if teachers:", "if divergence_R1 is not None:", "if difference_RP is not None:")
    branches = (*conditions, *inside, *distilled, second_targets, "if mixed is not None:")
    changes = dict.fromkeys(branches, "if False:")
    changes |= {
        "x_RP.exp() if entropy else x_RP.exp_()": "x_RP.exp_()",
        "kept * weight_R1": "weight_R1",
        'kept * factors["on_target"]': "weight_R1",
    }
    for before, after in changes.items():
        assert before in source, before
        source = source.replace(before, after)
    module = ModuleType("objective_without_terms")
    sys.modules[module.__name__] = module  # where dataclasses look for it
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module.objective


class Replacements:
    """Replaces names where the code looks them up, and counts the calls of each replacement."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.calls: dict[str, int] = {}

    def put(self, where: Any, name: str, replacement: Callable[..., Any]) -> None:
        """``where.name`` becomes the replacement; a property stays one."""
        shown = f"{getattr(where, '__name__', where)}.{name}"
        self.calls[shown] = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls[shown] += 1
            return replacement(*arguments, **options)

        is_property = isinstance(inspect.getattr_static(where, name), property)
        self.patch.setattr(where, name, property(counted) if is_property else counted)


def take_out(kind: str, code: Replacements) -> None:
    """Take the path of every regularizer of one kind out of the code, where it is used."""
    if kind == "activation":
        code.put(activations.Dropout, "forward", lambda self, x: x)
        code.put(activations.Dropout, "rate", lambda self: 0.0)
        code.put(activations.StochasticDepth, "forward", lambda self, x: x)
    elif kind == "input":
        code.put(gpt, "auxiliary_parameters", lambda *rest: torch.nn.ParameterDict())
        code.put(step, "draw_readings", lambda *rest: None)
        code.put(step, "replace_tokens", lambda tokens, *rest: tokens)
        code.put(step, "draw_changes", lambda *rest: None)
    elif kind == "objective":
        code.put(gpt, "auxiliary_parameters", lambda *rest: torch.nn.ParameterDict())
        code.put(step, "objective", without_objective_terms())
        code.put(step, "multi_token_terms", lambda *rest: {})
        code.put(step, "mask_inputs", lambda *rest: None)
        code.put(step, "predictions", lambda *rest: [])
    elif kind == "weights":
        plain = torch.optim.Adam  # has no decay at all

        def adam(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
            return plain([{k: v for k, v in group.items() if k != "weight_decay"} for group in groups], **settings)

        code.put(training.optimizer, "AdamW", adam)
        code.put(learner, "set_weight_decay", lambda *rest: None)
        code.put(run, "describe_groups", lambda *rest: [])
        code.put(step, "add_penalty_gradients", lambda *rest: None)
    elif kind == "average":
        code.put(averaging.WeightAverage, "update", lambda *rest: None)
        code.put(averaging.WeightAverage, "count", lambda *rest: 0)
    elif kind == "stopping":
        code.put(progress, "patience_is_over", lambda *rest: False)
    elif kind == "modifier":
        # What a modifier modifies, in the form it has without the modifier.
        code.put(learner, "weight_decay_at", lambda config, *rest: config.weight_decay)
        code.put(learner, "dropout_acts", lambda *rest: True)
        code.put(step, "update_weights", lambda optimizer, *rest: optimizer.step())
    else:
        raise AssertionError(f"law 1 does not know how to take out regularizers of the kind {kind!r}")


@pytest.mark.parametrize("kind", sorted({knob["kind"] for knob in DECLARED.values()}))
def test_off_is_absent(kind: str, five_steps: Callable[..., Outcome], all_off: Outcome) -> None:
    with pytest.MonkeyPatch.context() as patch:
        code = Replacements(patch)
        take_out(kind, code)
        assert same_bits(five_steps(), all_off)
        assert code.calls and all(code.calls.values()), f"never called: {code.calls}"


@pytest.mark.parametrize("name", [name for name in DECLARED if name not in READ_INSIDE])
def test_what_is_taken_out_is_where_it_acts(name: str, five_steps: Callable[..., Outcome], all_off: Outcome) -> None:
    """With the path of its kind taken out a knob that is on does nothing: law 1 compares with the right code."""
    companions = COMPANIONS.get(name, {})
    with pytest.MonkeyPatch.context() as patch:
        take_out(DECLARED[name]["kind"], Replacements(patch))
        base = five_steps(**companions) if companions else all_off
        on = five_steps(**companions | {name: WITHIN_FIVE_STEPS.get(name, DECLARED[name]["typical"])})
        way = "tell take_out (objective: without_objective_terms) where it acts"
        assert same_bits(on, base), f"{name} acts though the paths of its kind are taken out: {way}"


@pytest.mark.parametrize("name", list(DECLARED))
def test_on_acts_in_training_only(
    name: str, five_steps: Callable[..., Outcome], all_off: Outcome, text_file: Path
) -> None:
    kind, companions = DECLARED[name]["kind"], COMPANIONS.get(name, {})
    if kind == "stopping":
        companions = NEVER_BETTER
    base = five_steps(**companions) if companions else all_off
    value = WITHIN_FIVE_STEPS.get(name, DECLARED[name]["typical"])
    on = five_steps(**companions | {name: value})
    assert not same_bits(on, base), f"{name} changes nothing"
    steps = min(len(on.losses), len(base.losses))
    if kind in ("activation", "input"):
        assert on.losses[0] != base.losses[0]
    elif kind == "objective":
        assert on.losses[0] == base.losses[0] and on.objectives[0] != base.objectives[0]
        assert not same_tensors(on.weights, base.weights), f"{name} has no gradient"
    elif kind == "weights":
        assert on.losses[0] == base.losses[0] and on.losses[-1] != base.losses[-1]
    elif kind == "average":
        assert on.losses == base.losses and same_tensors(on.weights, base.weights)
        assert on.average and not same_tensors(on.average, on.weights)
        assert "val_average/loss" in read_metrics(on.directory)[-1]
    elif kind == "stopping":
        assert len(on.losses) < len(base.losses) == 5 and on.losses[:steps] == base.losses[:steps]
    # The evaluation of given weights, by models with and without it, is the same to the last bit.
    corpus = Corpus.open(next((on.directory.parent.parent / "corpora").glob("[!.]*")))
    batches = EvaluationBatches(corpus.split("val"), 32, 8, max_tokens=300)
    shape = Model(n_layers=2, d_model=32, n_heads=2, context_length=32)
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    results = []
    for values in (OFF, OFF | companions | {name: value}):
        model = GPT(shape, corpus.vocab_size, Regularizers.model_validate(values))
        auxiliary = {name for name in model.state_dict() if name.startswith(AUXILIARY)}
        network = {name: weight for name, weight in on.weights.items() if not name.startswith(AUXILIARY)}
        model.load_state_dict(network | {name: on.weights[name] for name in auxiliary})
        results.append(evaluate(model.train(), batches, hardware, 1.0)[0])
        assert model.training
    assert results[0] == results[1]


@pytest.mark.parametrize("name", of_kind("activation"))
@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.5])
def test_activations_keep_their_expectation(name: str, p: float) -> None:
    """At its own site the mean of what comes out is what went in, within 4 standard errors."""
    shape = Model(n_layers=2, d_model=8, n_heads=2, context_length=8)
    model = GPT(shape, 11, Regularizers.model_validate(OFF | {name: p}))
    sites = [module for module in model.modules() if getattr(module, "p", 0.0) > 0]
    assert sites
    torch.manual_seed(seed_for(0, name, round(100 * p)))
    for site in sites:
        draws = 400_000
        kept = site.train()(torch.ones(draws, 1, 1))
        rate = activations.mask_rate(p)[2] if isinstance(site, activations.Dropout) else p
        error = (rate * (1 - rate) / draws) ** 0.5
        assert abs((kept == 0).double().mean().item() - rate) < 4 * error and abs(rate - p) <= p / 50
        assert kept.max().item() == pytest.approx(1 / (1 - rate), rel=1e-6)
        assert kept.double().mean().item() == pytest.approx(1.0, abs=4 * error / (1 - rate))
        assert site.eval()(kept) is kept


@pytest.mark.parametrize("name", [name for name in of_kind("input") if name not in CHANGE_THE_TASK])
def test_inputs_keep_their_expectation(name: str) -> None:
    knobs = Regularizers.model_validate(OFF | {name: DECLARED[name]["typical"]})
    x_BTD = torch.full((8, 64, 4), 3.0)
    draws = [inputs.draw_changes((8, 64, 4), knobs, 0, step, 0, torch.device("cpu")) for step in range(200)]
    changed = torch.stack([draw.apply(x_BTD, torch.nn.ParameterDict()) for draw in draws if draw is not None]).double()
    assert len(changed) == 200
    # One draw a position for token dropout, one a number for noise.
    independent = changed[..., 0] if name == "token_dropout" else changed
    error = independent.std().item() / independent.numel() ** 0.5
    assert independent.mean().item() == pytest.approx(3.0, abs=4 * error)


@pytest.mark.parametrize(
    "listed", [same_bits_runs.EVERYTHING, test_replay.RUNS["everything"], test_regularized_run.EVERYTHING]
)
def test_everything_is_everything(listed: dict[str, Any]) -> None:
    """Runs said to have every regularizer on have each; SWA excludes EMA, and stopping would end them.

    weight_decay_epochs excludes weight_decay, and distillation needs teachers: tests/test_distillation.py has it.
    """
    names = {key.replace("__", ".").removeprefix("regularizers.") for key in listed}
    excluded = {"swa_start", "weight_decay_epochs", "distillation_weight"}
    assert set(of_kind("input", "activation", "objective", "weights", "average")) - excluded <= names
    assert {"cautious_weight_decay", "dropout_from", "dropout_until"} <= names
