"""What made-up studies with a known truth are said to show, in words that a person reads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_up_study import make_study, write_run

from config import BadInput
from studies.design import design
from studies.findings import Findings, answer, cautions, find
from studies.results import metric_value
from studies.space import Study

SEEDS = [4.0, 4.1, 4.2, 4.0]  # what a seed brings to all points
LUCK = [0.003, -0.002, 0.001, -0.004, 0.002, 0.0, -0.001, 0.004]


def ends_study(
    directory: Path, gains: dict[str, float], fresh: dict[str, float] | None = None, **changes: Any
) -> Study:
    """Points that end lower than the baseline by their gain, and by ``fresh`` of it on fresh seeds; run to the end."""
    space = [{"name": name, "regularizers.weight_decay": 1.0 + row} for row, name in enumerate(gains)]
    study = make_study(directory, **({"search": "list", "space": space, "seeds": 4, "confirm_seeds": 8} | changes))
    on_fresh = gains | (fresh or {})
    known = design(study)
    while known.stage != "done":
        for point, seed in known.wanted:
            gain = (on_fresh if seed >= 1000 else gains).get(point.origin or point.name, 0.0)
            wobble = 0.0 if point.name == "baseline" else LUCK[(seed + len(point.name)) % 8]
            if not study.run_directory(point, seed).exists():
                write_run(study, point, seed, SEEDS[seed % 4] - gain + wobble, test=SEEDS[seed % 4] - 0.2 - gain)
        known = design(study)
    return study


def told(study: Study) -> tuple[Findings, str, str]:
    """The findings, the answer and the cautions."""
    findings = find(study)
    return findings, " ".join(answer(findings)), " ".join(cautions(findings))


def test_a_gain_on_fresh_seeds_is_claimed_with_its_doubt(tmp_path: Path) -> None:
    findings, words, _ = told(ends_study(tmp_path, {"good": 0.05, "other": 0.0}, {"good": 0.03}))
    decision = findings.decision
    assert decision.claim == "better" and decision.seeds == 8 and decision.degrees == 10
    differences = [-0.03 + LUCK[(seed + 4) % 8] for seed in range(1000, 1008)]
    assert decision.difference == pytest.approx(sum(differences) / 8)
    low, high = sorted((-(decision.low or 0), -(decision.high or 0)))
    bits = -sum(differences) / 8 / math.log(2) / 2.2
    for sentence in (
        "good lowers val/loss by 0.0296 nats per token against the baseline "
        f"(95% interval {low:.4f} to {high:.4f}; {bits:.4f} bits per byte).",
        "measured on 8 fresh seeds by which nothing was chosen: in a world where it does nothing, a gain this large "
        "would appear less than once in 10,000 studies.",
        "Both ran at the base's learning rate: how much of a gain another rate would bring alone is not known.",
        "test/loss is 0.0300 lower on these seeds",
    ):
        assert sentence in words, words


def test_a_gain_that_fresh_seeds_do_not_show_is_luck_and_what_would_tell_is_said(tmp_path: Path) -> None:
    findings, words, _ = told(ends_study(tmp_path, {"good": 0.05, "other": 0.0}, {"good": 0.0007}))
    assert findings.decision.why_not == "luck"
    assert "No gain here is distinguishable from luck: the best, good, ends 0.000" in words
    assert "Such a study sees a true gain from 0.00" in words
    _, words, _ = told(ends_study(tmp_path / "worse", {"good": 0.05, "other": 0.0}, {"good": -0.02}))
    assert "nats per token worse than the baseline on 8 fresh seeds" in words and "lowers" not in words
    assert "would: confirm_seeds" not in words


def test_a_baseline_that_is_best_stays(tmp_path: Path) -> None:
    _, words, _ = told(ends_study(tmp_path, {"bad": -0.05, "worse": -0.1}))
    assert words.startswith("No point did better than the baseline in the search: the nearest, bad, ended 0.0492 nats")
    assert "Keep the baseline" in words


def test_before_fresh_seeds_nothing_is_claimed(tmp_path: Path) -> None:
    study = ends_study(tmp_path, {"good": 0.05, "other": 0.0}, confirm_seeds=0)
    _, words, notes = told(study)
    assert "Nothing is claimed yet: good leads the search by 0.0488" in words and "confirm_seeds: 0" in words
    assert "without fresh seeds the study explores" in notes
    with_fresh = Study.model_validate(study.model_dump() | {"confirm_seeds": 8})
    _, words, notes = told(with_fresh)
    assert (
        "The study is at its fresh, 0 of 16 fresh runs are over" in words and "16 of 28 runs are not finished" in notes
    )
    assert not (study.directory / "looks.json").exists()


def test_a_point_that_does_nothing_changed_nothing(tmp_path: Path) -> None:
    study = ends_study(tmp_path, {"good": 0.05, "other": 0.01})
    base, _, other = study.points()
    for seed in study.seeds:
        name = "metrics.jsonl"
        shutil.copy(study.run_directory(base, seed) / name, study.run_directory(other, seed) / name)
    findings, _, notes = told(study)
    assert "changed nothing, to the last digit of val/loss: other" in notes
    assert findings.rows[-1].point == "other" and not findings.rows[-1].may_win


def test_a_baseline_that_diverged_is_told(tmp_path: Path) -> None:
    """Finite but far off: its run is in the numbers, which claim nothing for it, and it is named."""
    study = ends_study(tmp_path, {"good": 0.003, "other": 0.0})
    write_run(study, study.points()[0], 1002, 9.0)
    findings, words, notes = told(study)
    assert findings.decision.claim is None and "distinguishable from luck" in words
    assert "fresh seeds would" not in words
    assert "baseline ended at 9.0112 on seed 1002, far from its others (4.06" in notes and "did it diverge?" in notes


def test_a_failed_fresh_run_forbids_a_claim(tmp_path: Path) -> None:
    study = ends_study(tmp_path, {"good": 0.05, "other": 0.0})
    write_run(study, study.points()[0], 1003, math.nan)
    findings, words, notes = told(study)
    assert findings.decision.failed == (("baseline", 1003),)
    assert words.startswith("Not confirmed: a run failed, baseline on the fresh seed 1003 (it ran to its end, but")
    assert "mend the cause and give the same command again" in words and "1 of 28 runs failed (baseline)" in notes


def test_a_winner_at_the_edge_is_told(tmp_path: Path) -> None:
    grid = {"search": "grid", "space": {"regularizers.weight_decay": [0.1, 1, 3], "residual_dropout": [0, 0.1]}}
    name = "weight_decay=3,residual_dropout=0"
    _, words, notes = told(ends_study(tmp_path, {name: 0.05}, **grid))
    assert "weight_decay=3, residual_dropout=0 lowers" in words
    assert "weight_decay=3 is the largest value tried; the best may be larger" in notes and "dropout" not in notes
    middle = "weight_decay=1,residual_dropout=0.1"  # of dropout a single value is tried
    assert "tried; the best" not in told(ends_study(tmp_path / "middle", {middle: 0.05}, **grid))[2]


def test_one_look_too_many_costs_the_claim(tmp_path: Path) -> None:
    """A gain that the first look claims is not claimed by the fifth, and the reader is told why."""
    study = ends_study(tmp_path, {"good": 0.05, "other": 0.0}, {"good": 0.003})
    assert told(study)[0].decision.claim == "better" and (study.directory / "looks.json").exists()
    looks = json.loads((study.directory / "looks.json").read_text())
    earlier = [{"seen": f"earlier {number}"} for number in range(4)]
    assert list(looks) == ["fresh seeds"] and looks["fresh seeds"][0]["points"] == ["good", "baseline"]
    (study.directory / "looks.json").write_text(json.dumps({"fresh seeds": earlier}))
    findings, words, _ = told(study)
    assert findings.look == 5 and findings.decision.claim is None
    assert "This is look 5 at fresh results; earlier ones spent part of the 5%, so that this needs 99.7%." in words


def test_each_at_its_own_learning_rate(tmp_path: Path) -> None:
    """The baseline does better at half the rate: what is claimed is less than what the search saw at one rate."""
    tuned = {"tune": {"lr": [0.5, 1, 2]}}
    space = [{"name": name, "regularizers.weight_decay": 1.0} for name in ("good",)]
    study = make_study(tmp_path, search="list", space=space, seeds=4, confirm_seeds=8, **tuned)
    gains = {"baseline,lr=0.001": 0.03, "good": 0.05, "good,lr=0.001": 0.04, "good,lr=0.004": 0.02}
    while (known := design(study)).stage != "done":
        for point, seed in known.wanted:
            write_run(study, point, seed, 4.0 - gains.get(point.name, 0.0) + LUCK[(seed + len(point.name)) % 8])
    findings, words, notes = told(study)
    assert findings.winner is not None and findings.winner.name == "good"
    assert findings.decision.difference == pytest.approx(-0.02, abs=0.002)
    assert "good lowers val/loss by 0.0" in words
    assert "Each had its own best lr: the base's, and for the baseline 0.5 times the base's." in words
    assert "At one lr for all it led the search by 0.0" in words and "the end of those tried" not in notes


def test_a_gain_of_the_learning_rate_alone(tmp_path: Path) -> None:
    space = [{"name": "good", "regularizers.weight_decay": 1.0}]
    study = make_study(tmp_path, search="list", space=space, seeds=2, tune={"lr": [0.5, 1, 2]})
    gains = {"baseline,lr=0.001": 0.09, "baseline": -0.01, "good": 0.05}
    while (known := design(study)).stage != "done":
        for point, seed in known.wanted:
            write_run(study, point, seed, 4.0 - gains.get(point.name, 0.0) + LUCK[(seed + len(point.name)) % 8])
    _, words, _ = told(study)
    assert words.startswith("No point did better than the baseline once each had its own learning rate. At one rate")


def test_what_a_run_counts_with(tmp_path: Path) -> None:
    """The last evaluation, or the best for all; of averaged weights where there are some."""

    def run(records: list[dict[str, Any]], metric: str = "val/loss") -> float | None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return metric_value(tmp_path, metric)

    lines: list[dict[str, Any]] = [
        {"step": 1, "val/loss": 3.0},
        {"step": 2, "val/loss": 2.0},
        {"step": 3, "val/loss": 2.5},
    ]
    assert run(lines) == 2.5 and run(lines, "best val/loss") == 2.0
    accuracy = [{"step": step, "val/accuracy": value} for step, value in enumerate((0.1, 0.3, 0.2))]
    assert run(accuracy, "best val/accuracy") == 0.3
    diverged = [*lines, {"step": 5, "val/loss": None}]
    assert run(diverged) is None and run(diverged, "best val/loss") == 2.0
    assert run([*lines, {"step": 5, "val/loss": 1e300}]) is None
    averaged = [record | {"val_average/loss": record["val/loss"] - 1} for record in lines]
    assert run(averaged) == 1.5 and run(averaged, "best val/loss") == 1.0
    assert run([*averaged, {"step": 5, "val/loss": 2.0, "val_average/loss": None}]) is None
    assert run([]) is None and metric_value(tmp_path / "nowhere", "val/loss") is None


def test_no_finished_run_is_told_with_the_way_out(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with pytest.raises(BadInput, match=r"no finished run in .*made-up \(12 waiting\).*python -m scripts\.study run"):
        find(study)
    write_run(study, study.points()[0], 0, 4.0, status="failed", error="OSError: disk full")
    with pytest.raises(BadInput, match="OSError: disk full"):
        find(study)
