"""Runs that die at any moment end as if they had not: killed, resumed, killed again, on more or fewer processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from launch import end, start
from oracle import TORCHRUN, Flags, Train, launched, same_as

from command_line import parse
from config import BadInput
from hardware import missing_for_compile
from tracking.metrics import read_metrics
from tracking.run_directory import read_config, read_summary, update_summary
from training.checkpoint import newest
from training.processes import check_micro_batches


@pytest.mark.slow
@pytest.mark.fault(1, 4)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_again_and_again(
    seed: int, whole_run: Path, train: Train, breakable: Flags, tmp_path: Path
) -> None:
    """kill -9 a random while after a random step, three times, so that three resumes follow each other."""
    run, draw = tmp_path / "runs/tiny", random.Random(seed)
    step = 0
    for _ in range(3):
        step = draw.randint(step + 1, step + 8)
        with launched(breakable(), tmp_path) as process:
            deadline = time.monotonic() + 60
            while not any(record["step"] >= step for record in read_metrics(run)) and time.monotonic() < deadline:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
        assert process.returncode in (-signal.SIGKILL, 0)  # leaving the block kills
    ended = train(breakable())
    assert ended.returncode == 0, ended.stderr
    same_as(whole_run, run)


@pytest.mark.slow
@pytest.mark.fault(1)
def test_a_compiled_run_goes_on_the_same(train: Train, breakable: Flags, tmp_path: Path) -> None:
    """Compiled anew, then from the cache: masks repeat, and so does the order in which threads add up gradients."""
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    size = {"model__d_model": 64, "model__context_length": 32, "training__micro_batch_size": 8, "run__threads": 2}
    flags = breakable(run__compile="on", regularizers__stochastic_depth=0.2, **size)
    assert train([*flags, "--run.name=alone"], timeout=200, **cache).returncode == 0  # compiles two graphs anew
    assert train(flags, WELLPOSED_FAULT="gradient:0:14:kill", **cache).returncode == -signal.SIGKILL
    ended = train(flags, **cache)
    assert ended.returncode == 0 and "goes on from step 12\n" in ended.stdout, ended.stderr
    same_as(tmp_path / "runs/alone", tmp_path / "runs/tiny")


# Where the run dies, what it finds when it is started again, and what the dead left lying there.
DEATHS = [
    ("save-begin:0:4", None, ".saving_step_00000004"),  # the resume is from step 0
    ("save-file:0:8", 4, ".saving_step_00000008"),
    ("save-state:0:8", 4, ".saving_step_00000008"),
    ("save-manifest:0:12", 8, ".saving_step_00000012"),
    ("prune-begin:0:12", 12, None),
    ("save-renamed:0:16", 16, None),  # two epochs are over, the third has not begun
    ("prune-renamed:0:16", 20, ".deleting_step_00000016"),
    ("save-renamed:0:24", 24, None),  # no step is left to do
]


@pytest.mark.slow
@pytest.mark.fault(2, 3, 4, 23)
def test_killed_at_every_point_of_save_and_prune(
    whole_run: Path, train: Train, breakable: Flags, tmp_path: Path
) -> None:
    """One run that dies at each of them in turn. It keeps a single checkpoint, and always has one that verifies."""
    flags, run, before = breakable(checkpoint__keep=1), tmp_path / "runs/tiny", None
    for point, found, debris in DEATHS:
        died = train(flags, WELLPOSED_FAULT=f"{point}:kill")
        assert died.returncode == -signal.SIGKILL, (point, died.stderr)
        assert ("goes on from step" in died.stdout) == (before is not None), point
        assert before is None or f"goes on from step {before}\n" in died.stdout, point
        there, damaged = newest(run / "checkpoints")
        assert damaged == [] and there == found, point
        # Nothing is left of earlier deaths: the start swept it.
        assert [path.name for path in (run / "checkpoints").glob(".*")] == ([debris] if debris else []), point
        before = found
    ended = train(flags)
    assert ended.returncode == 0 and "goes on from step 24\n" in ended.stdout, ended.stderr
    same_as(whole_run, run)
    assert not list((run / "checkpoints").glob(".*"))
    again = train(flags)
    assert again.returncode == 0 and "This run is finished already (24 of 24 steps)" in again.stdout


@pytest.mark.slow
@pytest.mark.fault(5)
def test_from_one_process_to_two_and_back(whole_run: Path, train: Train, breakable: Flags, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    assert train(breakable(), WELLPOSED_FAULT="save-renamed:0:8:kill").returncode == -signal.SIGKILL
    two = [*TORCHRUN, "--nproc_per_node=2", str(ROOT / "train.py"), *breakable()]
    environment = os.environ | {"WELLPOSED_FAULT": "save-renamed:0:16:kill"}
    died = subprocess.run(two, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert died.returncode != 0 and "goes on from step 8\n" in died.stdout, died.stderr
    assert "processes was 1 when this run began and is 2: bits may differ" in died.stderr
    ended = train(breakable())
    assert ended.returncode == 0 and "goes on from step 16\n" in ended.stdout, ended.stderr
    same_as(whole_run, run, rounding=1e-5)
    assert read_summary(run)["status"] == "finished"


@pytest.mark.fault(6)
def test_micro_batches_that_cannot_be_shared_are_refused_with_numbers_that_can() -> None:
    config = parse(["--training.global_batch_size=12", "--training.micro_batch_size=4"])
    for world in (1, 3):
        check_micro_batches(config, world)
    with pytest.raises(BadInput, match=r"3 micro-batches .* 2 processes") as refused:
        check_micro_batches(config, 2)
    # Micro-batches of 1, 2, 3 or 6 sequences make 12, 6, 4 or 2 of them; 1 and 3 divide the three there are.
    assert "micro_batch_size one of [1, 2, 3, 6]" in str(refused.value)
    assert "processes out of [1, 3]" in str(refused.value)
    with pytest.raises(BadInput, match="a global_batch_size divisible by 5"):
        check_micro_batches(config, 5)
    mixed = parse(["--training.global_batch_size=4", "--regularizers.mixup_alpha=0.2"])
    check_micro_batches(mixed, 2)
    with pytest.raises(BadInput, match="mixes pairs, and 4 sequences on 4 processes leave some with one"):
        check_micro_batches(mixed, 4)


@pytest.mark.slow
@pytest.mark.fault(6)
def test_the_default_micro_batch_is_the_share_of_a_process_and_stays(tiny: Flags, train: Train, tmp_path: Path) -> None:
    """Of eight sequences on two processes four, and also when one goes on; a run that began with eight is not split."""
    flags = tiny(training__max_steps=3, checkpoint__every=1)
    codes, _, errors = end(start(flags, tmp_path, 2, fault="weights:0:3:raise"))
    assert codes[0] != 0 and read_config(tmp_path / "runs/tiny").training.micro_batch_size == 4, errors
    ended = train(flags)
    assert ended.returncode == 0 and "goes on from step 2\n" in ended.stdout, ended.stderr
    assert train([*flags, "--run.name=four", "--training.micro_batch_size=4"]).returncode == 0
    same_as(tmp_path / "runs/four", tmp_path / "runs/tiny", rounding=1e-5)

    assert train([*flags, "--run.name=alone", "--training.max_steps=1"]).returncode == 0
    update_summary(tmp_path / "runs/alone", status="preempted")
    codes, _, errors = end(start([*flags, "--run.name=alone", "--training.max_steps=1"], tmp_path, 2))
    assert codes == [2, 2] and "1 micro-batches of 8 sequences cannot be shared by 2 processes" in errors


@pytest.mark.slow
@pytest.mark.fault(6)
def test_a_number_of_processes_that_does_not_fit_is_refused_before_anything_happens(
    breakable: Flags, tmp_path: Path
) -> None:
    three = [*TORCHRUN, "--nproc_per_node=3", str(ROOT / "train.py"), *breakable()]
    refused = subprocess.run(three, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0
    assert refused.stderr.count("error: 2 micro-batches of 4 sequences cannot be shared by 3 processes") == 1
    assert "divisible by 3" in refused.stderr and "processes out of [1, 2]" in refused.stderr
    assert 'train.py", line' not in refused.stderr  # our own lines: torchrun adds its traceback
    assert not (tmp_path / "runs").exists() and not (tmp_path / "corpora").exists()
