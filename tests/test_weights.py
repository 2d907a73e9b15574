"""Penalties against autograd, the decay's schedule against literals, averages against torch's own, stopping by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from command_line import parse
from config import BadInput, Regularizers
from regularizers.averaging import WeightAverage
from regularizers.stopping import evaluations_without_improvement, patience_is_over
from regularizers.weights import add_penalty_gradients, first_weight_decay, sparsity, weight_decay_at


@pytest.mark.parametrize(("l1", "l2"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_penalties_are_the_gradient_of_the_penalty(l1: float, l2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    data = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad((weight * data).sum() + l1 * weight.abs().sum() + l2 * weight.square().sum(), weight)
    (weight * data).sum().backward()
    add_penalty_gradients([weight], Regularizers(l1=l1, l2=l2))
    torch.testing.assert_close(weight.grad, expected[0], rtol=1e-12, atol=0)


def test_decay_schedule() -> None:
    def values(schedule: str) -> list[float]:
        knobs = Regularizers.model_validate(
            {"weight_decay": 0.8, "weight_decay_end": 0.2, "weight_decay_schedule": schedule}
        )
        return [weight_decay_at(knobs, step, 5, 0.8) for step in range(5)]

    assert values("constant") == [0.8] * 5
    assert values("linear") == pytest.approx([0.8, 0.65, 0.5, 0.35, 0.2])
    assert values("cosine") == pytest.approx([0.8, 0.5 + 0.3 * 0.5**0.5, 0.5, 0.5 - 0.3 * 0.5**0.5, 0.2])


def test_decay_by_a_list_of_points() -> None:
    """From 0.8 up to 1.6 at half of the run, where it jumps to 0.4, and up to 1 at the last step."""
    points = [[0, 0.8], [0.5, 1.6], [0.5, 0.4], [1, 1]]
    knobs = Regularizers.model_validate({"weight_decay_schedule": points})
    assert first_weight_decay(knobs, 1e-3, 10.0) == 0.8
    found = [weight_decay_at(knobs, step, 9, 0.8) for step in range(9)]
    assert found == pytest.approx([0.8, 1.0, 1.2, 1.4, 0.4, 0.55, 0.7, 0.85, 1.0])
    assert [weight_decay_at(knobs, 0, steps, 0.8) for steps in (1, 2)] == [0.8, 0.8]
    jumps = Regularizers.model_validate({"weight_decay_schedule": [[0, 1], [0, 2], [1, 3], [1, 4]]})
    assert first_weight_decay(jumps, 1e-3, 10.0) == weight_decay_at(jumps, 0, 5, 2.0) == 2
    assert weight_decay_at(jumps, 4, 5, 2.0) == 4


def test_decay_by_its_timescale() -> None:
    """Over 5 epochs of 20 steps at the rate 0.01: 1/(0.01 · 100) = 1; a schedule goes on from there."""
    knobs = Regularizers(weight_decay_epochs=5, weight_decay_schedule="linear", weight_decay_end=0.5)
    first = first_weight_decay(knobs, 0.01, 20.0)
    assert first == pytest.approx(1.0)
    assert [weight_decay_at(knobs, step, 3, first) for step in range(3)] == pytest.approx([1.0, 0.75, 0.5])


POINTS = "--regularizers.weight_decay_schedule=[[0,1],[1,2]]"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["weight_decay=0.5", "weight_decay_epochs=3"], "weight_decay and regularizers.weight_decay_epochs exclude"),
        (["weight_decay=0.5", POINTS], "weight_decay and regularizers.weight_decay_schedule exclude each other"),
        (["weight_decay_epochs=3", POINTS], "weight_decay_epochs and regularizers.weight_decay_schedule exclude"),
        (["weight_decay_end=0.5", POINTS], "weight_decay_schedule and regularizers.weight_decay_end exclude"),
        (["weight_decay_schedule=[[0,1],[0.5,2]]"], r"begin with 0, rise .* and end with 1; they are \[0, 0.5\]"),
        (["weight_decay_schedule=[[0,1],[0.5,2],[0.4,2],[1,2]]"], "begin with 0, rise"),
        (["weight_decay_schedule=[[0.1,1],[1,2]]"], "begin with 0, rise"),
        (["weight_decay_schedule=[]"], "begin with 0, rise"),
        (
            ["weight_decay_schedule=[[0,-1],[1,2]]"],
            r"must be constant\|linear\|cosine\|\[\[float >= 0, <= 1, float >= 0",
        ),
        (["weight_decay_schedule=square"], "must be constant"),
        (["weight_decay_epochs=0"], "greater than 0"),
        (["dropout_from=0.5", "dropout_until=0.5"], "dropout_from=0.5 must be below dropout_until=0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        parse([flag if flag.startswith("--") else f"--regularizers.{flag}" for flag in flags])


def test_a_decay_that_is_off_or_at_its_default_is_no_second_one() -> None:
    for decay in ("0", "0.1"):
        for other in ("--regularizers.weight_decay_epochs=3", POINTS):
            parse([f"--regularizers.weight_decay={decay}", other])


def test_sparsity() -> None:
    found = sparsity({"a": torch.tensor([0.0, 5e-4, -5e-4, 1.0]), "b": torch.tensor([1.0, -1.0])})
    assert found == {"a": 0.75, "b": 0.0}


def walk(model: nn.Linear, steps: int) -> None:
    with torch.no_grad():
        model.weight.add_(torch.randn(model.weight.shape, generator=torch.Generator().manual_seed(steps)))


def test_ema_is_torchs_with_the_decays_of_a_short_run() -> None:
    model = nn.Linear(3, 3)
    # The first weights are taken as they are; 14/23 at step 13 would be above 0.6.
    decays = [3/12, 4/13, 5/14, 6/15, 7/16, 8/17, 9/18, 10/19, 11/20, 12/21, 13/22, *[0.6] * 8]  # fmt: skip
    theirs = AveragedModel(model, avg_fn=lambda average, new, n: torch.lerp(new, average, decays[int(n) - 1]))
    ours = WeightAverage(Regularizers(ema_decay=0.6), total_steps=20)
    for step in range(1, 21):
        walk(model, step)
        ours.update(dict(model.named_parameters()), step)
        theirs.update_parameters(model)
    torch.testing.assert_close(ours.weights["weight"], theirs.module.weight.detach(), rtol=1e-6, atol=1e-7)


def test_swa_is_torchs_over_the_counted_steps() -> None:
    model = nn.Linear(3, 3)
    theirs = AveragedModel(model)
    ours = WeightAverage(Regularizers(swa_start=0.5, swa_every=3), total_steps=20)
    counted = []
    for step in range(1, 21):
        walk(model, step)
        ours.update(dict(model.named_parameters()), step)
        if ours.count(step) > ours.count(step - 1):
            counted.append(step)
            theirs.update_parameters(model)
    assert counted == [10, 13, 16, 19]
    torch.testing.assert_close(ours.weights["weight"], theirs.module.weight.detach(), rtol=1e-6, atol=1e-7)


def test_the_models_own_weights_come_back_bit_for_bit() -> None:
    model = nn.Linear(3, 3)
    average = WeightAverage(Regularizers(ema_decay=0.5), total_steps=2)
    average.update(dict(model.named_parameters()), 1)
    walk(model, 1)
    own, averaged = model.weight.detach().clone(), average.weights["weight"].clone()
    with pytest.raises(RuntimeError), average.in_place_of(dict(model.named_parameters())):
        assert torch.equal(model.weight, averaged)
        raise RuntimeError
    assert torch.equal(model.weight, own) and torch.equal(average.weights["weight"], averaged)
    assert not torch.equal(own, averaged)


def test_patience_by_hand() -> None:
    losses = [3.0, 2.0, 2.1, 1.95, 1.96, 1.94]
    assert evaluations_without_improvement(losses, 0.0) == 0
    assert evaluations_without_improvement(losses[:5], 0.0) == 1
    assert evaluations_without_improvement(losses, 0.1) == 4  # the best is 2.0; nothing later beats it by 0.1
    # 1.95 improves on 2.0 by too little to count, and does not lower what 1.89 is held against.
    assert evaluations_without_improvement([2.0, 1.95, 1.89], 0.1) == 0
    assert not patience_is_over(losses, Regularizers())
    knobs = Regularizers(early_stopping_patience=4, early_stopping_min_delta=0.1)
    assert patience_is_over(losses, knobs) and not patience_is_over(losses[:-1], knobs)
    assert evaluations_without_improvement([float("nan")] * 3, 0.0) == 3
