"""What a step adds up, in which order, and what it leaves alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import WITH_PARAMETERS

from benchmarks.ours import everything_on
from command_line import parse
from config import BadInput, Config, Failure
from data.loader import Batches, TrainingLoader
from data.prepare import prepare
from data.shards import Corpus
from hardware import Hardware
from model.gpt import GPT
from regularizers.inputs import draw_readings
from training.gradients import insert, merged
from training.learner import Learner
from training.processes import main_first
from training.progress import Progress
from training.step import StepResult, differentiate, training_step


class Sum(str):
    """A sum that shows in which order it was formed."""

    def __add__(self, other: str) -> Sum:
        return Sum(f"({self}+{other})")


@pytest.mark.parametrize(
    ("leaves", "expected"), [(1, "0"), (2, "(0+1)"), (5, "(((0+1)+(2+3))+4)"), (6, "(((0+1)+(2+3))+(4+5))")]
)
def test_the_tree_is_the_same_however_its_leaves_are_shared_out(leaves: int, expected: str) -> None:
    order = random.Random(0)
    for share in range(1, leaves + 1):
        nodes: dict[tuple[int, int], Sum] = {}
        for first in range(0, leaves, share):  # each process adds what it can, then all meet
            own: dict[tuple[int, int], Sum] = {}
            for leaf in range(first, min(first + share, leaves)):
                insert(own, (0, leaf), Sum(leaf), leaves)
            nodes |= own
        shuffled = dict(order.sample(list(nodes.items()), len(nodes)))
        assert list(merged(shuffled, leaves).values()) == [expected]


def ready(flags: list[str], directory: Path, steps: int = 5) -> tuple[Learner, Batches]:
    """What ``training_step`` takes, for a run of so many steps."""
    config = parse(flags)
    corpus = Corpus.open(prepare(config.data, directory, quiet=True))
    loader = TrainingLoader(corpus.split("train"), config.data, 0, 32, 8)
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    learner = Learner(
        GPT(config.model, corpus.vocab_size, config.regularizers).initialize(0), config, hardware, steps, 5
    )
    return learner, loader.batches(range(steps), learner.micro_batches, config.training.micro_size, hardware.device)


def test_a_step_without_ordinary_sequences_has_no_plain_loss(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """Its objective is that of the others; a micro-batch without ordinary sequences says nothing yet."""
    learner, batches = ready(tiny(regularizers__reversed_fraction=0.9, training__micro_batch_size=2), tmp_path, 12)
    knobs, ordinary, told = learner.config.regularizers, [], []
    for step in range(12):
        readings = draw_readings(knobs, 8, 0, step)
        assert readings is not None
        ordinary.append(bool(readings.ordinary_B.any()))
        result = training_step(learner, batches, step)
        assert result.is_finite and result.terms["objective"] > 1
        told.append("loss" in result.terms)
        assert not told[-1] or 1 < result.terms["loss"] < 7
    assert told == ordinary and len(set(told)) == 2


def test_a_network_is_compiled_once_for_each_pass(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """With all that changes inputs: the ordinary pass and the masked one, however many steps and micro-batches."""
    words = {f"regularizers__{name}": value for name, value in WITH_PARAMETERS.items()}
    words |= {"regularizers__mixup_alpha": 0.2, "regularizers__token_dropout": 0.1, "training__micro_batch_size": 2}
    learner, batches = ready(tiny(**words), tmp_path)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    learner.forward = torch.compile(learner.model, dynamic=False, backend=count)
    for step in range(4):
        training_step(learner, batches, step)
    assert len(graphs) == 2


def test_a_gradient_that_is_not_finite_changes_nothing(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, the moments and the count of steps are those of the step before, and the next step goes on."""
    learner, batches = ready(tiny(training__micro_batch_size=4), tmp_path)

    def step(number: int) -> tuple[bool, dict[str, torch.Tensor]]:
        finite = training_step(learner, batches, number).is_finite
        tensors = dict(learner.tensors(number + 1))
        return finite, {f"{file}/{name}": value.clone() for file in tensors for name, value in tensors[file].items()}

    monkeypatch.setenv("WELLPOSED_FAULT", "gradient:0:2:nan")
    (_, first), (second_is_finite, second), (third_is_finite, third) = map(step, range(3))
    assert not second_is_finite and all(torch.equal(first[name], second[name]) for name in first)
    assert third_is_finite and not any(torch.equal(second[name], third[name]) for name in second)


