"""Runs that learn from other runs: whom they take, what is stored, what is refused, and the laws with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY, flags_of, in_this_process

from files import sha256
from hardware import missing_for_compile
from tracking.metrics import read_metrics
from training.checkpoint import existing, read_tensors

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

# All that meets distillation in a step.
COMBINED = {
    "regularizers__distillation_weight": 0.6,
    "regularizers__distillation_temperature": 2,
    "regularizers__residual_dropout": 0.1,
    "regularizers__token_replacement": 0.1,
    "regularizers__mixup_alpha": 0.4,
    "regularizers__label_smoothing": 0.1,
    "regularizers__z_loss": 1e-4,
    "regularizers__entropy_penalty": 0.05,
    "regularizers__ema_decay": 0.9,
    "tracking__log_every": 1,
}
ALONE = {"regularizers__distillation_weight": 1, "regularizers__weight_decay": 0, "tracking__log_every": 1}


@pytest.fixture(scope="module")
def taught_by(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The directory of three finished runs: long, with a longer context and averaged weights; wide; and other, which
    has another tokenizer, a shorter context and isolated documents."""
    directory = tmp_path_factory.mktemp("teachers")
    others: dict[str, dict[str, Any]] = {
        "long": {"model__context_length": 48, "regularizers__ema_decay": 0.8, "model__family": "gpt2"},
        "wide": {"model__d_model": 48, "run__seed": 1},
        "other": {"data__tokenizer": "bpe", "data__vocab_size": 300, "model__context_length": 16}
        | {"data__isolate_documents": "true"},
    }
    for name, knobs in others.items():
        knobs |= {"run__name": name, "training__max_steps": 8}
        ended = in_this_process(flags_of(TINY, text_file, directory, **knobs), directory)
        assert ended.returncode == 0, ended.stderr
    return directory / "runs"


def listed(*runs: object) -> str:
    return f"[{','.join(map(str, runs))}]"


def summary(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "summary.json").read_text()))


def test_a_run_that_begins_as_its_teacher_has_nothing_to_learn(
    train: Train, tiny: Flags, whole_run: Path, tmp_path: Path
) -> None:
    """Of its 24 steps: no divergence, no gradient, and the weights are those of the teacher; the loss is as it was."""
    knobs = ALONE | {"run__init_from": whole_run, "run__teachers": listed(whole_run), "model__family": "llama"}
    ended = train(tiny(**knobs, optimizer__eps=1.0))  # AdamW would magnify rounding
    assert ended.returncode == 0, ended.stderr
    for record in read_metrics(tmp_path / "runs/tiny"):
        assert abs(record["train/distillation_loss"]) < 1e-6 and record["train/grad_norm"] < 1e-5
        assert record["train/objective"] == record["train/distillation_loss"] and record["train/loss"] > 2
    one, other = (
        read_tensors(existing(run / "checkpoints")[0], "model") for run in (tmp_path / "runs/tiny", whole_run)
    )
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_teachers_are_the_best_weights_by_their_shares_and_are_stored(
    train: Train, tiny: Flags, taught_by: Path, tmp_path: Path
) -> None:
    """A run, a checkpoint, and a file that lists one with twice the weight."""
    entry = {"run": str(taught_by / "wide"), "checkpoint": "step_00000008", "weight": 2}
    (tmp_path / "ensemble.json").write_text(json.dumps({"members": [entry]}))
    teachers = listed(taught_by / "long", taught_by / "wide/checkpoints/step_00000008", "ensemble.json")
    ended = train(tiny(**COMBINED, run__teachers=teachers))
    assert ended.returncode == 0, ended.stderr
    assert "long/checkpoints/step_00000008, 25% of the mean" in ended.stdout and "50% of the mean" in ended.stdout
    stored = summary(tmp_path / "runs/tiny")["teachers"]
    assert [one["share"] for one in stored] == [0.25, 0.25, 0.5]
    assert [one["weights"] for one in stored] == ["average", "model", "model"]
    for one in stored:
        file = taught_by.parent / one["checkpoint"] / f"{one['weights']}.safetensors"
        assert sha256(file) == one["sha256"]
    losses = [record["train/distillation_loss"] for record in read_metrics(tmp_path / "runs/tiny")]
    assert len(losses) == 24 and min(losses) > 0


def test_killed_twice_it_ends_with_the_same_bits(train: Train, tiny: Flags, taught_by: Path, tmp_path: Path) -> None:
    knobs = COMBINED | {"run__teachers": listed(taught_by / "long", taught_by / "wide"), "checkpoint__every": 4}
    assert train(tiny(**knobs, run__name="whole")).returncode == 0
    for fault in ("save-begin:0:12:kill", "save-begin:0:20:kill"):
        assert train(tiny(**knobs), WELLPOSED_FAULT=fault).returncode == -9
    ended = train(tiny(**knobs))
    assert ended.returncode == 0 and "goes on from step 16" in ended.stdout
    runs = [tmp_path / "runs" / name for name in ("whole", "tiny")]
    for file in ("model", "optimizer", "average"):
        one, other = (read_tensors(existing(run / "checkpoints")[0], file) for run in runs)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = ([record["train/distillation_loss"] for record in read_metrics(run)] for run in runs)
    assert one == other and len(one) == 24


