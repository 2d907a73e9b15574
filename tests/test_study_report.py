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
from made_up_study import make_study, write_run, write_runs

from config import BadInput, Config
from studies import runner
from studies.findings import answer, cautions, find, winner
from studies.report import draw, ranking_rows, render, write_report
from studies.results import collect, metric_value, write_results, write_table
from studies.space import Point, Study, confirmation_seeds
from studies.tracking import log_summary

BEST = "weight_decay=2,residual_dropout=0"


def truth(point: Point) -> float:
    """Weight decay helps by 0.05 a unit, dropout harms by 0.8 a unit."""
    decay = float(point.knobs.get("regularizers.weight_decay", 0.1))
    return -0.05 * decay + 0.8 * float(point.knobs.get("regularizers.residual_dropout", 0))


def page_of(study: Study, points: list[Point] | None = None) -> str:
    """The page without its pictures, which take the time."""
    return render(find(study, collect(study, points)), {})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twelve points on three seeds, the winner confirmed, with its report."""
    study = make_study(tmp_path_factory.mktemp("grid"))
    write_runs(study, truth, noise=0.01, confirm=("baseline", BEST))
    write_report(study)
    return study


# ---------------------------------------------------------------------------------------------- what is read


def test_the_value_is_the_last_of_averaged_weights_and_of_the_restored_step(tmp_path: Path) -> None:
    def run(records: list[dict[str, Any]], **summary: Any) -> float | None:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / "summary.json").write_text(json.dumps(summary))
        return metric_value(tmp_path, "val/loss")

    lines = [{"step": 1, "val/loss": 3.0}, {"step": 2, "val/loss": 2.0}, {"step": 3, "val/loss": 2.5}, {"step": 4}]
    assert run(lines) == 2.5
    assert run([*lines, {"step": 5, "val/loss": None}]) is None  # it was not finite
    assert run([*lines, {"step": 5, "val/loss": 1e300}]) is None
    assert run(lines, stopped_early=True, **{"best/step": 2}) == 2.0
    averaged = [record | {"val_average/loss": record["val/loss"] - 1} for record in lines[:3]]
    assert run(averaged) == 1.5
    # Stopped before the average began: its best step has the raw value alone.
    late = [*lines[:2], averaged[2]]
    assert run(late) == 1.5 and run(late, stopped_early=True, **{"best/step": 2}) == 2.0
    assert run([*late, {"step": 5, "val/loss": 2.0, "val_average/loss": None}]) is None
    assert run([]) is None
    assert metric_value(tmp_path / "nowhere", "val/loss") is None


def test_no_finished_run_is_told_with_the_way_out(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    with pytest.raises(BadInput, match=r"no finished run in .*made-up \(36 waiting\).*python -m scripts\.study run"):
        write_report(study)
    write_run(study, study.points()[0], 0, 4.0, status="failed", error="OSError: disk full")
    with pytest.raises(BadInput, match="OSError: disk full"):
        collect(study)


def test_the_winner_is_the_one_that_the_runner_confirms(grid: Study, tmp_path: Path) -> None:
    """Also when runs are missing, and when a metric is better the higher it is."""
    results = collect(grid)
    best = winner(grid, results, find(grid, results).search)
    assert best is not None and best.name == BEST and best == runner.to_confirm(grid)
    study = make_study(tmp_path, metric="val/accuracy")
    draw = np.random.default_rng(0)
    for point in study.points():
        for seed in study.seeds:
            where = write_run(study, point, seed, 4.0)
            line = json.loads((where / "metrics.jsonl").read_text().splitlines()[-1])
            line |= {"step": 301, "val/accuracy": draw.random()}
            with open(where / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
    shutil.rmtree(study.run_directory(study.points()[0], 1))
    chosen = runner.to_confirm(study)
    assert chosen is not None
    shutil.rmtree(study.run_directory(chosen, 2))  # now another one is best
    chosen, results = runner.to_confirm(study), collect(study)
    assert chosen is not None and winner(study, results, find(study, results).search) == chosen


# ---------------------------------------------------------------------------------------------- what is said


def test_the_answer_quotes_the_fresh_seeds_and_the_test(grid: Study) -> None:
    findings = find(grid, collect(grid))
    fresh, test = [], []
    for seed in confirmation_seeds(grid):
        pair = [grid.run_directory(point, seed) for point in (findings.winner, grid.points()[0]) if point]
        ends = [metric_value(path, "val/loss") or math.nan for path in pair]
        tests = [json.loads((path / "summary.json").read_text())["test/loss"] for path in pair]
        fresh.append(ends[0] - ends[1])
        test.append(tests[0] - tests[1])
    one, two = answer(findings)
    assert one.startswith("weight_decay=2, residual_dropout=0 lowers val/loss by ")
    assert f"by {-np.mean(fresh):.4f} nats per token against the baseline (95% interval 0.0" in one
    bits = -np.mean(fresh) / math.log(2) / 2.2
    assert f"{bits:.4f} bits per byte" in one
    assert "3 fresh seeds on which nothing was chosen" in two and f"test/loss is {-np.mean(test):.4f} lower" in two
    confirmed = findings.confirmed
    assert confirmed is not None and abs(confirmed.difference - -0.095) < 3 * (confirmed.error or 0)  # the truth
    assert cautions(findings) == []


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
    page = page_of(study)
    for words in ("Runs that do not count", "Boom: it broke", "it diverged", "still running, or killed", "not started"):
        assert words in page, words
    findings = find(study, collect(study))
    assert findings.search.uneven == ["weight_decay=0.5,residual_dropout=0"]
    assert findings.winner is not None and findings.winner.name == BEST
    assert findings.search.effects[BEST].claimed and (findings.search.noise.sd or 1) < 0.02
    write_results(study.directory / "results.csv", study, collect(study))
    rows = rows_of(study.directory / "results.csv")
    assert len(rows) == 36 and sum(row["status"] == "finished" for row in rows) == 32
    assert [row["metric"] for row in rows if row["status"] == "failed"] == ["", ""]
    said = " ".join(cautions(findings))
    assert "2 of 36 runs failed" in said and "2 of 36 runs are not finished" in said
    assert said.count("more varied from seed to seed") == 1 and "weight_decay=0.5, residual_dropout=0 (" in said


def test_bits_are_left_out_when_points_differ_in_their_tokens(tmp_path: Path) -> None:
    study = make_study(tmp_path, space={"data.vocab_size": [512, 1024]})
    write_runs(study, lambda point: 0.0)
    where = study.run_directory(study.points()[1], 0) / "metrics.jsonl"
    lines = [json.loads(line) for line in where.read_text().splitlines()]
    where.write_text("".join(json.dumps(line | {"val/bits_per_byte": 3.0}) + "\n" for line in lines))
    findings = find(study, collect(study))
    assert findings.bits is None and "bits per byte" not in answer(findings)[1]
    assert any("per token" in line for line in cautions(findings))


# ---------------------------------------------------------------------------------------------- what is written


def test_tables(grid: Study) -> None:
    runs, ranking = rows_of(grid.directory / "results.csv"), rows_of(grid.directory / "ranking.csv")
    assert len(runs) == 12 * 3 + 2 * 3 and sum(run["confirmation"] == "true" for run in runs) == 6
    first = runs[0]
    assert first["point"] == "baseline" and first["regularizers.weight_decay"] == "0.1"
    for name in ("metric", "val/loss", "val/bits_per_byte", "test/loss", "ece", "brier", "gap", "tokens_per_second"):
        assert float(first[name]) > 0, name
    assert float(first["seconds"]) == pytest.approx(300 * 512 / 15000)
    assert Path(first["directory"]).is_dir()
    assert [row["rank"] for row in ranking] == [str(rank) for rank in range(1, 13)]
    assert ranking[0]["point"] == BEST and float(ranking[0]["high"]) < 0 < float(ranking[-1]["low"])
    base = next(row for row in ranking if row["point"] == "baseline")
    mine = [float(run["metric"]) for run in runs if run["point"] == BEST and run["confirmation"] == "false"]
    its = [float(run["metric"]) for run in runs if run["point"] == "baseline" and run["confirmation"] == "false"]
    assert float(ranking[0]["difference"]) == pytest.approx(np.mean(mine) - np.mean(its))
    assert base["difference"] == "" and float(base["relative_seconds_per_step"]) == 1


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Two commands that end together both write the report and the tables."""
    rows = [{"point": "x" * 999, "seed": seed} for seed in range(99)]
    with ThreadPoolExecutor(4) as writers:
        for _ in writers.map(lambda _: write_table(tmp_path / "results.csv", rows), range(80)):
            assert len(rows_of(tmp_path / "results.csv")) == 99
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def test_pictures(grid: Study, tmp_path: Path) -> None:
    names = {"ranking", "heatmap", "dose_response", "curves", "calibration", "gap_and_cost"}
    assert {path.stem for path in grid.directory.glob("*.png")} == names
    study = make_study(
        tmp_path, search="list", space=[{"regularizers.ema_decay": 0.99}, {"model.tie_embeddings": False}]
    )
    write_runs(study, lambda point: 0.0)
    assert set(draw(find(study, collect(study)))) == names - {"heatmap", "dose_response"}


