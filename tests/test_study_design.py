"""Which runs a study asks for, stage after stage, worked out by hand on made-up run directories."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from made_up_study import make_study, write_run

from studies.design import Design, design
from studies.space import Study

GOOD, NEXT, THIRD = "p3", "p7", "p9"
EFFECTS = {GOOD: -0.3, NEXT: -0.2, THIRD: -0.1}


def eleven_points(directory: Path, **changes: object) -> Study:
    space = [{"name": f"p{row}", "regularizers.weight_decay": 1.0 + row} for row in range(1, 11)]
    return make_study(directory, search="list", space=space, **({"seeds": 4, "confirm_seeds": 5} | changes))


def go_on(study: Study, effects: dict[str, float], failing: tuple[str, int] | None = None) -> Design:
    """Finish what is wanted; the point's effect counts, and what the multiple of its learning rate adds."""
    known = design(study)
    for point, seed in known.wanted:
        bit = 0.0 if point.name.startswith("baseline") else 1e-4 * int(point.name.split(",")[0][1:])
        end = 4.0 + 0.01 * seed + effects.get(point.name, effects.get(point.origin or "", 0.0)) + bit
        if (point.name, seed) == failing:
            write_run(study, point, seed, math.nan)
        elif not study.run_directory(point, seed).exists():
            write_run(study, point, seed, end)
    return design(study)


def asked(known: Design) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for point, seed in known.wanted:
        seeds.setdefault(point.name, []).append(seed)
    return seeds


def test_a_study_of_eleven_points_is_halved_and_confirmed_in_39_runs(tmp_path: Path) -> None:
    study = eleven_points(tmp_path)
    known = design(study)
    everyone = [point.name for point in study.points()]
    assert known.stage == "search" and asked(known) == {name: [0, 1] for name in everyone}
    known = go_on(study, EFFECTS)
    third = {"baseline": [0, 1, 2], GOOD: [0, 1, 2], NEXT: [0, 1, 2], THIRD: [0, 1, 2]}
    assert known.stage == "search" and asked(known) == {name: [0, 1] for name in everyone} | third
    known = go_on(study, EFFECTS)
    assert known.stage == "search" and asked(known)[NEXT] == [0, 1, 2, 3] and asked(known)[THIRD] == [0, 1, 2]
    known = go_on(study, EFFECTS)
    assert known.stage == "fresh" and known.winner is not None and known.winner.name == GOOD
    assert [point.name for point in known.finalists] == [GOOD, NEXT] and known.fresh() == {}
    fresh = list(range(1000, 1005))
    assert asked(known)[GOOD] == asked(known)["baseline"] == [0, 1, 2, 3, *fresh]
    known = go_on(study, EFFECTS)
    assert known.stage == "done" and len(known.wanted) == 39
    assert list(known.fresh()) == [GOOD, "baseline"] and list(known.fresh()[GOOD]) == fresh
    # One of the winner's runs is lost: the study goes back to asking for it.
    shutil.rmtree(study.run_directory(known.winner or study.points()[0], 1002))
    assert design(study).stage == "fresh" and design(study).fresh() == {}


def test_a_stage_chooses_by_its_own_seeds(tmp_path: Path) -> None:
    """What a point did on later seeds, where it is there already, does not change who goes on."""
    study = eleven_points(tmp_path)
    go_on(study, EFFECTS)
    for seed in (2, 3):
        write_run(study, study.points()[0], seed, 4.0)
        write_run(study, study.points()[1], seed, 1.0)
    assert asked(design(study))["p1"] == [0, 1]


def test_contenders_are_tuned_alike_on_seeds_of_their_own_and_further_at_an_edge(tmp_path: Path) -> None:
    """The baseline does best at a quarter of the rate, below the multiples asked for; so all are tried there."""
    study = eleven_points(tmp_path, tune={"lr": [0.5, 1, 2]})
    rates = {"baseline": {0.25: -0.25, 0.5: -0.2, 0.125: -0.1}, GOOD: {}, NEXT: {0.5: -0.05}}
    effects = dict(EFFECTS)
    for point in study.points():
        for multiple, gain in rates.get(point.name, {}).items():
            effects[study.tuned(point, multiple).name] = effects.get(point.name, 0.0) + gain
    for _ in range(3):
        known = go_on(study, effects)
    assert known.stage == "tuning"
    tuned = {name: seeds for name, seeds in asked(known).items() if 2000 in seeds}
    assert set(tuned) == {
        "baseline", "baseline,lr=0.001", "baseline,lr=0.004",
        GOOD, f"{GOOD},lr=0.001", f"{GOOD},lr=0.004", NEXT, f"{NEXT},lr=0.001", f"{NEXT},lr=0.004",
    }  # fmt: skip
    assert tuned[f"{GOOD},lr=0.001"] == [2000, 2001] and study.config(study.points()[3], 0).optimizer.lr == 0.002
    while known.stage == "tuning":
        known = go_on(study, effects)
    assert known.tried == [0.125, 0.25, 0.5, 1, 2] and known.chosen == {"baseline": 0.25, GOOD: 1, NEXT: 0.5}
    assert known.baseline.name == "baseline,lr=0.0005" and known.winner is not None
    assert known.winner.name == GOOD and asked(known)["baseline,lr=0.0005"][2:] == list(range(1000, 1005))
    assert set(known.contest()) == {"baseline,lr=0.0005", GOOD, f"{NEXT},lr=0.001"}
    known = go_on(study, effects)
    assert known.stage == "done" and set(known.fresh()) == {"baseline,lr=0.0005", GOOD}