def test_processes_and_micro_batches_change_nothing(train: Train, tiny: Flags, taught_by: Path, tmp_path: Path) -> None:
    """1 process x 4 micro-batches and 2 x 2 agree to float rounding (law 5)."""
    knobs = COMBINED | {"run__teachers": listed(taught_by / "long", taught_by / "wide")}
    knobs |= {"training__micro_batch_size": 2}
    assert train(tiny(run__name="one", **knobs)).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *tiny(run__name="two", **knobs)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr
    one, two = (read_metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    assert len(one) == len(two) == 24
    for a, b in zip(one, two, strict=True):
        for name in ("train/loss", "train/objective", "train/distillation_loss", "val/loss"):
            if name in a:
                assert a[name] == pytest.approx(b[name], abs=1e-5), (a["step"], name)


@pytest.mark.parametrize(
    "how",
    [{"run__precision": "bf16"}, pytest.param({"run__compile": "on"}, marks=pytest.mark.slow)],
    ids=["bf16", "on"],
)
def test_it_is_nearly_the_same_in_bf16_and_compiled(
    how: dict[str, str], train: Train, tiny: Flags, taught_by: Path, tmp_path: Path
) -> None:
    if "run__compile" in how and missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    knobs = COMBINED | {"run__teachers": listed(taught_by / "long", taught_by / "wide"), "training__max_steps": 3}
    for name, changes in (("plain", {}), ("other", how)):
        assert train(tiny(**knobs | changes, run__name=name)).returncode == 0
    plain, other = (read_metrics(tmp_path / "runs" / name) for name in ("plain", "other"))
    tolerance = 2e-2 if "run__precision" in how else 1e-5
    for name in ("train/objective", "train/distillation_loss"):
        assert [r[name] for r in other] == pytest.approx([r[name] for r in plain], rel=tolerance)


@pytest.mark.parametrize(
    ("teachers", "changes", "message"),
    [
        ("[]", {}, "need each other; give both, as in --regularizers.distillation_weight=0.5 --run.teachers="),
        ("[{}/long]", {"regularizers__distillation_weight": 0}, "need each other"),
        ("[{}/nowhere]", {}, "error: run.teachers: {}/nowhere is neither a run directory"),
        ("[{}/unfinished]", {}, "is not finished (running); start it again, or name a checkpoint of it"),
        ("[{}/other]", {}, "other has another tokenizer; use that, with --data.tokenizer="),
        (
            "[{}/long,{}/other]",
            {},
            "other reads at most 16 tokens, and this run's windows have 32; use --model.context",
        ),
        ("[{}/other]", {}, "has learnt to read one document at a time; use --data.isolate_documents=true"),
        ("[{}/long]", {"data__isolate_documents": "true", "regularizers__mixup_alpha": 0}, "across the borders of"),
        ("[runs/tiny/checkpoints/step_00000001]", {}, "is this run itself"),
    ],
)
def test_who_cannot_teach_is_refused(
    teachers: str, changes: dict[str, Any], message: str, train: Train, tiny: Flags, taught_by: Path, tmp_path: Path
) -> None:
    unfinished = shutil.copytree(taught_by / "long", taught_by / "unfinished", dirs_exist_ok=True)
    (unfinished / "summary.json").write_text(json.dumps(summary(unfinished) | {"status": "running"}))
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.yaml").write_text("{}")
    refused = train(tiny(**COMBINED | changes, run__teachers=teachers.replace("{}", str(taught_by))))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert message.replace("{}", str(taught_by)) in refused.stderr, refused.stderr
    assert not (tmp_path / "runs/tiny/summary.json").exists()


def test_a_checkpoint_of_an_unfinished_run_can_teach(
    train: Train, tiny: Flags, taught_by: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(taught_by / "wide", tmp_path / "unfinished")
    (run / "summary.json").write_text(json.dumps(summary(run) | {"status": "running"}))
    knobs = ALONE | {"run__teachers": listed(run / "checkpoints/step_00000008"), "training__max_steps": 1}
    assert train(tiny(**knobs)).returncode == 0


@pytest.mark.parametrize("change", ["weights", "share"])
def test_other_teachers_are_refused_on_resume(
    change: str, train: Train, tiny: Flags, taught_by: Path, tmp_path: Path
) -> None:
    """The flags are the same: the teacher was trained again meanwhile, or the list was edited."""
    run = shutil.copytree(taught_by / "wide", tmp_path / "teacher")
    members = [{"run": str(path), "checkpoint": "step_00000008"} for path in (run, taught_by / "long")]
    (tmp_path / "list.json").write_text(json.dumps({"members": members}))
    knobs = ALONE | {"run__teachers": listed(tmp_path / "list.json"), "checkpoint__every": 4}
    assert train(tiny(**knobs), WELLPOSED_FAULT="save-begin:0:12:kill").returncode == -9
    if change == "weights":
        shutil.rmtree(run)
        again = tiny(run__dir=tmp_path, run__name="teacher", training__max_steps=8)
        assert train(again).returncode == 0
    else:
        members[0]["weight"] = 3  # type: ignore[assignment]
        (tmp_path / "list.json").write_text(json.dumps({"members": members}))
    before = (tmp_path / "runs/tiny/summary.json").read_bytes()
    refused = train(tiny(**knobs))
    assert refused.returncode == 2 and "began with other teachers" in refused.stderr
    assert ("0.75 of the mean" in refused.stderr) == (change == "share")
    assert (tmp_path / "runs/tiny/summary.json").read_bytes() == before


def test_a_teacher_of_another_corpus_is_warned_of(train: Train, tiny: Flags, taught_by: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("something else " * 2000)
    knobs = ALONE | {"run__teachers": listed(taught_by / "wide"), "training__max_steps": 1, "data__path": other}
    ended = train(tiny(**knobs))
    assert ended.returncode == 0 and "was trained on another corpus" in ended.stderr