def test_the_page_asks_nobody_for_anything_and_is_accessible(grid: Study) -> None:
    page = (grid.directory / "report.html").read_text()
    assert not re.findall(r"(?:src|srcset|href|action|data)=[\"']?\s*(?:https?:)?//", page)
    assert "@import" not in page and "<script" not in page and not re.search(r"url\(\s*[\"']?http", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 6 and all(re.search(r'alt="[^"]{20,}"', image) for image in images)
    links = re.findall(r'href="([^"]*)"', page)
    assert f"./{BEST.replace('=', '%3D').replace(',', '%2C')}-seed0/" in links
    assert all((grid.directory / unquote(link)).exists() for link in links)
    headings = re.findall(r"<h[1-3]>([^<]*)", page)
    for heading in ("Ranking", "Confirmation and test", "Curves", "Calibration", "All runs", "Do it again"):
        assert heading in headings
    for word in ("0123456789ab", "2.13.0+cpu", "python -m scripts.study run"):
        assert word in page


class Careless(Study):
    """A study whose points may have any name, which a study file does not allow."""

    def config(self, point: Point, seed: int) -> Config:
        return super().config(Point("tame", point.knobs), seed)


def test_hostile_names_and_errors_are_escaped(tmp_path: Path) -> None:
    study = make_study(tmp_path, Careless, space={"regularizers.weight_decay": [0.3, 1]})
    evil = Point('<script>alert("1")<|script>&amp;$x^{', {"regularizers.weight_decay": 3.0})
    points = [*study.points(), evil]
    write_runs(study, truth, points=points, noise=0.001)
    broken = '</td><img src="//evil" onerror=alert(1)>'
    write_run(study, points[1], 0, 4.0, status="failed", error=broken)
    path, lines = write_report(study, points)
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
    sentences = answer(find(grid, collect(grid)))
    phone, desk = (in_browser(grid.directory / "report.html", width, tmp_path) for width in (390, 1280))
    for seen, width in ((phone, 390), (desk, 1280)):
        assert seen["window"] == width >= seen["width"], "the page scrolls sideways"
        assert seen["pictures"] == [True] * 6
        assert all(" ".join(sentence.split()) in " ".join(seen["text"].split()) for sentence in sentences)
    assert phone["sources"] != desk["sources"]  # a phone gets its own, narrow drawings


# ---------------------------------------------------------------------------------------------- W&B


def test_the_summary_run_lands_in_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path, space={"regularizers.weight_decay": [0.3, 3]})
    write_runs(study, truth, noise=0.002, confirm=("baseline", "weight_decay=3"))
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
    words = ("made-up", '"job_type":"report"', "table-file", "pictures/ranking", "weight_decay=3", "confirmed/high")
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
    findings = find(study, collect(study))
    log_summary(study, findings, ranking_rows(findings), {}, answer(findings))
    assert "W&B did not take the report (the service is gone)" in capsys.readouterr().err
