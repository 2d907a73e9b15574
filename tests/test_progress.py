"""When a run evaluates, saves and ends, and what it remembers, by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import parse
from config import Failure
from training.progress import Judgement, Plan, Progress
from training.step import StepResult


def plan_of(*flags: str, steps_per_epoch: float = 2.5) -> Plan:
    loader: Any = SimpleNamespace(steps_per_epoch=steps_per_epoch, epoch_at=lambda step: step / steps_per_epoch)
    return Plan.of(parse(list(flags)), loader)


def evaluations(plan: Plan) -> list[int]:
    return [step for step in range(1, plan.total_steps + 1) if plan.evaluates_at(step)]


def result(objective: float = 1.0, gradient_norm: float = 1.0) -> StepResult:
    return StepResult({"objective": objective}, gradient_norm, 0.1, preempted=False, samples=7, seconds=0.1)


def judged(*losses: float, flags: tuple[str, ...] = ()) -> Progress:
    """The progress after these evaluations, one a step."""
    progress, config = Progress(), parse(list(flags))
    for loss in losses:
        progress.step += 1
        progress.judge(Judgement({}, {"loss": loss, "bits_per_byte": 2 * loss}), config)
    return progress


def test_the_length_of_a_run() -> None:
    assert plan_of("--training.max_steps=7").total_steps == 7
    assert plan_of(steps_per_epoch=10.6).total_steps == 11  # one epoch, to the nearest step
    assert plan_of("--training.max_epochs=3", steps_per_epoch=10.6).total_steps == 32
    assert plan_of(steps_per_epoch=0.2).total_steps == 1


def test_when_it_is_evaluated() -> None:
    assert evaluations(plan_of("--training.max_steps=10", "--evaluation.every=4")) == [4, 8, 10]
    assert evaluations(plan_of("--training.max_steps=25")) == [*range(2, 25, 2), 25]  # a tenth of the run
    # 2.5 steps an epoch: the epochs are complete after 2.5, 5, 7.5 and 10 steps.
    assert evaluations(plan_of("--training.max_steps=11", "--evaluation.every=epoch")) == [3, 5, 8, 10, 11]


def test_when_it_is_saved() -> None:
    def saves(plan: Plan, **state: Any) -> list[int]:
        return [step for step in range(1, plan.total_steps + 1) if plan.saves_at(Progress(step=step, **state))]

    often = plan_of("--training.max_steps=10", "--evaluation.every=4")
    assert saves(often) == [4, 8, 10]
    assert saves(often, best={"step": 5}) == [4, 5, 8, 10]
    assert saves(plan_of("--training.max_steps=10", "--checkpoint.every=3")) == [3, 6, 9, 10]
    assert saves(often, preempted=True) == saves(often, stopped_early=True) == list(range(1, 11))


def test_the_best_is_the_first_of_the_lowest_and_a_number() -> None:
    assert judged(3.0, 2.0, math.nan, 2.0, 2.5).best == {"step": 2, "val/loss": 2.0, "val/bits_per_byte": 4.0}
    assert judged(math.nan, math.inf).best is None
    flags = ("--regularizers.early_stopping_patience=2",)
    assert (
        not judged(3.0, 2.0, 2.5, flags=flags).stopped_early and judged(3.0, 2.0, 2.5, 2.1, flags=flags).stopped_early
    )


def test_steps_are_counted() -> None:
    config = parse(["--training.global_batch_size=3", "--model.context_length=5", "--training.max_nonfinite=3"])
    progress = Progress()
    for norm in (1.0, math.nan, math.inf, 1.0, math.nan, math.nan):
        progress.count(result(gradient_norm=norm), config)
    assert (progress.step, progress.tokens, progress.samples, progress.nonfinite) == (6, 90, 42, 2)
    with pytest.raises(Failure, match="3 times in a row"):
        progress.count(result(gradient_norm=math.nan), config)


def test_spikes_are_counted_and_told() -> None:
    progress, config = Progress(), parse([])
    results = [result(objective) for objective in [1.0] * 20 + [9.0, 1.0]]
    for one in results:
        progress.count(one, config)
    assert progress.spikes == 1 and [one.is_spike for one in results].index(True) == 20


def test_what_is_stored_comes_back() -> None:
    flags = ("--regularizers.early_stopping_patience=1",)
    progress = judged(3.0, 3.5, flags=flags)
    stored = progress.stored()
    assert "preempted" not in stored and "stopped_early" not in stored
    assert Progress.resumed(stored | {"of an older version": 1}, parse(list(flags))) == progress
    assert progress.stopped_early
