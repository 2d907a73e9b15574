"""Runs that go on from a checkpoint of another run, and the checkpoints that are kept for it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, flags_of, in_this_process
from torch import nn

from command_line import parse
from config import Regularizers
from regularizers.averaging import WeightAverage
from tracking.metrics import read_metrics
from tracking.run_directory import default_name
from training.checkpoint import existing, read_state, read_tensors

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

# What the runs of this file share: dropout, an average of weights, and a learning rate that is warm after two steps.
COMMON: dict[str, Any] = {
    "regularizers__residual_dropout": 0.2,
    "regularizers__ema_decay": 0.8,
    "schedule__warmup_steps": 2,
    "evaluation__every": 4,
    "tracking__log_every": 1,
}
COOLDOWN = {"schedule__name": "wsd", "schedule__decay_fraction": 0.5, "schedule__min_lr_ratio": 0}
SWA = {"regularizers__ema_decay": 0, "regularizers__swa_start": 0.25}


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A directory with the finished run tiny: constant learning rate, a milestone at half of its 24 steps."""
    directory = tmp_path_factory.mktemp("stable")
    knobs = COMMON | {"schedule__name": "constant", "checkpoint__at": "[12]", "checkpoint__keep": 1}
    assert in_this_process(flags_of(TINY, text_file, directory, **knobs), directory).returncode == 0
    return directory / "runs/tiny"


def digests(run: Path, step: int) -> dict[str, str]:
    """The sha256 of each file of tensors in a checkpoint."""
    files = (run / f"checkpoints/step_{step:08d}").glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run after step 12, times aside."""
    records = [record for record in read_metrics(run) if record["step"] > 12]
    return [{key: value for key, value in record.items() if "per_second" not in key} for record in records]


def contents(directory: Path) -> dict[Path, bytes]:
    """Every file of a directory."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changes", [{}, SWA, {"optimizer__name": "muon"}], ids=["ema", "swa", "muon"])
