"""The diagnosis of curves whose truth is known because they were made that way, and other people's files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from command_line import parse
from config import BadInput, Regularizers
from evaluation.curves import Series
from evaluation.diagnosis import diagnose, read_curves
from scripts import diagnose as script

Records = list[dict[str, Any]]


def curves(
    val: Any, gap: Any, noise: float = 0.0, points: int = 40, seed: int = 0, batch_noise: float = 0.0
) -> Records:
    """Records of a run of 1,000 steps whose val loss and gap are functions of the progress in (0, 1]."""
    draw = np.random.default_rng(seed)
    records = []
    for number in range(1, points + 1):
        progress = number / points
        here, between = val(progress) + noise * draw.normal(), gap(progress)
        record = {"step": round(1000 * progress), "epoch": 20 * progress, "val/loss": here, "gap/loss": between}
        record["train/loss"] = here - between + batch_noise * draw.normal()
        records.append(record)
    return records


def falling(floor: float, speed: float = 12) -> Any:
    """From 5 towards ``floor``, exponentially."""
    return lambda progress: floor + (5 - floor) * math.exp(-speed * progress)


def u_shaped(rise: float) -> Any:
    """Falls to 1.6 at about 0.4 of the run and then rises by about ``rise``."""
    return lambda progress: falling(1.6)(progress) + rise * max(0.0, progress - 0.4) / 0.6


CASES: dict[str, tuple[Any, Any, str]] = {
    "val turns up": (u_shaped(0.4), lambda p: 0.9 * p, "overfitting"),
    "val turns up a little": (u_shaped(0.06), lambda p: 0.4 * p, "overfitting"),
    "val is level, the gap opens": (falling(1.6), lambda p: 0.7 * p, "overfitting"),
    "too small: level, no gap": (falling(2.9), lambda p: 0.02, "underfitting"),
    "still falling, no gap": (falling(1.6, 2), lambda p: 0.01, "underfitting"),
    "still falling, some gap": (falling(1.6, 2), lambda p: 0.1, "underfitting"),
    "still falling, a large gap": (falling(1.6, 2), lambda p: 0.35 + 0.1 * p, "underfitting"),
    "level, a moderate gap": (falling(1.6), lambda p: 0.13, "well fitted"),
    "level, a moderate gap that opens": (falling(1.6), lambda p: 0.17 * p, "well fitted"),
    "level, a large gap that stays": (falling(1.6), lambda p: 0.3, "well fitted"),
    "training became unstable": (u_shaped(1.0), lambda p: 0.02, "underfitting"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("points", [10, 40, 200])
def test_curves_with_a_known_truth(name: str, points: int) -> None:
    val, gap, truth = CASES[name]
    found = diagnose(curves(val, gap, points=points))
    assert found.verdict == truth, found.text()
    assert found.evidence and found.advice and found.text().startswith(f"diagnosis         {truth}")


@pytest.mark.parametrize("name", [name for name in CASES if name != "val turns up a little"])
def test_noise_does_not_change_the_verdict(name: str) -> None:
    val, gap, truth = CASES[name]
    for seed in range(30):
        found = diagnose(curves(val, gap, noise=0.02, seed=seed, batch_noise=0.1))
        assert found.verdict == truth, (seed, found.text())


def test_a_level_noisy_curve_has_not_turned_up() -> None:
    """Its best point is always lower than its last; only the noise tells that this means nothing."""
    verdicts = [diagnose(curves(lambda p: 2.0, lambda p: 0.15, 0.05, seed=seed)).verdict for seed in range(50)]
    assert verdicts.count("overfitting") == 0


def test_the_noise_is_estimated_beside_any_slope_and_curvature() -> None:
    draw = np.random.default_rng(0)
    steps = np.arange(200.0)
    noisy = Series(steps, 3 * np.exp(-steps / 30) + 1e-5 * steps**2 + 0.02 * draw.normal(size=200))
    assert noisy.noise == pytest.approx(0.02, rel=0.25)
    assert Series(steps, 2 + 3 * steps + steps**2).noise == pytest.approx(0, abs=1e-8)


def test_too_early() -> None:
    few = diagnose(curves(u_shaped(0.5), lambda p: 0.9 * p, points=4))
    assert few.verdict == "too early to tell" and "4 evaluations" in few.evidence[0]
    assert diagnose([]).verdict == "too early to tell"
    val_alone = [{"step": r["step"], "val/loss": r["val/loss"]} for r in curves(falling(2), lambda p: 0)]
    assert diagnose(val_alone).verdict == "too early to tell"
    assert "no training loss" in diagnose(val_alone).text()


def test_the_evidence_names_the_numbers() -> None:
    text = diagnose(curves(u_shaped(0.4), lambda p: 0.9 * p)).text()
    assert "val was best at step 400" in text and "step 1,000" in text and "20.00 epochs" in text
    assert "gap val - train +0.9000, 45.0% of val" in text and "widening" in text


def test_the_gap_of_evaluation_mode_is_preferred_to_that_of_batches() -> None:
    """Dropout raises the batches' loss over val; without dropout the model has a large gap that opens."""
    records = curves(falling(1.6), lambda p: 0.7 * p)
    for record in records:
        record["train/loss"] = record["val/loss"] + 0.2
    assert diagnose(records).verdict == "overfitting"
    for record in records:
        del record["gap/loss"]
    assert diagnose(records).verdict == "underfitting"


