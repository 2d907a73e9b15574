"""The report of made-up studies with a known truth: what it says, what it writes, and how it looks in a browser."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from conftest import ROOT
from made_up_study import finish, make_study, write_run, write_runs
from scipy import stats

import pictures
from config import Config
from studies.design import design
from studies.findings import answer, cautions, find
from studies.knobs import name_of
from studies.report import draw, heat_cells, interval_rows, pairs, ranking_rows, render, tuning_rows, write_report
from studies.results import metric_value, write_results, write_table
from studies.space import Point, Study
from studies.tracking import log_summary

BEST = "weight_decay=2,residual_dropout=0"
OF_POINTS = {"search", "curves", "calibration", "gap_and_cost"}
PICTURES = OF_POINTS | {"winner", "confirmed", "heatmap", "dose_response"}


def truth(point: Point) -> float:
    """Weight decay helps by 0.05 a unit, dropout harms by 0.8 a unit; twice or half the learning rate by 0.02."""
    decay = float(point.knobs.get("regularizers.weight_decay", 0.1))
    rate = 0.0 if point.origin is None else 0.02
    return -0.05 * decay + 0.8 * float(point.knobs.get("regularizers.residual_dropout", 0)) + rate


def page_of(study: Study) -> str:
    """The page without its pictures, which take the time."""
    return render(find(study), {})


def words_of(page: str) -> str:
    """What a reader sees of the page, without line breaks."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<main>")[2])).split())


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def ends_study(directory: Path, ends: dict[str, dict[int, float]], **changes: Any) -> Study:
    """Points named at will, each with the ends of its runs by seed; NaN: it failed."""
    space = [{"name": name, "regularizers.weight_decay": row} for row, name in enumerate(ends, 1) if name != "baseline"]
    study = make_study(directory, search="list", space=space, **changes)
    for point in study.points():
        for seed, end in ends[point.name].items():
            if math.isfinite(end):
                write_run(study, point, seed, end, test=end - 0.2)
            else:
                write_run(study, point, seed, end, status="failed", error="RuntimeError: the disk is full")
    return study


