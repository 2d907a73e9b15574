"""metrics.jsonl is whole whatever happens to W&B; W&B mirrors it; pictures are drawn from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import parse
from tracking.metrics import Metrics, read_metrics, results_of
from tracking.weights_and_biases import wandb_mode

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]


def line(step: int) -> dict[str, float]:
    return {"step": step, "tokens": step * 8, "epoch": step / 10, "train/loss": 1 / step}


@pytest.mark.fault(24)
def test_lines_past_the_checkpoint_and_a_torn_one_are_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        metrics.append(line(step))
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "tok')
    again = Metrics(tmp_path, 2)
    again.append(line(3))
    again.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_what_the_summary_keeps_of_the_lines() -> None:
    """The last value that is a number, the middle one of the speeds, the best as it is, the test under its name."""
    speeds = [{"step": step, "train/tokens_per_second": speed} for step, speed in enumerate((9.0, 500.0, 7.0), 1)]
    lines = [speeds[0] | {"val/loss": 3.0}, speeds[1] | {"val/loss": 2.0}, speeds[2] | {"val/loss": None}]
    assert results_of(lines, {"step": 2, "val/loss": 2.0}, {"loss": 2.5}) == {
        "test/loss": 2.5,
        "best/step": 2,
        "best/val/loss": 2.0,
        "final/val/loss": 2.0,
        "tokens_per_second": 9.0,
    }
    assert results_of([], None, {}) == {}


def test_what_json_has_no_word_for_is_written_as_null(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.append(line(1) | {"train/loss": float("inf"), "val/loss": float("nan")})
    metrics.close()
    (record,) = read_metrics(tmp_path)
    assert record["train/loss"] is record["val/loss"] is None and record["epoch"] == 0.1


def test_modes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert wandb_mode(parse([])) == "disabled"
    assert wandb_mode(parse(["--tracking.wandb=offline"])) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode(parse([])) == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(parse([])) == "offline"
    assert wandb_mode(parse(["--tracking.wandb=online"])) == "online"  # WANDB_MODE wins over auto only


@pytest.fixture
def wandb_home(tmp_path: Path) -> dict[str, str]:
    """W&B's own directories in the test's."""
    names = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")
    return {name: str(tmp_path / name.lower()) for name in names}


def test_offline_leaves_config_history_and_summary(
    train: Train, tiny: Flags, tmp_path: Path, wandb_home: dict[str, str]
) -> None:
    ended = train(tiny(training__max_steps=8, evaluation__every=4), WANDB_MODE="offline", **wandb_home)
    assert ended.returncode == 0, ended.stderr
    files = list((tmp_path / "runs/tiny/wandb").glob("offline-run-*/run-*.wandb"))
    assert f"to upload: wandb sync {files[0].parent}\n" in ended.stdout
    assert len(files) == 1
    asked = subprocess.run(
        [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json", str(files[0])],
        capture_output=True,
        text=True,
        env=os.environ | wandb_home,
    )
    assert asked.returncode == 0, asked.stderr
    ours = {
        record["step"]: record["val/loss"] for record in read_metrics(tmp_path / "runs/tiny") if "val/loss" in record
    }
    assert len(ours) == 2
    for word in ("val/loss", "n_layers", "best/val/loss", str(ours[8])[:7]):
        assert word in asked.stdout, word


@pytest.mark.fault(35)
def test_an_unreachable_server_costs_at_most_ten_seconds(
    train: Train, tiny: Flags, tmp_path: Path, wandb_home: dict[str, str]
) -> None:
    """Nobody listens at this address: the run warns, goes on offline and keeps all its metrics."""
    flags = tiny(training__max_steps=2)
    started = time.monotonic()
    assert train(flags).returncode == 0
    usual = time.monotonic() - started
    started = time.monotonic()
    unreachable = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    ended = train([*flags, "--run.name=second"], **unreachable, **wandb_home)
    assert ended.returncode == 0, ended.stderr
    assert "W&B online is not to be had" in ended.stderr and "offline is not" not in ended.stderr
    assert list((tmp_path / "runs/second/wandb").glob("offline-run-*/run-*.wandb"))  # for `wandb sync`, later
    assert time.monotonic() - started < usual + 25  # 10 s alone on a machine; tests share it
    one, other = (json.loads((tmp_path / f"runs/{name}/summary.json").read_text()) for name in ("tiny", "second"))
    assert one["final/val/loss"] == other["final/val/loss"]
    assert len(read_metrics(tmp_path / "runs/tiny")) == len(read_metrics(tmp_path / "runs/second"))