def test_averaged_weights_are_judged() -> None:
    records = curves(u_shaped(0.4), lambda p: 0.9 * p)
    for record in records:
        record["val_average/loss"] = falling(1.5)(record["step"] / 1000)
    assert "averaged weights" in diagnose(records).text()
    assert "rose" not in diagnose(records).text()
    for record in records[:-2]:
        del record["val_average/loss"]
    assert "rose" in diagnose(records).text() and "averaged weights" not in diagnose(records).text()


def test_losses_that_are_not_finite_are_told() -> None:
    records = curves(falling(1.6), lambda p: 0.13)
    records[5] |= {"val/loss": math.nan, "train/loss": math.inf}
    found = diagnose(records)
    assert found.verdict == "well fitted" and "2 losses are not finite" in found.text()


@pytest.mark.parametrize("name", ["val/loss", "train/loss"])
def test_losses_that_are_not_finite_at_the_end_are_a_training_that_broke(name: str) -> None:
    records = curves(falling(1.6), lambda p: 0.13)
    records[-1][name] = math.nan
    found = diagnose(records)
    assert found.verdict == "underfitting" and "lower the learning rate" in found.advice[0]
    assert not any("longer:" in line for line in found.advice)


def test_a_loss_of_exactly_zero_is_judged() -> None:
    """On a text of one letter every loss becomes 0: nothing is left to learn, and nothing is divided by it."""
    records = curves(lambda p: max(0.0, 1 - 2 * p), lambda p: 0.0)
    for record in records:
        record["gap/loss"] = 0.0
    found = diagnose(records)
    assert found.verdict == "well fitted" and "0.0% of val" in found.text()


# ---------------------------------------------------------------------------------------------- advice


def test_the_recipe_against_overfitting_in_its_order() -> None:
    advice = diagnose(curves(u_shaped(0.4), lambda p: 0.9 * p), parse([])).advice
    words = ("weight_decay=0.3, then 1", "residual_dropout=0.1", "token_replacement", "early_stopping", "ema_decay")
    assert all(word in line for word, line in zip(words, advice, strict=False)), advice


def test_the_advice_goes_on_from_what_is_on() -> None:
    on = ["weight_decay=1.5", "residual_dropout=0.2", "token_replacement=0.1", "early_stopping_patience=3"]
    config = parse([f"--regularizers.{knob}" for knob in [*on, "ema_decay=0.99"]])
    text = "\n".join(diagnose(curves(u_shaped(0.4), lambda p: 0.9 * p), config).advice)
    assert "weight_decay=4.5" in text and "residual_dropout=0.3" in text
    assert not any(word in text for word in ("token_replacement", "early_stopping", "ema_decay"))
    assert "weight_decay=0.1" in diagnose(
        curves(u_shaped(0.4), lambda p: 0.9 * p), parse(["--regularizers.weight_decay=0"])
    ).advice[0]  # fmt: skip


def test_a_model_whose_weights_were_given_is_not_to_grow() -> None:
    records = curves(falling(4.0), lambda p: 0.01)
    for start, grows in ((), True), (["--run.init_from=other"], False), (["--run.branch_from=other"], False):
        assert any("grow" in line for line in diagnose(records, parse(list(start))).advice) is grows


def test_advice_against_underfitting_depends_on_what_still_moves() -> None:
    config = parse(["--regularizers.residual_dropout=0.2", "--regularizers.weight_decay=0.9", "--model.d_model=64"])
    moving = diagnose(curves(falling(1.6, 2), lambda p: 0.01), config).advice
    assert moving[0].startswith("train longer: --training.max_steps=2000,") and "--model.d_model=128" in moving[-1]
    level = diagnose(curves(falling(2.9), lambda p: 0.02), config).advice
    assert "--regularizers.residual_dropout=0 --regularizers.weight_decay=0.3" in level[0]
    assert "grow the model" in level[1] and "max_steps" in level[-1]
    unstable = diagnose(curves(u_shaped(1.0), lambda p: 0.02), config).advice
    assert "--optimizer.lr=0.00067" in unstable[0]


