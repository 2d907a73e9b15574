"""Schedules against numbers worked by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from command_line import parse
from config import BadInput, Schedule
from training.schedule import learning_rate_ratio, warmup_steps, warmup_warning


def rates(name: str, total: int = 11, **knobs: object) -> list[float]:
    config = Schedule.model_validate({"name": name, "warmup_steps": 0, "min_lr_ratio": 0.1, **knobs})
    return [learning_rate_ratio(config, step, total) for step in range(total)]


def test_warmup_cosine() -> None:
    found = rates("warmup_cosine", total=15, warmup_steps=4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[9] == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert found[-1] == pytest.approx(0.1)
    assert found[5] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 10)))


def test_cosine_ignores_warmup() -> None:
    found = rates("cosine", warmup_steps=5)
    assert (found[0], found[5], found[10]) == pytest.approx((1.0, 0.55, 0.1))


def test_wsd_stays_then_falls_in_a_line() -> None:
    found = rates("wsd", total=101, decay_fraction=0.2, min_lr_ratio=0.0)
    assert found[:80] == [1.0] * 80
    assert found[-1] == pytest.approx(0.0)
    steps = [a - b for a, b in pairwise(found[80:])]
    assert steps == pytest.approx([steps[0]] * len(steps))
    # Half of 11 steps before the last one: level up to 10 - 5.5 = 4.5, then down by 1 / 5.5 a step.
    found = rates("wsd", decay_fraction=0.5, min_lr_ratio=0.0)
    assert found == pytest.approx([1, 1, 1, 1, 1, 5 / 5.5, 4 / 5.5, 3 / 5.5, 2 / 5.5, 1 / 5.5, 0])


def test_wsd_falls_as_one_minus_a_root() -> None:
    """Over 100 steps from 1 to 0.1: a quarter of the way the root is 1/2, at 0.81 it is 0.9."""
    found = rates("wsd", total=101, decay_fraction=1.0, decay_shape="sqrt")
    assert (found[0], found[25], found[81], found[100]) == pytest.approx((1, 0.55, 0.19, 0.1))


def test_points_are_joined_by_lines() -> None:
    points = [[0, 0.2], [0.2, 1], [0.5, 0.4], [0.5, 1], [1, 0]]
    found = rates("points", points=points, warmup_steps=5)
    assert found == pytest.approx([0.2, 0.6, 1, 0.8, 0.6, 1, 0.8, 0.6, 0.4, 0.2, 0])
    assert rates("points", total=1, points=points) == [0.2]


def test_points_need_their_name_and_it_them() -> None:
    for flags in (["--schedule.name=points"], ["--schedule.points=[[0,1],[1,0]]"]):
        with pytest.raises(BadInput, match=r"schedule.name=points and schedule.points need each other; give both, as"):
            parse(flags)
    with pytest.raises(BadInput, match=r"schedule.points: the fractions of the run must begin with 0"):
        parse(["--schedule.name=points", "--schedule.points=[[0,1],[0.9,0]]"])
    parse(
        [
            "--schedule.name=points",
            "--schedule.points=[[0,1],[1,0]]",
            "--training.max_steps=5",
            "--schedule.warmup_steps=9",
        ]
    )


def test_one_cycle_rises_and_falls_along_cosines() -> None:
    found = rates("one_cycle", total=21, warmup_steps=10)
    assert found[10] == pytest.approx(1.0) and found[15] == pytest.approx(0.55) and found[20] == pytest.approx(0.1)
    assert found == sorted(found[:11]) + sorted(found[11:], reverse=True)
    # From the first rate of a linear warmup, 1/4, half way up to 1 at the second of three steps.
    assert rates("one_cycle", warmup_steps=3)[1] == pytest.approx((1 / 4 + 1) / 2)


def test_constant() -> None:
    assert rates("constant", total=5, warmup_steps=1) == pytest.approx([0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("name", ["warmup_cosine", "cosine", "one_cycle", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 50])
@pytest.mark.parametrize("warmup", [None, 0, 1, 1000])
def test_always_between_zero_and_the_peak(name: str, total: int, warmup: int | None) -> None:
    for ratio in rates(name, total, warmup_steps=warmup, decay_fraction=1.0):
        assert 0 < ratio <= 1


def test_default_warmup() -> None:
    assert [warmup_steps(Schedule(), total) for total in (5, 400, 2000)] == [0, 40, 100]


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    for name in ("warmup_cosine", "one_cycle", "wsd", "constant"):
        flags = [f"--schedule.name={name}", "--training.max_steps=10"]
        assert parse([*flags, "--schedule.warmup_steps=9"]).schedule.warmup_steps == 9
        for steps in (10, 11):
            with pytest.raises(BadInput, match=rf"warmup_steps={steps} must be below training\.max_steps=10"):
                parse([*flags, f"--schedule.warmup_steps={steps}"])
    parse(["--schedule.name=cosine", "--schedule.warmup_steps=10", "--training.max_steps=10"])


def test_a_warmup_that_the_text_cuts_short_is_told() -> None:
    assert warmup_warning(Schedule(), 5) == warmup_warning(Schedule(warmup_steps=4), 5) == []
    assert warmup_warning(Schedule(name="cosine", warmup_steps=5), 5) == []
    assert warmup_warning(Schedule(name="points", points=[(0, 1), (1, 0)], warmup_steps=5), 5) == []
    (words,) = warmup_warning(Schedule(warmup_steps=5), 5)
    assert words == "schedule.warmup_steps is 5, and the run has 5 steps: it warms up in 4"
