"""Pilots, power, registrations and cards: numbers from outside, made-up studies, and the command killed on its way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, made_up_text
from made_up_study import make_study, write_run, write_runs

from config import BadInput
from scripts.study import main
from studies import plan as planning
from studies.design import design, runs_of
from studies.plan import card, plan, seconds_of, spread
from studies.record import deviations, register
from studies.results import read_result
from studies.space import FRESH_SEEDS, PILOT_SEEDS, Study
from tracking.run_directory import read_summary, update_summary


def tiny_base(directory: Path, **changes: Any) -> dict[str, Any]:
    """The sections of a tiny run on a made-up text in ``directory``."""
    (directory / "text.txt").write_text(made_up_text())
    sections: dict[str, Any] = {}
    for key, value in (TINY | {"data.path": str(directory / "text.txt")} | changes).items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return sections | {"run": sections["run"] | {"dir": str(directory / "runs")}}


def planned_study(directory: Path, **changes: Any) -> Study:
    """A study of two points besides the baseline, nothing of which was run yet."""
    space = {"regularizers.weight_decay": [1.0, 3.0]}
    return make_study(directory, **{"base": tiny_base(directory), "space": space, "seeds": 2} | changes)


def test_the_spread_of_few_pairs_and_its_interval() -> None:
    # The factors of the chi-square interval at 95%, as tables give them.
    sd, ends = spread([-(0.5**0.5), 0.5**0.5])
    assert (sd, *ends) == pytest.approx((1, 0.446, 31.9), rel=2e-3)
    ten = np.arange(10.0)
    sd, ends = spread(ten.tolist())
    assert (sd, ends[0] / sd, ends[1] / sd) == pytest.approx((ten.std(ddof=1), 0.688, 1.826), rel=1e-3)


def pilot_runs(monkeypatch: pytest.MonkeyPatch, differences: list[float], **summary: Any) -> list[Any]:
    """Let pilot runs come out so; returns the list of those asked for."""
    asked: list[Any] = []

    def train(study: Study, pairs: list[Any]) -> int:
        for point, seed in pairs:
            asked.append((point.name, seed))
            gain = 0.0 if point.baseline else differences[seed - PILOT_SEEDS]
            write_run(study, point, seed, 4 + gain, **summary)
        return 0

    monkeypatch.setattr(planning, "run_pairs", train)
    return asked


def test_a_plan_says_what_the_study_could_see_and_registers_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = pilot_runs(monkeypatch, [-0.01, -0.03], tokens_per_second=15_360.0)
    study = planned_study(tmp_path, confirm_seeds=5, workers=2)
    assert plan(study, 2, None, [0.01, 0.0001]) == 0
    said = capsys.readouterr().out
    assert asked == [(name, seed) for seed in (3000, 3001) for name in ("baseline", "weight_decay=3")]
    assert "varies by 0.0141 (95% interval 0.0063 to 0.4513)" in said, said
    assert "2 pairs hardly tell the spread: it may be 32 times as large" in said
    row = next(line.split() for line in said.splitlines() if line.split()[:1] == ["0.0100"])
    powers = [int(cell.rstrip("%")) for cell in row[1:6]]
    assert powers == sorted(powers)  # at 4, 5, 8, 16 and 32 fresh seeds
    draw, hits = np.random.default_rng(0), 0  # a t test with one degree of freedom more, from two pairs of the search
    for _ in range(4000):
        search, fresh = draw.normal(0, 0.0141, 2), draw.normal(0.01, 0.0141, 16)
        sd = np.sqrt((search.var() * 2 + fresh.var() * 16) / 16)
        hits += fresh.mean() / (sd / 4) > 2.12  # the 97.5% point of t with 16 degrees
    assert powers[3] == pytest.approx(100 * hits / 4000, abs=3)
    assert "over 10,000" in said  # pairs for a gain of a hundredth of the spread
    assert re.search(r"runs +16 \(6 search, 10 fresh\)", said), said
    assert re.search(r"time +10 s a run, 0.0 hours in all at 2 at a time", said), (
        said
    )  # 153,600 tokens at 15,360 a second

    held = json.loads((study.directory / "registered.json").read_text())
    assert held["points"] == {p.name: p.knobs for p in study.points()} and held["confirm_seeds"] == 5
    assert held["alpha"] == 0.05 and len(held["corpora"]) == 1 and held["base"]["model.d_model"] == 32
    assert plan(study, 1, "weight_decay=1") == 0  # nothing was run yet: it is replaced
    said = capsys.readouterr().out
    assert asked[-1] == ("weight_decay=1", 3000) and "one pair shows none" in said


def test_a_failed_pilot_registers_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pilot_runs(monkeypatch, [float("nan")])
    study = planned_study(tmp_path)
    assert plan(study, 1) == 4
    assert "weight_decay=3 seed 3000: it ran to its end, but the metric" in capsys.readouterr().err
    assert not (study.directory / "registered.json").exists()


def test_pairs_that_do_not_differ_tell_no_power(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pilot_runs(monkeypatch, [0.0, 0.0])
    assert plan(planned_study(tmp_path), 2) == 0
    assert "no power can be told" in capsys.readouterr().out


def test_a_plan_after_the_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = planned_study(tmp_path)
    assert plan(study, 0) == 0
    before = (study.directory / "registered.json").read_text()
    write_run(study, study.points()[0], 0, 4.0)
    with pytest.raises(BadInput, match=r"is registered in .* give the study another 'name'"):
        plan(study, 0)
    assert (study.directory / "registered.json").read_text() == before
    (study.directory / "registered.json").unlink()
    with pytest.raises(BadInput, match="was not registered before"):
        plan(study, 0)
    with pytest.raises(BadInput, match="no point is named 'x'; there are weight_decay=1, weight_decay=3"):
        planning.pilot_point(study, "x")


@pytest.mark.parametrize("changes", [{}, {"tune": {"optimizer.lr": [0.5, 1.0, 2.0]}}, {"seeds": 5, "confirm_seeds": 0}])
@pytest.mark.parametrize("points", [1, 2, 11])
def test_the_runs_told_are_those_that_are_made(tmp_path: Path, changes: dict[str, Any], points: int) -> None:
    space = {"regularizers.weight_decay": [1.0 + number for number in range(points)]}
    study = make_study(tmp_path, **{"space": space, "seeds": 4} | changes)
    told = runs_of(study, len(study.points()) - 1)
    while True:
        known = design(study)
        left = [pair for pair in known.wanted if not known.result(*pair).over]
        if not left:
            break
        for point, seed in left:
            decay = point.knobs.get("regularizers.weight_decay", 9)
            write_run(study, point, seed, 4 + decay / 100 + 0.1 * ("lr=" in point.name) + 1e-4 * (seed % 7) * decay)
    assert len(known.wanted) == sum(told.values())
    assert sum(seed < FRESH_SEEDS for _, seed in known.wanted) == told["search"]


def test_every_deviation_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = planned_study(tmp_path)
    assert deviations(study) == []  # nothing is registered
    register(study, study.directory / "registered.json")
    held = json.loads((study.directory / "registered.json").read_text())
    for point in study.points():
        write_run(study, point, 0, 4.0, corpus=held["corpora"][0], versions={"commit": held["commit"]})
    write_run(study, study.points()[0], PILOT_SEEDS, 4.0, corpus="of-a-pilot")
    assert deviations(study) == []

    def changed(**changes: Any) -> list[str]:
        return deviations(Study.model_validate(study.model_dump() | changes))

    assert changed(seeds=3) == ["seeds is [0, 1, 2], registered was [0, 1]"]
    assert changed(confirm_seeds=9, metric="val/bits_per_byte") == [
        'metric is "val/bits_per_byte", registered was "val/loss"',
        "confirm_seeds is 9, registered was 3",
    ]
    assert changed(tune={"optimizer.lr": [0.5, 1, 2]}) == [
        'tune is {"optimizer.lr": [0.5, 1.0, 2.0]}, registered was null'
    ]
    assert changed(space={"weight_decay": [1.0, 5.0]}) == [
        "point weight_decay=5 was added",
        "point weight_decay=3 was left out",
    ]
    assert changed(baseline={"weight_decay": 0.5}) == [
        'point baseline is {"regularizers.weight_decay": 0.5}, registered was {}'
    ]
    longer = tiny_base(tmp_path, **{"training.max_steps": "48", "optimizer.lr": "0.01"})
    assert sorted(changed(base=longer)) == [
        "optimizer.lr is 0.01, registered was 0.002",
        "training.max_steps is 48, registered was 24",
    ]
    for directory in study.directory.glob("*-seed0"):
        update_summary(directory, versions={"commit": "abc"}, corpus="0123")
    lines = deviations(study)
    assert f"runs were made by the code of commit abc, registered was {held['commit']}" in lines
    assert f"runs were made on the corpus 0123, registered was {held['corpora'][0]}" in lines
    (study.directory / "registered.json").write_text("{}")
    with pytest.raises(BadInput, match="restore it from a copy"):
        deviations(study)


def test_another_alpha_is_a_deviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = planned_study(tmp_path)
    register(study, study.directory / "registered.json")
    monkeypatch.setattr("studies.record.ALPHA", 0.2)
    assert deviations(study) == ["alpha is 0.2, registered was 0.05"]


def test_a_search_registers_its_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"weight_decay": {"min": 0.1, "max": 3.0}}
    study = planned_study(tmp_path, search="tpe", trials=5, space=space)
    with pytest.raises(BadInput, match="--pilot 0 registers it"):
        plan(study, 2)
    assert plan(study, 0) == 0 and deviations(study) == []
    more = Study.model_validate(study.model_dump() | {"trials": 9})
    assert deviations(more) == ["trials is 9, registered was 5"]


def test_the_card_of_a_study_that_found_something_and_of_one_that_did_not(tmp_path: Path) -> None:
    for name, gain in (("found", 0.1), ("not", 0.0)):
        (tmp_path / name).mkdir()
        study = make_study(tmp_path / name, space={"regularizers.weight_decay": [1.0, 3.0]})
        effects = {"weight_decay=1": -gain, "weight_decay=3": 0.3}
        write_runs(
            study,
            lambda point, effects=effects: effects.get(point.name, 0.0),  # type: ignore[misc]
            confirm=[point.name for point in study.points()],
        )
        told = json.loads(card(study))
        assert told == json.loads((study.directory / "card.json").read_text())
        assert told["search"]["weight_decay=3"]["difference"] == pytest.approx(0.3, abs=0.05)  # what does harm is there
        assert told["search"]["weight_decay=3"]["sd"] > 0 and told["registered"] is None and told["deviations"] == []
        assert told["asked"]["points"] == {"baseline": {}} | {p.name: p.knobs for p in study.points()[1:]}
        assert told["asked"]["steps"] == 300 and told["versions"]["commit"] == "0123456789ab"
        found = told["found"]
        if gain:
            assert (found["claim"], found["winner"], found["why_not"]) == ("better", "weight_decay=1", None)
            assert found["low"] < -0.1 < found["high"] < 0 and found["confidence"] == pytest.approx(0.95)
        else:
            assert found["claim"] is None and found["why_not"]
        assert found["answer"] and found["unit"] == "nats per token"


def test_seconds_of_a_run_are_those_of_its_process(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    directory = write_run(study, study.points()[0], 0, 4.0)
    assert seconds_of(read_result(study, study.points()[0], 0)) == pytest.approx(10.24)  # of its steps
    (directory / "lock").touch()
    began = (directory / "summary.json").stat().st_mtime - 25
    os.utime(directory / "lock", (began, began))
    assert seconds_of(read_result(study, study.points()[0], 0)) == pytest.approx(25)


def test_what_the_command_line_takes(capsys: pytest.CaptureFixture[str]) -> None:
    path = "configs/studies/quick/one_at_a_time.yaml"
    for flags in (["--pilot", "-1"], ["--pilot", "1001"], ["--effects", "0.1,x"], ["--effects", "0,1"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", path, *flags])
        assert ended.value.code == 2
    capsys.readouterr()


def killed_and_gone_on_with(directory: Path, action: str, runs: str, flags: tuple[str, ...] = ()) -> None:
    """The command dies by kill -9 while its runs train; given again, it ends with each of them trained once."""
    changes = {"training.max_steps": "200", "evaluation.every": "200", "checkpoint.every": "20"}
    changes |= {"evaluation.sample_tokens": "0", "data.train_tokens": "6000"}
    values = {"name": "s", "base": tiny_base(directory, **changes), "space": {"weight_decay": [0.2]}, "seeds": 2}
    values |= {"tune": None, "confirm_seeds": 2, "workers": 2, "scale": {"seeds": 2}}
    path, log = directory / "study.yaml", directory / "said.txt"
    path.write_text(yaml.safe_dump(values))
    study = Study.model_validate(values)
    if action == "scale":  # a finished study, whose runs nobody trained
        study.directory.mkdir(parents=True)
        for point in study.points():
            for seed in (*study.seeds, *study.fresh_seeds):
                write_run(study, point, seed, 4 - 0.1 * (not point.baseline) + 1e-3 * seed % 3)

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "scripts.study", action, str(path), *flags]
        with open(log, "a") as said:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            return subprocess.Popen(command, cwd=directory, env=environment, stdout=said, stderr=subprocess.STDOUT)

    first, end = start(), time.monotonic() + 300
    while not list(study.directory.glob(f"{runs}/checkpoints/step_*")):
        assert time.monotonic() < end and first.poll() is None, log.read_text()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert first.wait(60) == -signal.SIGKILL
    assert start().wait(600) == 0, log.read_text()
    directories = list(study.directory.glob(runs))
    assert directories and all(read_summary(run)["status"] == "finished" for run in directories)
    trained = {run.name: (run / "train.log").read_text() for run in directories}
    assert {said.count("Finished after") for said in trained.values()} == {1}
    assert any("goes on from step" in said for said in trained.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pilot_survives_kill_9(tmp_path: Path) -> None:
    killed_and_gone_on_with(tmp_path, "plan", "*-seed300[01]", ("--pilot", "2"))
    assert (tmp_path / "runs/s/registered.json").exists()
