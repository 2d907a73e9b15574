"""What a regularizer is worth in text: made-up losses whose truth is known, and the command killed on its way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_study import make_study, write_run, write_runs
from test_study_plan import killed_and_gone_on_with, tiny_base

from config import BadInput
from studies import scale as scaling
from studies.queue import Queue
from studies.scale import Losses, curve, scale, trend, worth
from studies.space import SCALE_SEEDS, Scale, Study

SIZES = (4000, 8000, 16000, 32000)


def law(tokens: float) -> float:
    return 2 + 30 / tokens**0.35


def made_up(
    true: float, seeds: int = 3, at: int = 16000, noise: float = 0.0, random: int = 0, sizes: tuple[int, ...] = SIZES
) -> tuple[Losses, Losses]:
    """Baseline and winner, which at ``at`` tokens is worth ``true`` times the text and gains as much at all others."""
    draw = np.random.default_rng(random)
    gain, shares = law(at) - law(true * at), draw.normal(0, 3 * noise, seeds)
    baseline: dict[int, dict[int, float]] = {}
    winner: dict[int, dict[int, float]] = {}
    for size in sizes:
        both = shares + draw.normal(0, noise, seeds)  # what a seed brings to both sides
        baseline[size] = dict(enumerate(law(size) + both + draw.normal(0, noise, seeds)))
        winner[size] = dict(enumerate(law(size) - gain + both + draw.normal(0, noise, seeds)))
    return baseline, winner


def test_without_noise_the_law_and_the_worth_are_found() -> None:
    baseline, winner = made_up(1.5)
    assert curve(baseline)["law"] == pytest.approx({"E": 2, "A": 30, "a": 0.35}, rel=1e-3)
    found = worth(baseline, winner, 16000)
    assert (found.times, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5), rel=1e-3)
    assert found.words() == "equals 1.5 times the text (95% interval 1.5 to 1.5)" and not found.why_not
    # Beyond the largest amount, which the curve without it meets: followed to 128,000 tokens and no further.
    assert worth(*made_up(3), 16000).times == pytest.approx(3, rel=1e-3)
    assert worth(*made_up(9), 16000).words() == "is worth more than 8.0 times the text"
    # What does harm is worth less than the text; below the smallest amount nothing is known.
    assert worth(*made_up(0.5), 16000).words() == "equals 0.5 times the text (95% interval 0.5 to 0.5)"
    assert worth(*made_up(0.2), 16000).words() == "is worth less than 0.25 times the text"


def test_a_floor_below_zero_and_losses_that_rise_are_not_fitted() -> None:
    falling = {size: {0: 5 - 0.4 * math.log(size / 100), 1: 5 - 0.4 * math.log(size / 100)} for size in SIZES}
    assert curve(falling)["law"]["E"] >= 0
    rising = {size: {0: size / 1e4, 1: size / 1e4} for size in SIZES}
    assert curve(rising)["law"]["A"] == 0
    assert worth(rising, rising, 16000).words() == ""


@pytest.mark.parametrize("seeds", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_the_interval_of_the_worth_holds_the_truth_as_often_as_it_says(seeds: int) -> None:
    held = 0
    for random in range(240):
        found = worth(*made_up(1.3, seeds, noise=0.006, random=random), 16000)
        assert found.low > 0 and found.high < math.inf  # which would hold anything
        held += found.low <= 1.3 <= found.high
    assert 0.9 <= held / 240 <= 0.985


def test_nothing_is_told_beyond_the_largest_amount_where_the_law_does_not_hold() -> None:
    for noise in (0, 0.003):
        baseline, winner = made_up(3, noise=noise, seeds=4)
        for side in (baseline, winner):  # the last doubling brings nothing any more
            side[32000] = {seed: loss + law(16000) - law(32000) for seed, loss in side[32000].items()}  # type: ignore[index]
        found = worth(baseline, winner, 16000)
        assert found.why_not.startswith("fitted without the largest amount, the curve misses it by 0.2")
        assert found.words() in ("is worth more than 2.0 times the text", "") and found.times == math.inf


def test_three_amounts_cannot_test_the_law() -> None:
    found = worth(*made_up(3, sizes=SIZES[1:]), 16000)
    assert found.why_not == "three amounts of text cannot test the curve"
    assert found.words() == "is worth more than 2.0 times the text"
    assert worth(*made_up(1.5, sizes=SIZES[1:]), 16000).times == pytest.approx(1.5, rel=1e-3)


def test_noise_that_drowns_the_gain_is_said() -> None:
    words = [worth(*made_up(1.0, noise=0.01, random=random), 16000).words() for random in range(40)]
    assert sum("none at all is in the interval" in said for said in words) >= 34
    drowned = [worth(*made_up(1.0, noise=1.0, random=random), 16000).words() for random in range(20)]
    assert drowned.count("") > 10


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ((0.1, 0.1, 0.1), "holds"),
        ((0.1, 0.2, 0.3), "grows"),
        ((0.3, 0.2, 0.1), "shrinks"),
        ((0.1, 0.0, -0.1), "flips"),
        ((-0.1, 0.0, 0.1), "flips"),
        ((0.0, 0.0, 0.0), "cannot be told"),
    ],
)
def test_where_a_gain_goes(gains: tuple[float, ...], word: str) -> None:
    draw = np.random.default_rng(3)
    noisy = {
        size: {seed: gain + draw.normal(0, 0.005) for seed in range(5)}
        for size, gain in zip((1000, 2000, 4000), gains, strict=True)
    }
    found = trend(noisy)
    assert found.word == word
    assert found.low <= (gains[-1] - gains[0]) / 2 <= found.high  # a doubling


def test_a_slope_is_told_falsely_in_one_study_of_twenty() -> None:
    draw, told = np.random.default_rng(0), 0
    for _ in range(1000):
        gains = {size: dict(enumerate(draw.normal(0.1, 0.1, 3))) for size in SIZES}
        told += trend(gains).word in ("grows", "shrinks", "flips")
    assert 30 <= told <= 70


def scaled_study(directory: Path, **changes: Any) -> Study:
    """A study with a winner, on a text of 18,000 tokens."""
    base = tiny_base(directory, **{"data.train_tokens": "6000"})
    values = {"base": base, "space": {"regularizers.weight_decay": [1.0]}, "seeds": 2}
    study = make_study(directory, **values | changes)
    write_runs(study, lambda point: -0.1 * (not point.baseline), confirm=[point.name for point in study.points()])
    return study


def test_the_command_says_what_the_winner_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = scaled_study(tmp_path, scale={"widths": [32, 64]})

    def train(study: Study, pairs: list[Any]) -> int:
        for point, seed in pairs:
            tokens = study.config(point, seed).data.train_tokens or 0
            width = study.config(point, seed).model.d_model
            better = 0.0 if point.origin == "baseline" else 0.1 * 32 / width
            write_run(study, point, seed, law(tokens) - better + 0.01 * (seed - SCALE_SEEDS))
        return 0

    monkeypatch.setattr(scaling, "run_pairs", train)
    assert scale(study) == 0
    said = capsys.readouterr().out
    assert "baseline at 1,500, 3,000, 6,000, 12,000 tokens" in said
    assert "At 6,000 tokens weight_decay=1 equals 1.2 times the text (95% interval 1.2 to 1.2)." in said, said
    assert "As the text grows the gain holds: +0.1000" in said and "As d_model grows the gain shrinks: " in said
    assert "does not claim" not in said
    stored = json.loads(
        (study.directory / "scale.json").read_text(), parse_constant=lambda what: pytest.fail(f"{what} is no JSON")
    )
    first = stored["losses"]["baseline"]["1500"]["4000"]
    assert stored["answer"][0] in said and first == pytest.approx(law(1500), abs=0.02)
    assert (study.directory / "scale.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_scaled_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "much").mkdir()
    with pytest.raises(BadInput, match=r"the text has [\d,]+ training tokens, and 900,000 are asked for"):
        scale(scaled_study(tmp_path / "much", scale={"train_tokens": [3000, 6000, 900_000]}))
    (tmp_path / "all").mkdir()
    with pytest.raises(BadInput, match="all of its text; give the study file amounts"):
        scale(scaled_study(tmp_path / "all", base=tiny_base(tmp_path / "all")))
    with pytest.raises(ValueError, match="must be at least two values, ascending"):
        Scale(train_tokens=[3000, 2000, 1000])


def test_the_queue_knows_of_which_point_a_tuned_and_scaled_one_is(tmp_path: Path) -> None:
    study = make_study(tmp_path, tune={"optimizer.lr": [0.5, 1.0, 2.0]})
    point = study.points()[1]
    scaled = study.variation(study.tuned(point, 2.0), {"data.train_tokens": 5000})
    assert scaled.origin == point.name
    queue = Queue(study)
    queue.fill([(scaled, SCALE_SEEDS)])
    queue.fill([])  # as another command does, which takes out what is none of the study's
    task = queue.claim()
    assert task is not None and task.point == scaled and task.seeds == [SCALE_SEEDS]


def test_nothing_to_scale_is_said(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [1.0]}, seeds=2)
    write_runs(study, lambda point: 0.1 * (not point.baseline))
    with pytest.raises(BadInput, match="no point did better"):
        scale(study)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_scale_study_survives_kill_9(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, "scale", "*-seed400[01]")
