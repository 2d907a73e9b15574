"""Every regularizer at once, through the real program: resume, processes, early stopping, averaged weights."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from tracking.load_run import load_model
from tracking.metrics import read_metrics
from training.checkpoint import existing, read_tensors

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

EVERYTHING = {
    "embedding_dropout": 0.1,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "mlp_dropout": 0.1,
    "stochastic_depth": 0.2,
    "token_dropout": 0.1,
    "token_replacement": 0.1,
    "embedding_noise": 5.0,
    "mixup_alpha": 0.4,
    "reversed_fraction": 0.3,
    "target_offset": 3,
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "entropy_penalty": 0.05,
    "multi_token_weight": 0.3,
    "masked_input_weight": 0.4,
    "weight_decay": 0.2,
    "weight_decay_schedule": "cosine",
    "cautious_weight_decay": "true",
    "dropout_from": 0.2,
    "dropout_until": 0.8,
    "l1": 1e-5,
    "l2": 1e-4,
    "ema_decay": 0.9,
    "early_stopping_patience": 50,
}
NUMBERS = [f"train/{name}" for name in ("loss", "objective", "entropy", "multi_token_loss", "masked_input_loss")]
NUMBERS += ["val/loss", "val_average/loss", "val/ece"]
KNOBS = {f"regularizers__{name}": value for name, value in EVERYTHING.items()}


@pytest.mark.fault(1)
def test_killed_with_everything_on(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """kill -9 and the same command: model, optimizer and average end with the same bits as without."""
    alone = tiny(run__name="alone", checkpoint__every=5, **KNOBS)
    assert train(alone).returncode == 0
    flags = tiny(checkpoint__every=5, tracking__log_every=1, **KNOBS)
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    while len(read_metrics(tmp_path / "runs/tiny")) < 12 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    ended = train(flags)
    assert "goes on from step" in ended.stdout, ended.stderr
    last = [existing(tmp_path / "runs" / name / "checkpoints")[0] for name in ("alone", "tiny")]
    for file in ("model", "optimizer", "average"):
        one, other = (read_tensors(path, file) for path in last)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_between_two_fractions_of_the_run(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """Before dropout_from and after dropout_until steps are those without dropout to the last bit, between them not.

    Of 24 steps, with an evaluation (which switches all modules off and on) in the middle of each part.
    """
    rates = [name for name in KNOBS if re.search("_dropout$|_depth$", name)]
    flags = KNOBS | {"tracking__log_every": 1, "evaluation__every": 4, "evaluation__max_tokens": 200}
    windows = {"always": (0, 1), "never": (0, 1), "late": (0.5, 1), "early": (0, 0.5), "between": (0.25, 0.75)}
    losses = {}
    for name, (start, end) in windows.items():
        knobs = flags | {"run__name": name, "regularizers__dropout_from": start, "regularizers__dropout_until": end}
        knobs |= dict.fromkeys(rates, 0) if name == "never" else {}
        assert train(tiny(**knobs)).returncode == 0
        losses[name] = [record["train/loss"] for record in read_metrics(tmp_path / "runs" / name)]
        assert len(losses[name]) == 24
    assert losses["late"][:12] == losses["never"][:12] and losses["late"][12] != losses["never"][12]
    assert losses["early"][:12] == losses["always"][:12] and losses["early"][12] != losses["always"][12]
    assert losses["between"][:6] == losses["never"][:6] and losses["between"][6] != losses["never"][6]


@pytest.mark.parametrize("every", ["3", "epoch"])
def test_early_stopping_stops_restores_and_resumes(every: str, train: Train, tiny: Flags, tmp_path: Path) -> None:
    """At a learning rate that ruins the model, val gets worse: the run ends early with the best weights."""
    knobs = {"regularizers__early_stopping_patience": 2, "evaluation__every": every, "tracking__log_every": 1}
    knobs |= {
        "training__max_steps": 2000,
        "data__train_tokens": 600,
        "optimizer__lr": 0.05,
        "data__test_fraction": 0.05,
    }
    knobs |= {"schedule__name": "constant", "regularizers__weight_decay": 0}
    ended = train(tiny(**knobs))
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "runs/tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["stopped_early"] and summary["steps"] < 2000
    assert "Stopped early" in ended.stdout and f"step {summary['best/step']}" in ended.stdout
    losses = {record["step"]: record["val/loss"] for record in read_metrics(run) if "val/loss" in record}
    assert summary["best/step"] == min(losses, key=losses.__getitem__) == list(losses)[-3]
    # What is loaded, exported and tested is the best.
    best, _, _ = load_model(run)
    stored = read_tensors(run / f"checkpoints/step_{summary['best/step']:08d}", "model")
    assert all(torch.equal(value, stored[name]) for name, value in best.state_dict().items())
    # Killed before its last evaluation and started again, it stops at the same step.
    flags = tiny(**knobs | {"run__name": "again", "checkpoint__every": 1})
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags], cwd=tmp_path, stdout=subprocess.PIPE)
    again = tmp_path / "runs/again"
    while len(read_metrics(again)) < summary["steps"] - 1 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert train(flags).returncode == 0
    assert json.loads((again / "summary.json").read_text())["steps"] == summary["steps"]
    assert [r.get("val/loss") for r in read_metrics(again)] == [r.get("val/loss") for r in read_metrics(run)]


def test_the_average_is_what_is_judged_saved_and_loaded(train: Train, tiny: Flags, tmp_path: Path) -> None:
    assert train(tiny(regularizers__swa_start=0.5, regularizers__swa_every=2)).returncode == 0
    run = tmp_path / "runs/tiny"
    records = [record for record in read_metrics(run) if "val/loss" in record]
    assert ["val_average/loss" in record for record in records] == [False, True, True]
    summary = json.loads((run / "summary.json").read_text())
    judged = {record["step"]: record.get("val_average/loss", record["val/loss"]) for record in records}
    assert summary["best/val/loss"] == min(judged.values())
    last = existing(run / "checkpoints")[0]
    raw, average = read_tensors(last, "model"), read_tensors(last, "average")
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    model, _, _ = load_model(last)
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_l1_reports_the_share_of_small_weights(train: Train, tiny: Flags, tmp_path: Path) -> None:
    for name, l1 in (("plain", 1e-12), ("sparse", 0.05)):
        assert train(tiny(run__name=name, regularizers__l1=l1, training__max_steps=60)).returncode == 0
    plain, sparse = (
        json.loads((tmp_path / "runs" / name / "summary.json").read_text())["sparsity"] for name in ("plain", "sparse")
    )
    assert set(plain) == set(sparse) and "blocks.0.mlp.input.weight" in plain
    assert sum(sparse.values()) > 2 * sum(plain.values())