def test_a_cooldown_from_a_stable_phase_is_the_run_whose_schedule_said_so(
    changes: dict[str, Any], stable: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    """Bit for bit: weights, moments, averaged weights, every number, and the fingerprint of all samples."""
    parent = stable
    if changes:
        parent, knobs = tmp_path / "runs/parent", {"schedule__name": "constant", "checkpoint__at": "[12]"}
        assert train(tiny(**COMMON | knobs | {"run__name": "parent"} | changes)).returncode == 0
    before = contents(parent)
    cooled = COMMON | COOLDOWN | changes
    ended = train(tiny(**cooled, run__name="branch", run__branch_from=parent / "checkpoints/step_00000012"))
    assert ended.returncode == 0, ended.stderr
    assert contents(parent) == before
    assert train(tiny(**cooled, run__name="at_once")).returncode == 0
    branch, at_once = tmp_path / "runs/branch", tmp_path / "runs/at_once"
    assert digests(branch, 24) == digests(at_once, 24) != digests(parent, 24)
    assert set(digests(branch, 24)) == {"model.safetensors", "optimizer.safetensors", "average.safetensors"}
    assert numbers(branch) == numbers(at_once) and len(numbers(branch)) == 12
    summary = json.loads((branch / "summary.json").read_text())
    assert summary["samples"] == json.loads((at_once / "summary.json").read_text())["samples"]
    assert summary["branch"]["step"] == 12 and summary["branch"]["changes"] == {
        "schedule.name": ["constant", "wsd"],
        "schedule.decay_fraction": [0.2, 0.5],
        "schedule.min_lr_ratio": [0.1, 0.0],
    }
    assert "schedule.name: constant became wsd" in ended.stdout


def test_a_branch_resumes_also_before_its_own_first_checkpoint(
    stable: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    """After its first checkpoint not even the parent's is needed. Another regularizer acts from the branch on."""
    parent = shutil.copytree(stable, tmp_path / "runs/parent")
    knobs = COMMON | {"regularizers__mlp_dropout": 0.3, "schedule__name": "constant"}
    knobs["run__branch_from"] = parent / "checkpoints/step_00000012"
    assert train(tiny(**knobs, run__name="whole")).returncode == 0
    for fault in ("save-begin:0:12:kill", "save-begin:0:20:kill"):
        assert train(tiny(**knobs), WELLPOSED_FAULT=fault).returncode == -9
    shutil.rmtree(parent)
    ended = train(tiny(**knobs))
    assert ended.returncode == 0 and "goes on from step 16" in ended.stdout
    run, whole = tmp_path / "runs/tiny", tmp_path / "runs/whole"
    assert digests(run, 24) == digests(whole, 24) and numbers(run) == numbers(whole)
    assert json.loads((run / "summary.json").read_text())["branch"]["changes"] == {"regularizers.mlp_dropout": [0, 0.3]}
    assert read_metrics(run)[0]["step"] == 13


def test_a_finished_run_asked_for_more_says_how(stable: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    shutil.copytree(stable, tmp_path / "runs/tiny")
    knobs = COMMON | {"schedule__name": "constant", "training__max_steps": 28}
    refused = train(tiny(**knobs))
    assert refused.returncode == 2 and f"--run.branch_from={tmp_path}/runs/tiny and another" in refused.stderr
    ended = train(tiny(**knobs, run__branch_from=tmp_path / "runs/tiny", run__name="longer"))
    assert ended.returncode == 0, ended.stderr
    assert train(tiny(**knobs, run__name="at_once")).returncode == 0
    assert digests(tmp_path / "runs/longer", 28) == digests(tmp_path / "runs/at_once", 28)


def test_the_best_of_a_branch_is_its_own(stable: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    """This decay takes nine tenths of the weights at each step. The parent's best checkpoint is not in the branch."""
    knobs = COMMON | {"run__branch_from": stable, "training__max_steps": 28, "schedule__name": "constant"}
    knobs["regularizers__weight_decay"] = 450
    assert train(tiny(**knobs)).returncode == 0
    best = json.loads((tmp_path / "runs/tiny/best.json").read_text())
    assert best["step"] == 28 and best["val/loss"] > json.loads((stable / "best.json").read_text())["val/loss"]
    assert (tmp_path / "runs/tiny/checkpoints" / best["checkpoint"]).is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__seed": 1}, "run.seed is 1, and was 0 there; use --run.seed=0"),
        ({"model__d_ff": 16}, "model.d_ff is 16, and was null there; use --model.d_ff=null"),
        ({"training__global_batch_size": 4}, "use --training.global_batch_size=8"),
        ({"data__train_tokens": 5000}, "use --data.train_tokens=null"),
        ({"data__shuffle": "documents"}, "use --data.shuffle=windows"),
        ({"data__val_fraction": 0.1}, "the corpus is "),
        ({"optimizer__name": "muon"}, "use --optimizer.name=adamw"),
        ({"training__max_steps": 12}, "it is at step 24, and this run has 12 steps"),
        ({"training__max_steps": 24}, "give training.max_steps above 24"),
        ({"run__name": "parent", "run__resume": "never"}, "this run's own directory"),
        ({"run__branch_from": "nowhere"}, "run.branch_from = nowhere: "),
        ({"run__init_from": "runs/parent"}, "exclude each other"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)).split("__")[1],
)
def test_what_cannot_be_gone_on_from_is_refused(
    changes: dict[str, Any], message: str, stable: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    parent = shutil.copytree(stable, tmp_path / "runs/parent")
    before = contents(parent)
    knobs = COMMON | {"training__max_steps": 30, "run__branch_from": parent, "run__name": "branch"}
    refused = train(tiny(**knobs | changes))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and message in refused.stderr
    assert contents(parent).keys() - before.keys() <= {parent / "lock"} and contents(parent).items() >= before.items()


def test_a_damaged_checkpoint_is_not_branched_from(stable: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    parent = shutil.copytree(stable, tmp_path / "runs/parent")
    damaged = parent / "checkpoints/step_00000024/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    knobs = COMMON | {"run__name": "branch", "training__max_steps": 30}
    refused = train(tiny(**knobs, run__branch_from=damaged.parent))
    assert refused.returncode == 2 and "cannot be trusted" in refused.stderr
    ended = train(tiny(**knobs, run__branch_from=parent))  # the newest that can be trusted
    assert ended.returncode == 0 and "step_00000012, after step 12" in ended.stdout


def test_what_is_computed_twice_changes_neither_a_branch_nor_a_bit_of_it(
    stable: Path, train: Train, tiny: Flags, tmp_path: Path
) -> None:
    for kind in ("none", "attention", "block"):
        knobs = COMMON | {"training__max_steps": 14, "run__branch_from": stable / "checkpoints/step_00000012"}
        assert train(tiny(**knobs, run__name=kind, model__checkpoint_activations=kind)).returncode == 0
    none, *others = (digests(tmp_path / "runs" / kind, 14) for kind in ("none", "attention", "block"))
    assert none and others == [none, none]


def test_the_name_made_of_the_config_tells_branches_apart() -> None:
    names = {default_name(parse([f"--run.branch_from={word}"])) for word in ("null", "runs/a", "runs/b")}
    assert len(names) == 3


# ---------------------------------------------------------------------------------------------- averaged weights


def test_an_average_goes_on_or_begins_with_the_branch(stable: Path, train: Train, tiny: Flags, tmp_path: Path) -> None:
    """One step after the branch: the parent's EMA moved on by the new decay, or an SWA of this one step's weights."""
    start = stable / "checkpoints/step_00000012"
    for name, changes in (("ema", {"regularizers__ema_decay": 0.5}), ("swa", SWA)):
        knobs = COMMON | {"training__max_steps": 13, "run__branch_from": start, "run__name": name} | changes
        assert train(tiny(**knobs)).returncode == 0
        checkpoint = tmp_path / f"runs/{name}/checkpoints/step_00000013"
        raw, average = read_tensors(checkpoint, "model"), read_tensors(checkpoint, "average")
        before = read_tensors(start, "average")
        for key, weight in raw.items():
            expected = 0.5 * before[key] + 0.5 * weight if name == "ema" else weight
            torch.testing.assert_close(average[key], expected, rtol=1e-6, atol=1e-8)
        assert read_state(checkpoint)["average_from"] == (0 if name == "ema" else 12)


@pytest.mark.parametrize(
    ("there", "here", "goes_on"),
    [
        ({"ema_decay": 0.9}, {"ema_decay": 0.99}, True),
        ({}, {"ema_decay": 0.9}, False),
        ({"ema_decay": 0.9}, {}, False),
        ({"ema_decay": 0.9}, {"swa_start": 0.5}, False),
        ({"swa_start": 0.5}, {"swa_start": 0.25}, True),  # of twice as many steps
        ({"swa_start": 0.5}, {"swa_start": 0.5}, False),
        ({"swa_start": 0.5}, {"swa_start": 0.25, "swa_every": 2}, False),
    ],
)
def test_which_average_goes_on(there: dict[str, Any], here: dict[str, Any], goes_on: bool) -> None:
    parent, branch = WeightAverage(Regularizers(**there), 100), WeightAverage(Regularizers(**here), 200)
    assert branch.goes_on(parent) is goes_on


def test_an_average_that_begins_with_the_branch_is_that_of_its_weights() -> None:
    model, average, seen = nn.Linear(2, 2), WeightAverage(Regularizers(swa_start=0.1), 20), []
    average.begins_after = 7
    for step in range(8, 12):
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(step))
        seen.append(model.weight.detach().clone())
        average.update(dict(model.named_parameters()), step)
        assert average.count(step) == len(seen)
    torch.testing.assert_close(average.weights["weight"], torch.stack(seen).mean(0))


# ---------------------------------------------------------------------------------------------- milestones


def test_milestones_are_kept_beside_the_newest(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """A step has 256 tokens: 1.5k tokens are reached after 6. The last step's, and the best, is the 24th."""
    ended = train(tiny(checkpoint__at="[3,1.5k,9999]", checkpoint__keep=1, optimizer__lr=1e-3))
    assert ended.returncode == 0 and "checkpoint.at: step 9,999 will not be reached" in ended.stderr
    kept = [int(path.name[5:]) for path in existing(tmp_path / "runs/tiny/checkpoints")]
    assert kept == [24, 6, 3]
    refused = train(tiny(checkpoint__at="[10m]"))
    assert refused.returncode == 2 and "'10m' is no number of steps (1000), tokens (10M) or epochs" in refused.stderr
