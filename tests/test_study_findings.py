"""What made-up studies with a known truth are said to show, in words."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_up_study import make_study, write_run, write_runs
from scipy import stats
from test_study_report import page_of, truth

from studies import runner
from studies.findings import answer, find
from studies.report import ranking_rows
from studies.results import Result, collect
from studies.space import Study, confirmation_seeds


def test_selection_does_not_flatter(tmp_path: Path) -> None:
    """Of 22 points that do nothing the best leads by a noise and more where it was chosen, and by nothing elsewhere."""
    study = make_study(
        tmp_path, space=[{"regularizers.weight_decay": 1 + row / 10} for row in range(22)], search="list"
    )
    draw, leads, confirmed, claims = np.random.default_rng(0), [], [], 0
    for _ in range(120):
        results = [
            Result(point, seed, "finished", {}, [], draw.normal(), Path(), seed not in study.seeds)
            for point in study.points()
            for seed in [*study.seeds, *confirmation_seeds(study)]
        ]
        findings = find(study, results)
        assert findings.winner is not None and findings.confirmed is not None
        leads.append(findings.search.effects[findings.winner.name].difference)
        confirmed.append(findings.confirmed.difference)
        claims += "lowers" in answer(findings)[0]
    error = math.sqrt(2 / 3 / 120)
    assert np.mean(leads) < -0.9 and abs(np.mean(confirmed)) < 3 * error
    assert claims <= 8  # 2.5% of 120 on the good side are 3


def test_nothing_found_is_said_with_the_noise_and_the_seeds_it_would_take(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 1, 3]})
    write_runs(study, lambda point: 0.0, random=1)
    findings = find(study, collect(study))
    one, two = answer(findings)
    assert one.startswith("No gain here is distinguishable from noise")
    assert f"{findings.search.noise.sd:.4f} nats per token" in one and f"from {findings.search.smallest:.4f} on" in one
    lead = findings.search.effects[findings.winner.name].difference if findings.winner else math.nan
    assert re.search(rf"To see a true difference of {-lead:.4f} .* needs (about [\d,]+|more than 10,000) seeds", two)


def ends_study(tmp_path: Path, ends: dict[str, list[float]]) -> Study:
    """Points of the ends given, on three seeds of the search and then on the fresh ones."""
    space = [{"name": name, "regularizers.weight_decay": row} for row, name in enumerate(ends, 1) if name != "baseline"]
    study = make_study(tmp_path, search="list", space=space)
    for point in study.points():
        for seed, end in zip([*study.seeds, *confirmation_seeds(study)], ends[point.name], strict=False):
            write_run(study, point, seed, end, test=end - 0.2)
    return study


def test_the_seeds_it_would_take_are_those_of_the_confirmed_difference(tmp_path: Path) -> None:
    """The lead in the search flatters; where the fresh seeds show none there is nothing to plan."""
    base, other = [4.0, 4.1, 4.2, 4.0, 4.1, 4.2], [4.03, 4.08, 4.21]
    for number, (fresh, words) in enumerate(
        (([3.97, 4.11, 4.19], "To see a true difference of 0.0100 "), ([4.03, 4.09, 4.22], None))
    ):
        ends = {"baseline": base, "good": [3.95, 4.08, 4.13, *fresh], "other": other}
        two = answer(find(study := ends_study(tmp_path / str(number), ends), collect(study)))[1]
        assert "led the search by 0.0467" in two
        assert words in two if words else "To see a true difference" not in two


def test_a_gain_of_the_search_that_is_not_confirmed_is_said(tmp_path: Path) -> None:
    ends = {"baseline": [4.0, 4.1, 4.2, 4.0, 4.1, 4.2], "good": [3.9, 4.001, 4.099, 3.998, 4.101, 4.198]}
    findings = find(study := ends_study(tmp_path, ends), collect(study))
    assert findings.search.effects["good"].claimed
    one, two = answer(findings)
    assert re.match(r"good did better than the baseline in the search \(p .*, adjusted for 1 point\), but", one), one
    assert one.endswith("that was not confirmed on 3 fresh seeds.") and "led the search by 0.1" in two


def test_a_baseline_of_its_own_noise_leaves_the_smallest_difference_open(tmp_path: Path) -> None:
    ends = {name: [4.0 + row / 50, 4.1 + row / 50, 4.2 + row / 50 + row / 999] for row, name in enumerate("abcdef")}
    findings = find(study := ends_study(tmp_path, ends | {"baseline": [4.0, 9.1, 4.2]}), collect(study))
    assert findings.search.uneven == ["baseline"] and "this study sees" not in " ".join(answer(findings))
    assert "no common noise to tell by" in page_of(study)


@pytest.mark.parametrize("noisy", ["good", "baseline"])
def test_a_point_of_its_own_noise_is_confirmed_by_its_own_fresh_runs(noisy: str, tmp_path: Path) -> None:
    """The calm points' noise says nothing of it: val and test on the fresh seeds are the paired t test."""
    ends = {"baseline": [4.0, 4.1, 4.2, 4.0, 4.1, 4.2], "good": [3.9, 4.0, 4.1, 3.91, 4.05, 4.13]}
    ends |= {name: [4.02 + row / 99, 4.12 + row / 98, 4.22 + row / 97] for row, name in enumerate("abcdef")}
    ends[noisy] = [ends[noisy][0] + 0.9, ends[noisy][1] - 0.9, ends[noisy][2] - 0.9, *ends[noisy][3:]]
    ends["good"] = [end - 2 * (noisy == "baseline") for end in ends["good"]]
    study = ends_study(tmp_path, ends)
    findings = find(study, collect(study))
    assert findings.search.uneven == [noisy] and findings.winner is not None and findings.winner.name == "good"
    expected = stats.ttest_rel(ends["good"][3:], ends["baseline"][3:]).pvalue
    assert findings.confirmed is not None and findings.confirmed.p == pytest.approx(expected)
    assert findings.test is not None and findings.test.p == pytest.approx(expected)