def by_seed(search: list[float], fresh: list[float]) -> dict[int, float]:
    return dict(enumerate(search)) | dict(enumerate(fresh, 1000))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twelve points, the winner at its own learning rate and confirmed, with its report."""
    study = make_study(tmp_path_factory.mktemp("grid"), tune={"optimizer.lr": [0.5, 1, 2]})
    finish(study, truth)
    write_report(study)
    return study


# ---------------------------------------------------------------------------------------------- what is read


def test_the_value_is_the_last_or_the_best_and_that_of_averaged_weights(tmp_path: Path) -> None:
    def run(records: list[dict[str, Any]], metric: str = "val/loss") -> float | None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return metric_value(tmp_path, metric)

    lines = [{"step": 1, "val/loss": 3.0}, {"step": 2, "val/loss": 2.0}, {"step": 3, "val/loss": 2.5}, {"step": 4}]
    assert run(lines) == 2.5 and run(lines, "best val/loss") == 2.0
    broken = [*lines, {"step": 5, "val/loss": None}]  # it was not finite
    assert run(broken) is None and run(broken, "best val/loss") == 2.0
    assert run([*lines, {"step": 5, "val/loss": 1e300}]) is None
    averaged = [record | {"val_average/loss": record["val/loss"] - 1} for record in lines[:3]]
    assert run(averaged) == 1.5 and run(averaged, "best val/loss") == 1.0
    assert run([{"step": 1, "val/accuracy": share} for share in (0.2, 0.4, 0.3)], "best val/accuracy") == 0.4
    assert run([]) is None
    assert metric_value(tmp_path / "nowhere", "val/loss") is None


# ---------------------------------------------------------------------------------------------- what is said


def test_the_answer_quotes_the_fresh_seeds_and_the_test(grid: Study) -> None:
    fresh, test = [], []
    for seed in grid.fresh_seeds:
        pair = [grid.run_directory(Point(name, {}), seed) for name in (BEST, "baseline")]
        ends = [metric_value(path, "val/loss") or math.nan for path in pair]
        tests = [json.loads((path / "summary.json").read_text())["test/loss"] for path in pair]
        fresh.append(ends[0] - ends[1])
        test.append(tests[0] - tests[1])
    said = words_of((grid.directory / "report.html").read_text())
    assert said.startswith(f"made-up {BEST.replace(',', ', ')} lowers val/loss by {-np.mean(fresh):.4f} nats per token")
    assert f"{-np.mean(fresh) / math.log(2) / 2.2:.4f} bits per byte" in said
    assert f"test/loss is {-np.mean(test):.4f} lower" in said
    assert abs(np.mean(fresh) - -0.095) < 0.02  # the truth


def test_failed_missing_and_diverged_runs(tmp_path: Path) -> None:
    """Each is listed with its reason, none enters the numbers, and the others are found all the same."""
    study = make_study(tmp_path)
    write_runs(study, truth, noise=0.005)
    points = {point.name: point for point in study.points()}
    write_run(study, points["weight_decay=1,residual_dropout=0.2"], 0, math.nan)
    write_run(
        study, points["weight_decay=0.5,residual_dropout=0.1"], 1, 4.0, status="failed", error="Boom: it broke\nx"
    )
    write_run(study, points["weight_decay=0.5,residual_dropout=0"], 2, 40.0)  # finite, and far off
    write_run(study, points["weight_decay=2,residual_dropout=0.2"], 1, 4.0, status="running")
    shutil.rmtree(study.run_directory(points["weight_decay=2,residual_dropout=0.1"], 0))
    said = words_of(page_of(study))
    for words in ("Runs that do not count", "Boom: it broke", "it diverged", "still running, or killed", "not started"):
        assert words in said, words
    assert "2 of 36 runs failed" in said and "2 of 36 runs are not finished" in said
    assert "weight_decay=0.5, residual_dropout=0 ended at 40.0" in said and "did it diverge?" in said
    assert "2 (1 failed)" in said
    findings = find(study)
    assert findings.winner is not None and findings.winner.name == BEST
    write_results(study.directory / "results.csv", study, findings.results)
    rows = rows_of(study.directory / "results.csv")
    assert len(rows) == 36 and sum(row["status"] == "finished" for row in rows) == 32
    assert [row["value"] for row in rows if row["status"] == "failed"] == ["", ""]
    failed = [row["rank"] for row in ranking_rows(findings) if row["failed"]]
    assert failed == [None, None]  # what fails on a seed is not recommended


def test_bits_are_left_out_when_points_differ_in_their_tokens(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"data.vocab_size": [512, 1024]})
    write_runs(study, lambda point: 0.0)
    where = study.run_directory(study.points()[1], 0) / "metrics.jsonl"
    lines = [json.loads(line) for line in where.read_text().splitlines()]
    where.write_text("".join(json.dumps(line | {"val/bits_per_byte": 3.0}) + "\n" for line in lines))
    findings = find(study)
    assert findings.bits is None and "<th>bits per byte</th>" not in render(findings, {})
    assert any("per token" in line for line in cautions(findings))


def test_a_point_that_changes_nothing(tmp_path: Path) -> None:
    ends = {"baseline": by_seed([4.0, 4.1, 4.2], []), "idle": by_seed([4.0, 4.1, 4.2], [])}
    ends["bad"] = by_seed([4.1, 4.2, 4.4], [])
    study = ends_study(tmp_path, ends)
    said = words_of(page_of(study))
    assert "changed nothing, to the last digit of val/loss: idle" in said
    assert "idle – changed nothing – 3" in said and "bad 1 0.1333 0.0577 3" in said


def test_a_baseline_that_diverged_on_a_fresh_seed_claims_nothing(tmp_path: Path) -> None:
    ends = {"baseline": by_seed([4.0, 4.1, 4.2], [4.0, 9.0, 4.2]), "good": by_seed([3.9, 4.0, 4.1], [3.9, 4.0, 4.1])}
    study = ends_study(tmp_path, ends)
    said = words_of(page_of(study))
    assert "No gain here is distinguishable from luck" in said and "lowers" not in said
    assert "baseline ended at 9.0" in said and "did it diverge?" in said
    left, right = pictures._ends([value for pair in pairs(find(study))["fresh seeds"] for value in pair])
    assert 3.8 < left < 3.9 and 4.2 < right < 4.3  # the others are not flattened


def test_a_failed_run_on_a_fresh_seed_claims_nothing(tmp_path: Path) -> None:
    fresh = [3.9, math.nan, 4.1]
    ends = {"baseline": by_seed([4.0, 4.1, 4.2], [4.0, 4.1, 4.2]), "good": by_seed([3.9, 4.0, 4.1], fresh)}
    said = words_of(page_of(ends_study(tmp_path, ends)))
    assert "Not confirmed: a run failed, good on the fresh seed 1001 (RuntimeError: the disk is full)." in said
    assert "1001 4.1112 failed – 3.9000 failed – 1002" in said, "its row in the table of fresh seeds"
    assert "fresh seeds 3 by which nothing was chosen" in said


def test_a_winner_at_the_edge(grid: Study) -> None:
    said = words_of((grid.directory / "report.html").read_text())
    assert "weight_decay=2 is the largest value tried; the best may be larger" in said


def test_a_look_too_many(tmp_path: Path) -> None:
    """What the first look would have claimed a later one does not, and the page says why."""
    ends = {"baseline": by_seed([4.0, 4.1, 4.2], [4.0, 4.1, 4.2])}
    ends["good"] = by_seed([3.96, 4.04, 4.12], [3.97, 4.05, 4.14])
    once, study = (ends_study(tmp_path / name, ends) for name in ("once", "often"))
    assert " lowers val/loss by " in words_of(page_of(once))
    (study.directory / "looks.json").write_text(
        json.dumps({"fresh seeds": [{"seen": "a"}, {"seen": "b"}, {"seen": "c"}]})
    )
    said = words_of(page_of(study))
    assert "No gain here is distinguishable from luck" in said and "look 4 at fresh results" in said
    assert "This is look 4 at fresh results; earlier ones spent part of the 5%" in said
    assert said == words_of(page_of(study)), "the same numbers are the same look"


def test_without_fresh_seeds_nothing_is_claimed_and_no_look_is_spent(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]}, confirm_seeds=0)
    finish(study, truth, noise=0.002)
    said = words_of(page_of(study))
    assert "Nothing is claimed yet: weight_decay=3 leads the search" in said and "fresh seeds none" in said
    assert not (study.directory / "looks.json").exists()


def test_an_old_study_is_exploration(tmp_path: Path) -> None:
    """Seeds 0 to 2 of all points, and 3 to 5 as the fresh ones of an earlier version."""
    ends = {"baseline": dict(enumerate([4.0, 4.1, 4.2, 4.0, 4.1, 4.2]))}
    ends |= {"good": {seed: end - 0.1 + 0.001 * seed for seed, end in ends["baseline"].items()}}
    study = ends_study(tmp_path, ends | {"bad": {0: 4.5, 1: 4.6, 2: 4.7}})
    said = words_of(page_of(study))
    assert "Nothing is claimed yet: good leads the search by 0.0990" in said
    assert "good 1 −0.0990 0.0010 3" in said and "bad 2 0.5000 0.0000 3" in said


# ---------------------------------------------------------------------------------------------- what is written


def test_the_tables_have_these_numbers(tmp_path: Path) -> None:
    ends = {"baseline": by_seed([4.0, 4.1, 4.2], [4.0, 4.1, 4.2]), "good": by_seed([3.9, 3.9, 4.0], [3.95, 4.05, 4.1])}
    study = ends_study(tmp_path, ends | {"bad": by_seed([4.5, 4.6, 4.7], []), "worse": {0: 4.8}})
    write_report(study)
    runs, ranking = rows_of(study.directory / "results.csv"), rows_of(study.directory / "ranking.csv")
    told = [(run["point"], run["seed"], run["stage"], run["status"]) for run in runs]
    search = [("baseline", str(seed), "search", "finished") for seed in range(3)]
    fresh = [("baseline", str(seed), "fresh", "finished") for seed in (1000, 1001, 1002)]
    assert told[:6] == search + fresh and told[-1] == ("worse", "0", "search", "finished")
    assert len(runs) == 6 + 6 + 3 + 1
    first = runs[0]
    fall = 4.5 * math.exp(-6)  # the curve of a made-up run at its end
    assert float(first["value"]) == float(first["val/loss"]) == pytest.approx(4 + fall)
    assert float(first["regularizers.weight_decay"]) == 0.1 and float(runs[-1]["regularizers.weight_decay"]) == 4
    for name in ("val/bits_per_byte", "test/loss", "ece", "brier", "gap", "tokens_per_second"):
        assert float(first[name]) > 0, name
    assert float(first["seconds"]) == pytest.approx(300 * 512 / 15000)
    assert Path(first["directory"]).is_dir()
    shown = [" ".join(row[name] for name in ("rank", "point", "seeds", "failed", "unchanged")) for row in ranking]
    assert shown == [" baseline 3 0 False", "1 good 3 0 False", "2 bad 3 0 False", "3 worse 1 0 False"]
    good = {name: float(ranking[1][name]) for name in ("mean", "difference", "spread", "difference_bits_per_byte")}
    assert good["difference"] == pytest.approx(-0.5 / 3) and good["spread"] == pytest.approx(math.sqrt(1 / 300))
    assert good["mean"] == pytest.approx(11.8 / 3 + fall)
    assert good["difference_bits_per_byte"] == pytest.approx(-0.5 / 3 / math.log(2) / 2.2)
    assert ranking[0]["difference"] == ranking[3]["spread"] == ""
    assert float(ranking[0]["relative_seconds_per_step"]) == 1
    said = words_of((study.directory / "report.html").read_text())
    assert "1002 4.2112 4.1112 −0.1000 4.0000 3.9000 −0.1000 mean −0.0667 −0.0667" in said


def test_formats_lists_what_a_study_writes(grid: Study) -> None:
    said = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/formats.md").read_text(encoding="utf-8")))
    files = {path.name for path in grid.directory.iterdir() if path.is_file()}
    columns = {*rows_of(grid.directory / "results.csv")[0], *rows_of(grid.directory / "ranking.csv")[0]}
    knobs = {"regularizers.weight_decay", "regularizers.residual_dropout", "optimizer.lr"}
    assert files | columns - knobs <= said


def test_the_flattered_interval_is_the_paired_t_of_the_search(tmp_path: Path) -> None:
    base, good = [4.0, 4.1, 4.2], [3.9, 3.95, 4.0]
    study = ends_study(tmp_path, {"baseline": by_seed(base, base), "good": by_seed(good, [3.95, 4.05, 4.1])})
    fresh, search = interval_rows(find(study))
    expected = stats.ttest_rel(good, base).confidence_interval()
    assert (search["low"], search["high"]) == pytest.approx((expected.low, expected.high))
    assert search["difference"] == pytest.approx(-0.15) and not search["sure"]
    assert fresh["difference"] == pytest.approx(-0.2 / 3) and fresh["sure"]


def test_learning_rates_are_shown_with_what_each_chose(tmp_path: Path) -> None:
    """The baseline's best is half the rate, the point's the base's: their means stand in the table, the best bold."""
    study = make_study(tmp_path, space={"regularizers.weight_decay": [3]}, tune={"lr": [0.5, 1, 2]}, seeds=2)
    usual = study.config(study.points()[0], 0).optimizer.lr

    def effect(point: Point) -> float:
        best = usual if "regularizers.weight_decay" in point.knobs else usual / 2
        return abs(math.log2(float(point.knobs.get("optimizer.lr", usual)) / best)) / 10 - (best == usual) / 2

    finish(study, effect, noise=0)
    base, point = tuning_rows(find(study))
    assert base["chosen"] == 0.5 and point["chosen"] == 1
    assert np.diff(base["means"]) == pytest.approx([-0.1, 0.1, 0.1])  # 0.25 was tried since 0.5 lay at the edge
    assert np.diff(point["means"]) == pytest.approx([-0.1, -0.1, 0.1])
    page = page_of(study)
    assert f"<strong>{base['means'][1]:.4f}</strong>" in page and f"<strong>{point['means'][2]:.4f}</strong>" in page
    assert "0.25× 0.5× 1× 2×" in words_of(page)


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two commands that end together both write the report and the tables."""
    rows = [{"point": "x" * 999, "seed": seed} for seed in range(99)]
    with ThreadPoolExecutor(4) as writers:
        for _ in writers.map(lambda _: write_table(tmp_path / "results.csv", rows), range(80)):
            assert len(rows_of(tmp_path / "results.csv")) == 99
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


DECAY = {"regularizers.weight_decay": [0.3, 1, 3]}


@pytest.mark.parametrize(
    "changes, expected, heading",
    [
        ({"space": DECAY}, {"winner", "confirmed", "dose_response"}, "The search’s winner against the baseline"),
        ({"space": DECAY, "confirm_seeds": 0}, {"winner", "dose_response"}, "There are no fresh seeds to judge by:"),
        ({"space": DECAY, "seeds": 1}, {"winner", "confirmed", "dose_response"}, "one seed each cannot even show that"),
        ({"space": {"regularizers.residual_dropout": [0.1]}}, {"winner"}, "The nearest point against the baseline"),
        (
            {"search": "list", "space": [{"ema_decay": 0.99}, {"model.tie_embeddings": False}]},
            {"winner"},
            "The nearest point",
        ),
    ],
    ids=["fresh", "search only", "one seed", "nothing leads", "list"],
)
def test_pictures_of_each_state(changes: Any, expected: set[str], heading: str, tmp_path: Path) -> None:
    study = make_study(tmp_path, **changes)
    finish(study, truth if "list" not in changes.values() else lambda point: 0.1 * len(point.knobs))
    findings = find(study)
    drawn = draw(findings)
    assert set(drawn) == expected | OF_POINTS
    assert heading in words_of(render(findings, drawn))


def test_points_that_a_search_makes_up(tmp_path: Path) -> None:
    """tpe: they are found by their directories, beside the baseline."""
    study = make_study(tmp_path, search="tpe", trials=2, space={"regularizers.weight_decay": {"min": 0.3, "max": 3}})
    for value in (1.5, 2.5):
        knobs = {"regularizers.weight_decay": value}
        write_run(study, Point(name_of(knobs), knobs), 0, 4 - value / 20)
    finish(study, truth, noise=0.001)
    findings = find(study)
    assert {"winner", "confirmed", "dose_response"} <= set(draw(findings))
    assert "weight_decay=2.5 lowers val/loss by" in words_of(render(findings, {}))


def test_a_heat_map_waits_for_its_cells(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    for place, point in enumerate(study.points()):
        write_run(study, point, 0, 4 + truth(point))
        assert (heat_cells(find(study)) is not None) == (place >= 9)  # ten of twelve


def test_a_study_that_was_stopped(tmp_path: Path) -> None:
    """After each of its runs in turn there is a page: in the search, in the tuning, and on fresh seeds."""
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]}, tune={"lr": [0.5, 1, 2]}, seeds=2)
    write_run(study, study.points()[0], 0, 4.0)
    assert draw(find(study)).keys() == OF_POINTS - {"search"}  # there is nothing to compare
    stages = []
    while design(study).stage != "done":
        known = design(study)
        point, seed = next(pair for pair in known.wanted if not known.result(*pair).over)
        write_run(study, point, seed, 4 + truth(point) + seed / 1e5)
        findings = find(study)
        said = words_of(render(findings, {}))
        stages.append(findings.design.stage)
        over = stages[-1] == "done"
        assert (" lowers val/loss by " in said) == ("fresh seed val/loss: baseline winner" in said) == over
    assert sorted(set(stages)) == ["done", "fresh", "search", "tuning"]


def test_a_diverged_run_does_not_flatten_the_picture_and_the_winner_stays_in_it() -> None:
    calm = [0.001 * row for row in range(-5, 6)]
    left, right = pictures._ends([*calm, 3.0])
    assert left < -0.005 and 0.005 < right < 0.01
    assert pictures._ends([*calm, -3.0], [-3.0])[0] < -3


def test_the_page_asks_nobody_for_anything_and_is_accessible(grid: Study) -> None:
    assert {path.stem for path in grid.directory.glob("*.png")} == PICTURES
    page = (grid.directory / "report.html").read_text()
    assert not re.findall(r"(?:src|srcset|href|action|data)=[\"']?\s*(?:https?:)?//", page)
    assert "@import" not in page and "<script" not in page and not re.search(r"url\(\s*[\"']?http", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == len(PICTURES) and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    assert "fresh seeds: better on 3 of 3; where it was chosen: better on 2 of 2" in images[0]
    links = re.findall(r'href="([^"]*)"', page)
    assert f"./{BEST.replace('=', '%3D').replace(',', '%2C')}-seed0/" in links
    assert all((grid.directory / unquote(link)).exists() for link in links)
    headings = re.findall(r"<h[1-3]>([^<]*)", page)
    order = ["The search’s winner", "Measured afresh", "The search", "Each at its own", "The two knobs", "One knob"]
    order += ["Curves", "Calibration", "Gap and cost", "All runs", "Do it again", "How this was worked out"]
    assert [heading[: len(start)] for heading, start in zip(headings[1:], order, strict=True)] == order
    for word in ("0123456789ab", "2.13.0+cpu", "python -m scripts.study run", f"{BEST}-seed0/config.yaml"):
        assert word in page
    for word in ("Holm", "adjusted", "p value", "common noise", "noise of one run"):
        assert word not in page


class Careless(Study):
    """A study whose points may have any name, which a study file does not allow."""

    def points(self) -> list[Point]:
        evil = Point('<script>alert("1")<|script>&amp;$x^{', {"regularizers.weight_decay": 3.0})
        return [*super().points(), evil]

    def config(self, point: Point, seed: int) -> Config:
        return super().config(Point("tame", point.knobs), seed)


def test_hostile_names_and_errors_are_escaped(tmp_path: Path) -> None:
    study = make_study(tmp_path, Careless, space={"regularizers.weight_decay": [0.3, 1]})
    *_, one, evil = study.points()
    finish(study, truth, noise=0.001)
    broken = '</td><img src="//evil" onerror=alert(1)>'
    write_run(study, one, 0, 4.0, status="failed", error=broken)
    path, lines = write_report(study)
    page = path.read_text()
    assert evil.name in lines[0]  # a terminal takes it as it is
    assert "<script" not in page and '<img src="//evil' not in page and "<|script" not in page
    for text in (evil.name, broken):
        assert text in html.unescape(page)


# ---------------------------------------------------------------------------------------------- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  width: document.documentElement.scrollWidth, window: innerWidth, text: document.body.innerText,
  pictures: [...document.images].map(image => image.complete && image.naturalWidth > 0),
  sources: [...document.images].map(image => image.currentSrc.length)}), "*"))</script>"""


