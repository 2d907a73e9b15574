"""The statistics of studies agree with scipy's and statsmodels', keep their promises in simulated studies, and refuse
to say more than the runs allow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from studies.statistics import (
    Noise,
    analyse,
    fit,
    holm,
    noise_without_each,
    power_of,
    seeds_needed,
    smallest_detectable,
    uneven_points,
)

Values = dict[str, dict[int, float]]


def made_up(points: int, seeds: int, draw: np.random.Generator, effect: float = 0.0, noise: float = 1.0) -> Values:
    """Points p0 (the baseline), p1, ... on common seeds whose shares are large; ``effect`` is that of p1."""
    values = 4 + draw.normal(0, 3, (1, seeds)) + draw.normal(0, noise, (points, seeds))
    values[1] += effect
    return {f"p{row}": dict(enumerate(runs.tolist())) for row, runs in enumerate(values)}


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_two_points_are_the_paired_t_test(seeds: int) -> None:
    values = made_up(2, seeds, np.random.default_rng(seeds), effect=1.0)
    reference = stats.ttest_rel(list(values["p1"].values()), list(values["p0"].values()))
    interval = reference.confidence_interval(0.95)
    effect = analyse(values, "p0").effects["p1"]
    assert effect.p == pytest.approx(reference.pvalue, rel=1e-9)
    assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert effect.adjusted_p == effect.p and effect.degrees == seeds - 1 == reference.df


@pytest.mark.parametrize("missing", [0, 5])
def test_many_points_are_ordinary_least_squares_with_holm(missing: int) -> None:
    """statsmodels fits the same model, with and without runs that are missing."""
    draw = np.random.default_rng(5)
    values = made_up(7, 4, draw, effect=3.0)
    for name, seed in [("p2", 0), ("p2", 1), ("p3", 3), ("p0", 2), ("p6", 0)][:missing]:
        del values[name][seed]
    rows = [(name, seed, value) for name, runs in values.items() for seed, value in runs.items()]
    columns = dict(zip(("point", "seed", "y"), map(list, zip(*rows, strict=True)), strict=True))
    model = ols("y ~ C(point) + C(seed)", data=columns).fit()
    analysis = analyse(values, "p0")
    assert analysis.uneven == [] and analysis.noise.degrees == model.df_resid
    assert analysis.noise.sd == pytest.approx(math.sqrt(model.scale))
    adjusted = multipletests([model.pvalues[f"C(point)[T.p{row}]"] for row in range(1, 7)], method="holm")[1]
    for row in range(1, 7):
        name, effect = f"C(point)[T.p{row}]", analysis.effects[f"p{row}"]
        assert effect.difference == pytest.approx(model.params[name])
        assert effect.error == pytest.approx(model.bse[name])
        assert effect.p == pytest.approx(model.pvalues[name])
        assert (effect.low, effect.high) == pytest.approx(tuple(model.conf_int().loc[name]))
        assert effect.adjusted_p == pytest.approx(adjusted[row - 1])


def test_holm_is_statsmodels() -> None:
    draw = np.random.default_rng(0)
    for count in (1, 2, 9):
        ps = (draw.random(count) ** 3).tolist()
        assert holm(ps) == pytest.approx(multipletests(ps, method="holm")[1])
    assert holm([]) == []


def test_what_a_seed_brings_changes_nothing() -> None:
    values = made_up(5, 3, np.random.default_rng(1))
    moved = {name: {seed: value + 100 * seed for seed, value in runs.items()} for name, runs in values.items()}
    one, other = analyse(values, "p0"), analyse(moved, "p0")
    for name, effect in one.effects.items():
        assert other.effects[name].difference == pytest.approx(effect.difference)
        assert other.effects[name].p == pytest.approx(effect.p)


def test_studies_of_nothing_claim_something_in_at_most_one_of_twenty_and_intervals_cover() -> None:
    """73 of 1,000 is beyond 0.1% of luck for a rate of 5%."""
    draw = np.random.default_rng(0)
    claims, covered, intervals = 0, 0, 0
    for _ in range(1000):
        effects = analyse(made_up(11, 3, draw), "p0").effects.values()
        claims += any(effect.claimed for effect in effects)
        covered += sum(effect.low < 0 < effect.high for effect in effects)  # type: ignore[operator]
        intervals += len(effects)
    assert claims <= 73
    assert 0.935 <= covered / intervals <= 0.965


def test_an_effect_of_four_noises_is_found_in_nine_of_ten() -> None:
    draw = np.random.default_rng(0)
    found = sum(analyse(made_up(11, 3, draw, effect=-4.0), "p0").effects["p1"].claimed for _ in range(400))
    assert found / 400 >= 0.9


@pytest.mark.parametrize(("effect", "sd"), [(1.0, 1.0), (0.5, 1.0), (0.05, 0.02), (3.0, 1.0)])
def test_seeds_of_one_comparison_are_those_of_the_paired_t_test(effect: float, sd: float) -> None:
    exact = TTestPower().solve_power(effect_size=effect / (sd * math.sqrt(2)), alpha=0.05, power=0.8)
    assert seeds_needed(effect, sd, 1) == math.ceil(float(exact))


@pytest.mark.parametrize("comparisons", [1, 4, 10])
def test_seeds_of_many_comparisons_use_the_noise_of_all_points(comparisons: int) -> None:
    """The fewest whose power, with the degrees of freedom that such a study has, reaches 80%."""
    draw = np.random.default_rng(0)

    def power(seeds: int) -> float:
        degrees = analyse(made_up(comparisons + 1, seeds, draw), "p0").noise.degrees
        return power_of(2.0, math.sqrt(2 / seeds), degrees, comparisons)

    needed = seeds_needed(2.0, 1.0, comparisons)
    assert needed is not None and power(needed - 1) < 0.8 <= power(needed)


def test_power_is_that_of_the_definition() -> None:
    """P(|Z + shift| > t sqrt(V / df)), integrated over the chi-squared V."""
    threshold = stats.t.ppf(1 - 0.05 / 10 / 2, 20)

    def given(chi: float) -> float:
        reach = threshold * math.sqrt(chi / 20)
        return float(stats.chi2.pdf(chi, 20) * (stats.norm.sf(reach - 4) + stats.norm.cdf(-reach - 4)))

    assert power_of(4.0, 1.0, 20, 10) == pytest.approx(integrate.quad(given, 0, 200)[0], abs=1e-6)


def test_the_smallest_difference_is_found_in_eight_of_ten() -> None:
    """By simulation, with the level that is shared by all points (Holm finds a little more)."""
    draw, found = np.random.default_rng(2), 0
    smallest = smallest_detectable(1.0, 8, 3, 4)
    for _ in range(600):
        effect = analyse(made_up(5, 3, draw, effect=smallest), "p0").effects["p1"]
        found += (effect.p or 1.0) < 0.05 / 4
    assert found / 600 == pytest.approx(0.8, abs=0.05)


def test_seeds_for_effects_that_cannot_be_seen() -> None:
    assert seeds_needed(0.0, 1.0, 3) is None and seeds_needed(1e-6, 1.0, 3) is None
    assert seeds_needed(1.0, 0.0, 3) == 2
    counts = [seeds_needed(effect, 1.0, 10) or 0 for effect in (4.0, 2.0, 1.0, 0.5)]
    assert counts == sorted(counts) and counts[0] >= 2


def test_a_point_that_diverged_does_not_drown_the_others() -> None:
    values = made_up(8, 3, np.random.default_rng(3), effect=-8.0)
    alone = analyse({name: runs for name, runs in values.items() if name != "p5"}, "p0")
    values["p5"][1] += 40
    analysis = analyse(values, "p0")
    assert analysis.uneven == ["p5"]
    for name, effect in alone.effects.items():
        assert analysis.effects[name].difference == pytest.approx(effect.difference)
        assert analysis.effects[name].error == pytest.approx(effect.error)
    assert analysis.effects["p1"].claimed
    reference = stats.ttest_rel(list(values["p5"].values()), list(values["p0"].values()))
    assert analysis.effects["p5"].p == pytest.approx(reference.pvalue) and not analysis.effects["p5"].pooled


def test_noise_without_a_new_fit_is_that_of_the_fit() -> None:
    """Also beside a run that is wildly off."""
    values = made_up(6, 4, np.random.default_rng(8))
    values["p3"][2] = 1e9
    for name, seed in (("p1", 0), ("p1", 1), ("p4", 3)):
        del values[name][seed]
    everything, *without = noise_without_each(values)
    fits = [fit({other: runs for other, runs in values.items() if other != name}, None)[1] for name in values]
    for quick, slow in zip([everything, *without], [fit(values, None)[1], *fits], strict=True):
        assert quick.degrees == slow.degrees and quick.squares == pytest.approx(slow.squares)


def test_two_that_diverged_do_not_hide_each_other() -> None:
    values = made_up(11, 3, np.random.default_rng(4))
    values["p2"][0] += 40
    values["p9"][2] -= 40
    assert uneven_points(values) == {"p2", "p9"}


def test_a_baseline_that_diverged_leaves_each_point_to_its_own_runs() -> None:
    values = made_up(6, 3, np.random.default_rng(6))
    values["p0"][2] += 50
    analysis = analyse(values, "p0")
    assert analysis.uneven == ["p0"] and analysis.smallest is None  # the common noise is not that of the differences
    assert not any(effect.pooled for effect in analysis.effects.values())
    reference = stats.ttest_rel(list(values["p3"].values()), list(values["p0"].values()))
    assert analysis.effects["p3"].p == pytest.approx(reference.pvalue)


def test_one_seed_has_differences_and_nothing_else() -> None:
    analysis = analyse({"p0": {0: 4.0}, "p1": {0: 3.9}, "p2": {0: 4.2}}, "p0")
    assert analysis.effects["p1"].difference == pytest.approx(-0.1)
    assert analysis.noise.sd is None and analysis.smallest is None
    for effect in analysis.effects.values():
        assert (effect.error, effect.low, effect.p, effect.adjusted_p, effect.claimed) == (None,) * 4 + (False,)


def test_points_that_no_seed_joins_to_the_baseline_have_no_effect() -> None:
    """p1 shares a seed with the baseline, p2 only with p1, p3 with nobody."""
    values: Values = {"p0": {0: 4.0, 1: 4.1}, "p1": {1: 3.9, 2: 3.8}, "p2": {2: 3.5}, "p3": {9: 1.0}, "p4": {}}
    effects = analyse(values, "p0").effects
    assert set(effects) == {"p1", "p2"}
    assert effects["p2"].difference == pytest.approx((3.9 - 4.1) + (3.5 - 3.8)) and effects["p2"].seeds == 0
    assert analyse({"p1": {0: 1.0}}, "p0").effects == {}


def test_runs_that_are_bit_for_bit_alike_show_no_effect() -> None:
    """A knob at its off value gives the baseline's own numbers."""
    runs = {0: 4.123456789, 1: 4.2, 2: 4.05}
    effect = analyse({"p0": runs, "p1": dict(runs)}, "p0").effects["p1"]
    assert effect.difference == 0 and effect.p == 1.0 and not effect.claimed


def test_known_noise_is_pooled() -> None:
    values: Values = {"p0": {7: 4.0, 8: 4.2}, "p1": {7: 3.8, 8: 4.1}}
    alone, pooled = analyse(values, "p0"), analyse(values, "p0", Noise(squares=0.2, degrees=19))
    squares = alone.noise.squares + 0.2
    effect: Any = pooled.effects["p1"]
    assert effect.difference == alone.effects["p1"].difference and effect.degrees == 20
    assert effect.error == pytest.approx(math.sqrt(squares / 20 * 2 / 2))