def test_every_flag_of_the_advice_is_one_that_train_takes() -> None:
    configs = [None, parse([]), parse(["--regularizers.mlp_dropout=0.1", "--training.max_epochs=3"])]
    for val, gap, _ in CASES.values():
        for config in configs:
            for line in diagnose(curves(val, gap), config).advice:
                flags = [word.strip("(),;") for word in line.split() if word.strip("(").startswith("--")]
                parse([flag for flag in flags if "=" in flag and "MODULE" not in flag])


# ---------------------------------------------------------------------------------------------- other people's files


def columns(records: Records, names: dict[str, str], separator: str = ",") -> str:
    """The records as CSV under other names."""
    lines = [separator.join(names.values())]
    lines += [separator.join(str(record.get(name, "")) for name in names) for record in records]
    return "\n".join(lines)


OVERFITTED = curves(u_shaped(0.4), lambda p: 0.9 * p)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "names",
    [
        {"step": "iteration", "train/loss": "loss", "val/loss": "val_loss"},
        {"step": "Step", "train/loss": "Train_Loss", "val/loss": "Valid/Loss", "epoch": "Epoch"},
        {"step": "global_step", "train/loss": "train", "val/loss": "eval_loss"},
        {"epoch": "epoch", "train/loss": "train_loss", "val/loss": "validation loss"},
        {"step": "Step", "train/loss": "my-run - train/loss", "val/loss": "my-run - val/loss"},
    ],
)
def test_csv_of_others(tmp_path: Path, names: dict[str, str], separator: str) -> None:
    file = tmp_path / "log.csv"
    file.write_text("\ufeff" + columns(OVERFITTED, names, separator) + "\n", encoding="utf-8")
    found = diagnose(read_curves(file))
    assert found.verdict == "overfitting"
    assert ("best at step 400" if "step" in names else "best at epoch 8") in found.text()


def test_json_of_others(tmp_path: Path) -> None:
    lines = [{"iter": record["step"], "valid_loss": record["val/loss"]} for record in OVERFITTED]
    lines += [{"iter": record["step"], "loss": record["train/loss"]} for record in OVERFITTED]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"iter": 3, "lo')
    assert diagnose(read_curves(tmp_path / "log.jsonl")).verdict == "overfitting"
    # transformers' Trainer: losses on lines of their own, and a last line whose train_loss is a mean over the run
    history = [{"step": record["step"], "loss": record["train/loss"]} for record in OVERFITTED]
    history += [{"step": record["step"], "eval_loss": record["val/loss"]} for record in OVERFITTED]
    history += [{"step": 1000, "train_loss": 2.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "best_metric": None}))
    found = diagnose(read_curves(tmp_path / "trainer_state.json"))
    assert found.verdict == "overfitting" and "from the loss of training batches" in found.text()


def test_a_number_that_no_float_can_hold_is_left_out(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "val/loss": 1{"0" * 400}}}' for step in range(10)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert diagnose(read_curves(tmp_path / "log.jsonl")).verdict == "too early to tell"


def test_our_own_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in OVERFITTED) + '{"st')
    assert read_curves(tmp_path) == OVERFITTED == read_curves(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n1,2\n", r"steps .* and the validation loss .* it has: 'a', 'b'"),
        ("step,loss\n1,2\n", r"validation loss .* it has: 'step', 'loss'"),
        ("val_loss\n2\n", "the steps"),
        ("", "it has: none"),
        ("step,val_loss\n,\n", "holds no line"),
        ('{"step": 1}\n{"st\n{"step": 2}\n', "line 2, is not JSON"),
        ("[1, 2]", "it has: none"),
        ("[" * 100_000, "it has: none"),
        (f'[{{"step": 1{"0" * 400}, "val_loss": 1}}]', "holds no line"),
        ("step,val_loss\n1," + "2" * 200_000 + "\n", "field larger than field limit"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "log"
    file.write_text(content)
    with pytest.raises(BadInput, match=words):
        read_curves(file)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"there is no .*metrics\.jsonl"):
        read_curves(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="UTF-8"):
        read_curves(tmp_path / "binary")


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_and_its_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.csv"
    file.write_text(columns(OVERFITTED, {"step": "iter", "train/loss": "loss", "val/loss": "val"}))
    assert script.main([str(file), "--picture", str(tmp_path / "out.png")]) == 0
    assert "diagnosis         overfitting" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="or --list"):
        script.main([])
    with pytest.raises(BadInput, match="no directory"):
        script.main([str(file), "--picture", str(tmp_path / "nowhere" / "out.png")])


def test_the_list_has_every_knob_and_comes_at_once() -> None:
    code = (
        "import sys; from scripts.diagnose import main; main(['--list']); "
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert time.monotonic() - started < 5  # a quarter of a second on an idle machine
    for name, field in Regularizers.model_fields.items():
        assert f"\n{name} " in ended.stdout
        assert (field.description or "?").split()[-1] in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 140