def test_without_fresh_seeds_the_page_warns(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]})
    write_runs(study, truth, noise=0.002)
    page = page_of(study)
    assert "which flatters it" in page and "Not confirmed." in page and "has not been run on fresh seeds" in page


def test_a_baseline_that_is_best_stays(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.residual_dropout": [0.1, 0.2]})
    write_runs(study, truth, noise=0.005)
    one, two = answer(find(study, collect(study)))
    assert one.startswith("No point did better than the baseline: the nearest, residual_dropout=0.1, ended 0.0")
    assert two.startswith("2 of 2 points are distinguishably worse")
    assert runner.to_confirm(study) is None  # its runs on fresh seeds are saved
    page = page_of(study)
    assert "none was run again on fresh seeds" in page and "--run.name=winner" not in page
    write_runs(study, truth, noise=0.005, confirm=("baseline", "residual_dropout=0.1"))  # as an earlier version did
    said = answer(find(study, collect(study)))
    assert said[0].startswith("No point did better than the baseline") and "led the search" not in " ".join(said)


def test_a_baseline_that_is_best_on_one_seed_is_not_called_beaten(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.residual_dropout": [0.1, 0.2]}, seeds=1)
    write_runs(study, truth, noise=0.005)
    one, _ = answer(find(study, collect(study)))
    assert "no point did better than the baseline" in one and "came out best" not in one


def test_one_seed_says_so_and_gives_no_interval(tmp_path: Path) -> None:
    study = make_study(tmp_path, seeds=1)
    write_runs(study, truth)
    page = page_of(study)
    assert "One seed cannot tell an effect from luck" in page and "There are no intervals" in page
    assert all(row["low"] is row["p"] is None for row in ranking_rows(find(study, collect(study))))
