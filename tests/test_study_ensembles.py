"""The average of a point's seeds in a study's report, on runs that are trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_study_runner import write_study

import train
from scripts.evaluate import main as evaluate
from scripts.study import main
from studies.space import read_study
from studies.worker import flags


def test_a_point_s_seeds_are_averaged_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    study = read_study(str(write_study(tmp_path)))
    for point in study.points():
        for seed in study.seeds:
            assert train.main(flags(study.config(point, seed))) == 0
    assert main(["report", "study.yaml"]) == 0
    assert "ensemble" not in (study.directory / "report.html").read_text()
    assert main(["report", "study.yaml", "--ensembles"]) == 0
    held = json.loads((study.directory / "ensembles.json").read_text())
    # The same number as the command that evaluates several runs.
    runs = [str(study.run_directory(study.points()[1], seed)) for seed in study.seeds]
    assert evaluate([*runs, "--ensemble", "--split=val", "--save=both.json"]) == 0
    expected = json.loads(Path("both.json").read_text())["val"]
    mine = held["weight_decay=1"]
    assert mine["loss"] == pytest.approx(expected["after"][-1]["loss"]) and mine["seeds"] == [0, 1]
    assert mine["members"] == pytest.approx(sum(expected["members"]) / 2) and mine["loss"] < mine["members"]
    page = (study.directory / "report.html").read_text()
    assert f"<td>{mine['loss']:.4f}</td>" in page and "Averaged as probabilities, the 2 seeds of the winner" in page
    capsys.readouterr()
    assert main(["report", "study.yaml", "--ensembles"]) == 0
    assert "the mean of 2 seeds" not in capsys.readouterr().out  # nothing is evaluated twice