def in_browser(page: Path, width: int, tmp_path: Path) -> dict[str, Any]:
    """What a browser makes of the page in a window ``width`` CSS pixels wide (a frame: windows have a least width)."""
    copy, frame = tmp_path / f"copy{width}.html", tmp_path / f"frame{width}.html"
    copy.write_text(page.read_text() + MEASURE)
    frame.write_text(
        f"<!doctype html><iframe src='{copy.name}' style='width:{width}px;height:900px;border:0'></iframe><pre></pre>"
        "<script>addEventListener('message', e => document.querySelector('pre').textContent = e.data)</script>"
    )
    options = "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    options += " --disable-sync --no-first-run --virtual-time-budget=8000 --dump-dom"
    ended = subprocess.run(
        [str(CHROMIUM), *options.split(), f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    told = re.search(r"<pre>(.*?)</pre>", ended.stdout, re.DOTALL)
    assert told and told[1], ended.stderr[-2000:]
    return dict(json.loads(html.unescape(told[1])))


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium to open the page in")
def test_the_page_fits_a_phone_and_a_desk(grid: Study, tmp_path: Path) -> None:
    sentences = answer(find(grid))
    phone, desk = (in_browser(grid.directory / "report.html", width, tmp_path) for width in (390, 1280))
    for seen, width in ((phone, 390), (desk, 1280)):
        assert seen["window"] == width >= seen["width"], "the page scrolls sideways"
        assert seen["pictures"] == [True] * len(PICTURES)
        assert all(" ".join(sentence.split()) in " ".join(seen["text"].split()) for sentence in sentences)
    assert phone["sources"] != desk["sources"]  # a phone gets its own, narrow drawings


# ---------------------------------------------------------------------------------------------- W&B


def test_the_summary_run_lands_in_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]})
    finish(study, truth, noise=0.002)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_report(study)
    files = list((study.directory / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1
    asked = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(files[0])],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert asked.returncode == 0, asked.stderr
    words = ("made-up", '"job_type":"report"', "table-file", "pictures/confirmed", "weight_decay=3", "claim", "high")
    for word in words:
        assert word in asked.stdout, word


def test_no_report_is_lost_to_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Dead:
        def log(self, values: Any) -> None:
            raise OSError("the service is gone")

    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]})
    write_runs(study, truth)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("studies.tracking.start_wandb", lambda *_, **__: Dead())
    findings = find(study)
    log_summary(study, findings, ranking_rows(findings), {}, answer(findings))
    assert "W&B did not take the report (the service is gone)" in capsys.readouterr().err
