"""The referee: verdicts with literal numbers of scipy, refusals with names, and looks that are paid for."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from made_up_study import make_study, write_run
from scipy import stats

from program import exit_code
from scripts.study import main
from studies.decision import judge_groups
from studies.judge import verdict_of
from studies.results import Result, metric_value, write_results
from studies.space import Point, Study
from tracking.metrics import read_metrics
from tracking.run_directory import read_summary

PLAIN = {1: 4.10, 2: 4.22, 3: 4.05, 4: 4.18}
BETTER = {1: 4.02, 2: 4.13, 3: 3.99, 4: 4.08}
SAME = {1: 4.12, 2: 4.19, 3: 4.07, 4: 4.17}
KNOBS = {"plain": {}, "decay": {"regularizers.weight_decay": 2.0}, "dropout": {"regularizers.residual_dropout": 0.1}}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """Write finished runs of {point: {seed: val/loss}} into runs/made-up; keyword arguments change their summaries."""
    monkeypatch.chdir(tmp_path)
    study = make_study(Path())

    def write(values: dict[str, dict[int, float]], **summary: Any) -> Study:
        for name, by_seed in values.items():
            for seed, value in by_seed.items():
                write_run(study, Point(name, KNOBS[name]), seed, value, **({"corpus": "c0ffee"} | summary))
        return study

    return write


def table(path: Path, values: dict[str, dict[int, Any]], value: str = "value", **more: str) -> str:
    """A CSV file with a row for each point and seed."""
    rows = [{"point": p, "seed": s, value: v, **more} for p, by_seed in values.items() for s, v in by_seed.items()]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def ask(
    capsys: pytest.CaptureFixture[str], mine: str | Sequence[str], its: str | Sequence[str], *words: str
) -> tuple[int, str, str]:
    """Exit code, standard output and errors of ``study judge``."""
    mine, its = ([names] if isinstance(names, str) else names for names in (mine, its))
    code = exit_code(main, ["judge", *mine, "--against", *its, *words])
    told = capsys.readouterr()
    return code, told.out, told.err


DECAY, DROPOUT, BASE = (f"runs/made-up/{name}-seed*" for name in ("decay", "dropout", "plain"))


# ---------------------------------------------------------------------------------------------- statistics


def test_paired_is_scipys_paired_t_at_two_and_a_half_percent() -> None:
    verdict = verdict_of(BETTER, PLAIN, look=1)
    reference = stats.ttest_rel(list(BETTER.values()), list(PLAIN.values()))
    interval = reference.confidence_interval(0.975)
    assert (verdict.word, verdict.pairs, verdict.unpaired) == ("better", 4, (0, 0))
    decision = verdict.decision
    assert verdict.difference == pytest.approx(-0.0825)
    assert decision.p == pytest.approx(reference.pvalue) == pytest.approx(0.0023542, rel=1e-4)
    assert (decision.low, decision.high) == pytest.approx(tuple(interval))
    assert (decision.low, decision.high) == pytest.approx((-0.11816, -0.04684), abs=1e-5)


def test_unpaired_is_scipys_welch() -> None:
    mine, its = {1: 4.02, 2: 4.13, 3: 3.99}, {4: 4.10, 5: 4.42, 6: 4.05, 7: 4.18, 8: 4.3}
    verdict = verdict_of(mine, its, look=1)
    reference = stats.ttest_ind(list(mine.values()), list(its.values()), equal_var=False)
    assert (verdict.word, verdict.pairs, verdict.unpaired) == ("undecided", 0, (3, 5))
    decision = verdict.decision
    assert decision.p == pytest.approx(reference.pvalue) == pytest.approx(0.0867915, rel=1e-4)
    assert decision.degrees == pytest.approx(reference.df)
    assert (decision.low, decision.high) == pytest.approx(tuple(reference.confidence_interval(0.975)))
    assert judge_groups([1.0], [2.0, 3.0], 0.05).why_not == "one pair"


def test_runs_are_paired_when_half_of_the_smaller_group_shares_seeds() -> None:
    mine = {seed: 4 + 0.1 * seed for seed in range(4)}
    assert verdict_of(mine, {2: 4.0, 3: 4.2, 8: 4.1, 9: 4.4, 10: 4.0}, 1).pairs == 2
    assert verdict_of(mine, {3: 4.2, 8: 4.1, 9: 4.4}, 1).pairs == 0  # one shared seed has no spread
    many = {seed: 4 + 0.01 * seed**2 for seed in range(10)}
    assert verdict_of(many, dict.fromkeys((8, 9, 20, 21, 22), 4.1), 1).pairs == 0


def test_a_higher_accuracy_is_better() -> None:
    assert verdict_of(PLAIN, BETTER, 1).word == "worse"
    assert verdict_of(PLAIN, BETTER, 1, minimize=False).word == "better"


def test_no_spread_is_no_certainty() -> None:
    rounded = verdict_of({1: 4.0, 2: 4.5}, {1: 4.1, 2: 4.6}, 1)
    assert (rounded.word, rounded.decision.why_not, rounded.decision.p) == ("undecided", "no spread", None)
    equal = verdict_of(PLAIN, dict(PLAIN), 1)
    assert (equal.word, equal.decision.why_not) == ("undecided", "unchanged")


@pytest.mark.parametrize("shared", [True, False], ids=["paired", "unpaired"])
def test_ten_looks_at_a_growing_group_claim_falsely_in_at_most_five_percent(shared: bool) -> None:
    """No true difference, a look after each seed from 3 to 12; three standard errors above 5% are allowed."""
    draw = np.random.default_rng(1)
    repetitions, false, at_five_percent = 1500, 0, 0
    for _ in range(repetitions):
        values = draw.normal(4, 0.1, (2, 12)).tolist()
        verdicts = []
        for look, size in enumerate(range(3, 13), 1):
            mine = dict(enumerate(values[0][:size]))
            its = dict(enumerate(values[1][:size], 0 if shared else 100))
            verdicts.append(verdict_of(mine, its, look))
        false += any(verdict.word != "undecided" for verdict in verdicts)
        at_five_percent += any((verdict.decision.p or 1) < 0.05 for verdict in verdicts)
    assert false / repetitions <= 0.05 + 3 * (0.05 * 0.95 / repetitions) ** 0.5
    assert at_five_percent / repetitions > 0.10  # what looking without paying does


# ---------------------------------------------------------------------------------------------- the command


def test_the_answer_and_its_exit_codes(runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    runs({"plain": PLAIN, "decay": BETTER, "dropout": SAME})
    code, told, _ = ask(capsys, DECAY, BASE)
    assert code == 0
    assert told.splitlines() == [
        "Better: decay lowers val/loss by 0.0825 nats per token against plain "
        "(97.5% interval 0.0468 to 0.1182; 4 pairs of runs on the same seeds).",
        "If the two were equal, luck would bring a gain this large about once in 850 studies.",
    ]
    code, told, _ = ask(capsys, BASE, DECAY)
    assert code == 11 and told.startswith("Worse: plain raises val/loss by 0.0825 nats per token against decay (97.5%")
    code, told, _ = ask(capsys, DROPOUT, BASE)
    assert code == 10 and told.startswith("Undecided: val/loss of dropout minus that of plain is 0.0000 nats per token")
    assert "No reasonable number of seeds would settle" in told


def test_a_real_process_ends_with_the_code(runs: Callable[..., Study], tmp_path: Path) -> None:
    runs({"plain": PLAIN, "decay": BETTER})
    command = [sys.executable, "-m", "scripts.study", "judge", str(tmp_path / BASE), "--against", str(tmp_path / DECAY)]
    ended = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 11, ended.stderr
    assert json.loads(ended.stdout)["verdict"] == "worse"


def test_json_says_all(runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    runs({"plain": {**PLAIN, 7: 4.0}, "dropout": {1: 4.02, 2: 4.19, 3: 3.99}})
    code, told, _ = ask(capsys, DROPOUT, BASE, "--json")
    answer = json.loads(told)
    assert code == 10
    assert set(answer) == {
        *("verdict", "metric", "difference", "low", "high", "confidence", "p", "pairs", "unpaired", "look"),
        *("more_seeds", "groups", "notes"),
    }
    assert answer["difference"] == pytest.approx(-0.17 / 3)
    assert (answer["pairs"], answer["unpaired"]) == (3, {"runs": 0, "against": 2})
    assert answer["confidence"] == pytest.approx(0.975)
    # statsmodels' TTestPower: 5.87 pairs for 80% power at 0.0567/0.0252 and the next look's 0.05/6; three are there.
    assert answer["more_seeds"] == 3


def test_the_table_of_a_report_gives_the_same_verdict(
    runs: Callable[..., Study], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = {"plain": PLAIN, "decay": {**BETTER, 9: 4.0}}
    study = runs(values)
    of_runs = ask(capsys, DECAY, BASE, "--json")
    assert of_runs[0] == 0

    results = []
    for name, by_seed in values.items():
        point = Point(name, KNOBS[name])
        for seed in by_seed:
            path = study.run_directory(point, seed)
            value = metric_value(path, "val/loss")
            results.append(Result(point, seed, "finished", read_summary(path), read_metrics(path), value, path))
    write_results(tmp_path / "results.csv", study, results)
    assert ask(capsys, "decay", "plain", "--table", "results.csv", "--json") == of_runs
    for column in ("value", "val/loss"):
        file = table(tmp_path / "table.csv", values, value=column)
        assert ask(capsys, "decay", "plain", "--table", file, "--json") == of_runs


def test_several_points_of_a_table_are_one_group(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    values = {"plain": PLAIN, "early": {1: 4.02, 2: 4.13}, "late": {3: 3.99, 4: 4.08}}
    file = table(tmp_path / "results.csv", values)
    code, told, _ = ask(capsys, ["early", "late"], "plain", "--table", file, "--json")
    assert code == 0 and json.loads(told)["pairs"] == 4


def test_the_column_named_like_the_metric_wins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    rows = [f"{p},{s},{0.5},{v}" for p, held in {"a": BETTER, "b": PLAIN}.items() for s, v in held.items()]
    file.write_text("\n".join(["point,seed,value,val/loss", *rows]))
    assert json.loads(ask(capsys, "a", "b", "--table", str(file), "--json")[1])["verdict"] == "better"


def test_a_study_chose_on_its_search_seeds(runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    fresh = {seed + 1000: value for seed, value in BETTER.items()}
    study = runs({"plain": {seed + 1000: value for seed, value in PLAIN.items()} | PLAIN, "decay": BETTER | fresh})
    (study.directory / "study.yaml").write_text("name: made-up\n")
    assert "the study made-up chose its winner" in ask(capsys, DECAY, BASE)[1]
    alone = [words.replace("seed*", "seed10??") for words in (DECAY, BASE)]
    assert "chose its winner" not in ask(capsys, *alone)[1]


# ---------------------------------------------------------------------------------------------- looks


def test_looks_are_counted_and_the_same_data_are_the_same_look(
    runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    def look(*words: str, swapped: bool = False) -> int:
        groups = (BASE, DROPOUT) if swapped else (DROPOUT, BASE)
        return int(json.loads(ask(capsys, *groups, "--json", *words)[1])["look"])

    runs({"plain": {1: PLAIN[1]}, "dropout": {1: SAME[1]}, "decay": BETTER})
    assert json.loads(ask(capsys, DROPOUT, BASE, "--json")[1])["look"] is None  # one run each: nothing can be claimed
    runs({"plain": PLAIN, "dropout": {1: SAME[1], 2: SAME[2]}})
    assert [look(), look(), look(swapped=True)] == [1, 1, 1]
    runs({"dropout": SAME})
    assert [look(), look()] == [2, 2]
    assert look("--metric", "val/bits_per_byte") == 3
    assert look() == 2
    assert json.loads(ask(capsys, DECAY, BASE, "--json")[1])["look"] == 1  # other groups
    assert look("--record", "mine.json") == 1 and Path("mine.json").exists()
    runs({"plain": {8: 4.1}, "dropout": {8: 4.2}})
    told = ask(capsys, DROPOUT, BASE)[1]
    assert (
        "(99.58% interval" not in told and "99.75% interval" in told and "This is look 4 at these two groups." in told
    )
    record = json.loads(Path("runs/made-up/.looks.json").read_text())
    assert [len(looks) for looks in record.values()] == [4, 1]


def test_a_record_that_cannot_be_written_is_a_warning(
    runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]
) -> None:
    runs({"plain": PLAIN, "decay": BETTER, "dropout": SAME})
    code, told, errors = ask(capsys, DECAY, BASE, "--record", "nowhere/looks.json")
    assert code == 0 and told.startswith("Better") and "this look is not recorded" in errors
    assert ask(capsys, DROPOUT, BASE, "--record", "mine.json")[0] == 10
    Path("mine.lock").unlink()
    Path("mine.lock").mkdir()  # a record that can be read and not added to: earlier looks count all the same
    runs({"dropout": {8: 4.3}, "plain": {8: 4.2}})
    told, errors = ask(capsys, DROPOUT, BASE, "--record", "mine.json")[1:]
    assert "this look is not recorded" in errors and "This is look 2 at these two groups." in told
    Path("broken.json").write_text("[1")
    code, _, errors = ask(capsys, DECAY, BASE, "--record", "broken.json")
    assert code == 2 and "broken.json should hold the record of earlier looks but is damaged" in errors


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fact", "value"), [("corpus", "facade"), ("tokens", 99), ("steps", 299), ("tokenizer", "another")]
)
def test_what_differs_is_refused_by_name(
    runs: Callable[..., Study], capsys: pytest.CaptureFixture[str], fact: str, value: Any
) -> None:
    runs({"plain": PLAIN})
    runs({"decay": BETTER}, **{fact: value})
    code, told, errors = ask(capsys, DECAY, BASE)
    assert code == 2 and not told
    assert f"differ in {fact}: {value} in runs/made-up/decay-seed1, runs/made-up/decay-seed2" in errors
    code, told, errors = ask(capsys, DECAY, BASE, "--allow-unequal")
    if fact in ("tokens", "steps"):
        assert code == 0 and f"The budgets are unequal, as you allowed: {value}, " in told
    else:
        assert code == 2 and f"differ in {fact}" in errors


def test_another_part_of_the_text_is_refused(runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    runs({"plain": PLAIN, "decay": BETTER})
    for path in Path("runs/made-up").glob("decay-*/config.yaml"):
        text = path.read_text()
        assert "max_tokens: 2000000" in text
        path.write_text(text.replace("max_tokens: 2000000", "max_tokens: 64"))
    code, _, errors = ask(capsys, DECAY, BASE)
    assert code == 2 and "differ in evaluation.max_tokens: 64 in runs/made-up/decay-seed1" in errors
    assert ask(capsys, DECAY, BASE, "--metric", "train/loss")[0] != 2


def test_runs_that_cannot_be_judged_are_named(runs: Callable[..., Study], capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(mine: str | Sequence[str], its: str | Sequence[str], *words: str) -> str:
        code, told, errors = ask(capsys, mine, its, *words)
        assert code == 2 and not told and "Traceback" not in errors
        return errors

    study = runs({"plain": PLAIN, "decay": BETTER})
    kinds = "'runs/made-up/decay-seed*', 'runs/made-up/plain-seed*'"
    assert f"runs/made-up: it is no run but holds 8; name those of one kind, as in {kinds}" in refusal(
        "runs/made-up", BASE
    )
    assert "there is no run directory runs/nothing*" in refusal("runs/nothing*", BASE)
    assert "config.yaml is a file" in refusal("runs/made-up/decay-seed1/config.yaml", BASE)
    assert "unknown metric 'val/los'; did you mean val/loss?" in refusal(DECAY, BASE, "--metric", "val/los")
    assert "is in both groups" in refusal(DECAY, [BASE, "runs/made-up/decay-seed2"])
    assert "are in one group but differ in regularizers.weight_decay" in refusal(
        ["runs/made-up/decay-seed1", "runs/made-up/plain-seed2"], "runs/made-up/plain-seed1"
    )
    shutil.copytree("runs/made-up/decay-seed1", "runs/made-up/again-seed1")
    assert "again-seed1 have the same seed, 1" in refusal([DECAY, "runs/made-up/again-seed1"], BASE)
    write_run(study, Point("decay", KNOBS["decay"]), 5, float("nan"), corpus="c0ffee")
    assert "decay-seed5 ended without a finite val/loss" in refusal(DECAY, BASE)
    write_run(study, Point("decay", KNOBS["decay"]), 5, 4.0, corpus="c0ffee", status="preempted")
    assert "decay-seed5 is not finished (its summary says preempted)" in refusal(DECAY, BASE)
    write_run(study, Point("decay", KNOBS["decay"]), 5, 4.0)
    assert "decay-seed5/summary.json does not say corpus" in refusal(DECAY, BASE)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no column 'point'"),
        ("point,seed\na,1\n", "has no column 'value'; needed are point, seed, value; found: point, seed"),
        ("point,seed,seed,value\na,1,1,2\n", "has twice the column 'seed'"),
        ("point,seed,value\na,1,2\na,1,3\nb,1,2\n", "line 2 and TABLE line 3 have the same seed, 1"),
        ("point,seed,value\na,1,\nb,1,2\n", "line 2: the value is '', not a finite number"),
        ("point,seed,value\na,1,nan\nb,1,2\n", "line 2: the value is 'nan', not a finite number"),
        ("point,seed,value\na,1,1e200\nb,1,2\n", "line 2: the value is '1e200', not a finite number"),
        ("point,seed,value\na,one,3\nb,1,2\n", "line 2: the seed is 'one'"),
        ("point,seed,value\na,1,3,4\nb,1,2\n", "line 2 has more cells than the header"),
        ("point,seed,value\nalpha,1,3\nb,1,2\n", "there is no point 'a'"),
        ('point,seed,value\na,1,"3\nb,1,2\n', "is not CSV"),
        ("point,seed,value,status\na,1,3,failed\nb,1,2,finished\n", "no row of a in TABLE has the status finished"),
        ("point,seed,value\n\xe9,1,3\n", "is not UTF-8"),
    ],
)
def test_a_table_is_refused_with_the_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, told: str
) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(text.encode("latin-1"))
    code, _, errors = ask(capsys, "a", "b", "--table", str(file))
    assert code == 2 and told.replace("TABLE", str(file)) in errors, errors


def test_an_endless_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = ask(capsys, "a", "b", "--table", "/dev/zero")
    assert code == 2 and "/dev/zero has more than 64 MiB" in errors


def test_rows_that_are_not_finished_are_left_out_and_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = Path(table(tmp_path / "results.csv", {"a": BETTER, "b": PLAIN}, status="finished"))
    file.write_text(file.read_text() + "a,9,,failed\n")
    code, told, _ = ask(capsys, "a", "b", "--table", str(file))
    assert code == 0 and "Left out as not finished: a seed 9: failed." in told