@pytest.mark.parametrize("fails", [False, True])
def test_the_others_wait_for_what_takes_the_main_process_long(fails: bool) -> None:
    """However long, and also when it fails there: then they find out at the next collective."""
    store, order = torch.distributed.HashStore(), list[str]()

    def verify(main: bool) -> str:
        if main:
            time.sleep(0.3)
        order.append("main" if main else "other")
        if main and fails:
            raise BadInput("damaged")
        return order[-1]

    def process(rank: int) -> str:
        return main_first(Hardware(rank, 3, torch.device("cpu"), "fp32", False, 1, store=store), verify)

    with ThreadPoolExecutor(3) as pool:
        *others, main = [pool.submit(process, rank) for rank in (1, 2, 0)]
        assert [other.result(5) for other in others] == ["other", "other"]
        assert isinstance(main.exception(5), BadInput) if fails else main.result(5) == "main"
    assert order == ["main", "other", "other"]
    alone = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    assert main_first(alone, lambda main: main) is True


# ---------------------------------------------------------------------------------------------- fp16


def test_a_loss_scale_changes_no_digit(tiny: Callable[..., list[str]], tmp_path: Path) -> None:
    """With every regularizer on, gradients are 1024 times those without, and the terms are the same."""
    knobs = {f"regularizers__{name}": value for name, value in everything_on(target_offset=3).items()}
    learner, batches = ready(tiny(**knobs), tmp_path)

    def gradients(scale: float) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        learner.model.zero_grad(set_to_none=True)
        key, hardware = (0, 0, 0), learner.hardware
        terms = differentiate(
            batches.current, key, learner.model, learner.forward, learner.config, hardware, (), scale=scale
        )
        return terms, [weight.grad for weight in learner.model.parameters() if weight.grad is not None]

    (plain_terms, plain), (scaled_terms, scaled) = gradients(1.0), gradients(1024.0)
    assert len(plain_terms) >= 5 and all(torch.equal(plain_terms[name], scaled_terms[name]) for name in plain_terms)
    assert plain and all(torch.equal(1024 * one, other) for one, other in zip(plain, scaled, strict=True))


def result(finite: bool, scale: float | None) -> StepResult:
    return StepResult({"objective": 1.0}, 1.0 if finite else math.inf, 1e-3, False, 0, 1.0, scale)


def test_the_loss_scale_follows_torch() -> None:
    """torch.amp.GradScaler's: 65536 at first, half after an overflow, twice after 2000 finite steps in a row."""
    progress, config = Progress(), Config()
    scaler = torch.amp.GradScaler("cpu", init_scale=progress.loss_scale)
    scaler.scale(torch.ones(()))
    for step in range(4003):
        finite = step not in (0, 1, 1500)
        progress.count(result(finite, progress.loss_scale), config)
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.full((1,), 1.0 if finite else math.inf)
        scaler.step(torch.optim.SGD([weight], 1.0))
        scaler.update()
        assert progress.loss_scale == scaler.get_scale() and progress.nonfinite == 0
    assert progress.loss_scale == 2.0**14


def test_a_gradient_that_no_scale_makes_finite_ends_the_run() -> None:
    progress, config = Progress(), Config()
    with pytest.raises(Failure, match="not finite 10 times in a row"):
        for _ in range(100):
            progress.count(result(False, progress.loss_scale), config)
    assert progress.step == 16 + config.training.max_nonfinite and progress.loss_scale == 1.0