def test_a_rate_at_which_a_run_fails_is_not_chosen(tmp_path: Path) -> None:
    study = eleven_points(tmp_path, tune={"lr": [0.5, 1, 2]})
    effects = EFFECTS | {f"{GOOD},lr=0.001": -0.9, f"{GOOD},lr=0.004": 0.0, f"{NEXT},lr=0.001": 0.0}
    effects |= {f"{NEXT},lr=0.004": 0.0, "baseline,lr=0.001": 0.1, "baseline,lr=0.004": 0.1}
    for _ in range(3):
        known = go_on(study, effects)
    known = go_on(study, effects, failing=(f"{GOOD},lr=0.001", 2001))
    assert known.stage == "fresh" and known.chosen == {"baseline": 1, GOOD: 1, NEXT: 1} and known.tried == [0.5, 1, 2]


def test_a_gain_that_is_one_of_the_learning_rate_ends_the_study(tmp_path: Path) -> None:
    study = eleven_points(tmp_path, tune={"lr": [0.5, 1, 2]})
    effects = EFFECTS | {"baseline,lr=0.001": -0.5}
    known = design(study)
    while known.stage != "done":
        known = go_on(study, effects)
    assert known.winner is None and known.fresh() == {}
    assert 1000 not in {seed for _, seed in known.wanted}


def test_nothing_that_leads_asks_for_nothing_more(tmp_path: Path) -> None:
    study = eleven_points(tmp_path)
    for _ in range(3):
        known = go_on(study, {f"p{row}": 0.1 for row in range(1, 11)})
    assert known.stage == "done" and known.winner is None and len(known.wanted) == 29


def test_what_failed_is_not_taken_further_and_a_failed_fresh_run_is_told(tmp_path: Path) -> None:
    study = eleven_points(tmp_path)
    go_on(study, EFFECTS, failing=(GOOD, 1))
    for _ in range(2):
        known = go_on(study, EFFECTS)
    assert known.winner is not None and known.winner.name == NEXT and asked(known)[GOOD] == [0, 1]
    known = go_on(study, EFFECTS, failing=("baseline", 1003))
    assert known.stage == "done" and math.isnan(known.fresh()["baseline"][1003])


def test_a_study_of_an_earlier_version_counts_all_its_runs_as_exploration(tmp_path: Path) -> None:
    """All points on all seeds, and what were fresh seeds then: the latter are not used, the claim needs new ones."""
    study = eleven_points(tmp_path, seeds=3)
    for point in study.points():
        for seed in range(6 if point.name in ("baseline", NEXT) else 3):
            gain = {GOOD: -0.5 * (seed == 2), NEXT: -0.1}.get(point.name, 0.0)  # the best by the last seed alone
            write_run(study, point, seed, 4.0 + gain)
    known = design(study)
    assert known.stage == "fresh" and known.winner is not None and known.winner.name == GOOD
    assert sorted({seed for _, seed in known.wanted}) == [0, 1, 2, *range(1000, 1005)]


@pytest.mark.parametrize(
    ("seeds", "rungs"),
    [(1, [[0], [0], [0]]), (3, [[0], [0, 1], [0, 1, 2]]), ([7, 5, 9, 8], [[7, 5], [7, 5, 9], [7, 5, 9, 8]])],
)
def test_the_seeds_of_the_stages(seeds: object, rungs: list[list[int]], tmp_path: Path) -> None:
    study = eleven_points(tmp_path, seeds=seeds)
    assert study.rungs == rungs
    purposes = [{seed for rung in rungs for seed in rung}, set(study.fresh_seeds), set(study.tuning_seeds)]
    assert sum(map(len, purposes)) == len(set.union(*purposes))
