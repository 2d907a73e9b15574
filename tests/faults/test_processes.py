"""Several processes: one answer, and none that hangs or outlives the others (cases 7 to 11, law 5)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import end, free_port, start, torchrun, wait_until, workers_of
from oracle import same_as
from test_regularized_run import KNOBS

from tracking.metrics import read_metrics
from tracking.run_directory import read_summary

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]

SHARED = {"training__micro_batch_size": 2, "tracking__log_every": 1}  # four micro-batches a step


def losses(run: Path) -> list[list[float]]:
    names = ("train/loss", "train/objective", "val/loss", "val_average/loss", "gap/loss", "val/ece")
    return [[record[name] for name in names if name in record] for record in read_metrics(run)]


@pytest.mark.slow
def test_processes_and_micro_batches_change_nothing(train: Train, tiny: Flags, tmp_path: Path) -> None:
    """1 process × 4 micro-batches, 2 × 2 and 4 × 1, every regularizer on, 50 steps: same samples, same losses."""
    knobs = SHARED | KNOBS | {"training__max_steps": 50}
    for world in (1, 2, 4):
        process = torchrun(tiny(run__name=f"on{world}", **knobs), tmp_path, "--standalone", f"--nproc_per_node={world}")
        assert process.wait(timeout=120) == 0, process.communicate()[1]
    one, *others = (tmp_path / "runs" / f"on{world}" for world in (1, 2, 4))
    for other in others:
        assert read_summary(one)["samples"] == read_summary(other)["samples"]
        for ours, theirs in zip(losses(one), losses(other), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"run__precision": "bf16"}, {"optimizer__name": "muon"}], ids=["bf16", "muon"])
def test_in_bf16_and_with_muon_they_agree_to_a_hundredth(change: dict[str, str], tiny: Flags, tmp_path: Path) -> None:
    knobs = SHARED | KNOBS | {"training__max_steps": 50} | change
    for world in (1, 2):
        codes, _, errors = end(start(tiny(run__name=f"on{world}", **knobs), tmp_path, world))
        assert not any(codes), errors
    for ours, theirs in zip(losses(tmp_path / "runs/on1"), losses(tmp_path / "runs/on2"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-2)


@pytest.mark.slow
def test_strict_gives_the_same_bits_on_any_number_of_processes(tiny: Flags, tmp_path: Path) -> None:
    """And on a number that changes at every start."""
    knobs = SHARED | KNOBS | {"training__deterministic": "strict"}
    for world in (1, 2, 4):
        codes, _, errors = end(start(tiny(run__name=f"on{world}", **knobs), tmp_path, world))
        assert not any(codes), errors
    for world in (2, 4):
        same_as(tmp_path / "runs/on1", tmp_path / f"runs/on{world}")
    flags = tiny(run__name="mixed", checkpoint__every=1, **knobs)
    for world in (2, 1):
        processes = start(flags, tmp_path, world)
        wait_until(lambda reached=16 // world: len(read_metrics(tmp_path / "runs/mixed")) >= reached, processes[0])
        processes[0].send_signal(signal.SIGTERM)
        assert end(processes)[0] == [3] * world
    assert end(start(flags, tmp_path, 4))[0] == [0] * 4
    same_as(tmp_path / "runs/on1", tmp_path / "runs/mixed")


@pytest.mark.slow
def test_two_nodes(tiny: Flags, tmp_path: Path) -> None:
    """Two torchruns that meet at one address, as on two machines, are one run of four processes."""
    meeting = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    meeting += ["--rdzv_id=one", "--local_addr=127.0.0.1"]
    nodes = [torchrun(tiny(run__name="nodes", **SHARED), tmp_path, *meeting) for _ in range(2)]
    for node in nodes:
        assert node.wait(timeout=120) == 0, node.communicate()[1]
    assert read_summary(tmp_path / "runs/nodes")["hardware"]["processes"] == 4
    assert end(start(tiny(run__name="alone", **SHARED), tmp_path))[0] == [0]
    for ours, theirs in zip(losses(tmp_path / "runs/nodes"), losses(tmp_path / "runs/alone"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.fault(7)
@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_killed_rank_is_started_again_by_torchrun(shard: str, tiny: Flags, tmp_path: Path) -> None:
    """kill -9 of rank 1 under --max-restarts: it resumes by itself, ends the same, in the same W&B run."""
    knobs = SHARED | {"checkpoint__every": 3, "training__max_steps": 60, "evaluation__every": 20, "run__shard": shard}
    launcher = ["--standalone", "--nproc_per_node=2"]
    alone = torchrun(tiny(run__name="alone", **knobs), tmp_path, *launcher)
    assert alone.wait(timeout=120) == 0, alone.communicate()[1]
    run = tmp_path / "runs/tiny"
    process = torchrun(tiny(**knobs), tmp_path, *launcher, "--max-restarts=1", WANDB_MODE="offline")
    wait_until(lambda: len(read_metrics(run)) >= 4, process)
    identity = (run / "wandb_id").read_text()
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "goes on from step" in output
    same_as(tmp_path / "runs/alone", run)
    assert (run / "wandb_id").read_text() == identity
    assert {path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")} == {identity}


@pytest.mark.slow
@pytest.mark.fault(8)
def test_a_step_that_always_crashes_ends_the_attempts(tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(training__max_attempts=2, checkpoint__every=4)
    for _ in range(3):  # from step 0, and twice from the checkpoint of step 4
        assert end(start(flags, tmp_path, fault="weights:0:6:raise"))[0] == [4]
    codes, _, errors = end(start(flags, tmp_path))
    assert codes == [4] and "Traceback" not in errors
    assert "started 2 times from step 4" in errors and "a fault was asked for" in errors
    assert "--training.max_attempts=7" in errors
    summary = read_summary(tmp_path / "runs/tiny")
    assert summary["status"] == "failed" and "a fault was asked for" in summary["error"]
    # The way out works, and what made progress since is not counted.
    assert end(start([*flags, "--training.max_attempts=7"], tmp_path))[0] == [0]


@pytest.mark.slow
@pytest.mark.fault(9)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_rank_that_hangs_is_named(shard: str, rank: int, tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(training__hang_timeout=6, run__shard=shard, **SHARED)
    processes = start(flags, tmp_path, 2, fault=f"weights:{rank}:5:stop")
    other = processes[1 - rank]
    assert other.wait(timeout=60) == 4
    processes[rank].kill()
    codes, _, errors = end(processes)
    assert codes[rank] == -signal.SIGKILL
    # Without torchrun the store lives in rank 0, and cannot be asked who is missing.
    gone = "rank 0, or torchrun, is gone or hangs" if rank == 0 else "rank 1 hangs: nothing came from it for 6 s"
    assert gone in errors, errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.fault(9)
@pytest.mark.parametrize("shard", ["none", "all"])
def test_a_rank_whose_thread_hangs_is_named(shard: str, tiny: Flags, tmp_path: Path) -> None:
    """Its process lives and answers, but a step does not come."""
    flags = tiny(training__hang_timeout=6, run__shard=shard, **SHARED)
    processes = start(flags, tmp_path, 2, fault="gradient:1:5:sleep")
    assert processes[0].wait(timeout=60) == 4
    processes[1].kill()
    _, _, errors = end(processes)
    assert "rank 1 hangs: nothing came from it for 6 s" in errors, errors
    summary = read_summary(tmp_path / "runs/tiny")
    assert summary["status"] == "failed" and summary["error"].startswith("rank 1 hangs")


@pytest.mark.slow
@pytest.mark.fault(10)
def test_no_worker_outlives_torchrun(tiny: Flags, tmp_path: Path) -> None:
    process = torchrun(tiny(training__max_steps=100_000, **SHARED), tmp_path, "--standalone", "--nproc_per_node=2")
    wait_until(lambda: read_metrics(tmp_path / "runs/tiny"), process)
    workers = workers_of(process.pid)
    assert sorted(workers) == [0, 1]
    process.kill()
    process.wait()
    time.sleep(1)
    alive = [pid for pid in workers.values() if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert not alive


def state(pid: int) -> str:
    """R, S, Z (dead, not yet collected), ..."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.slow
@pytest.mark.fault(11)
@pytest.mark.parametrize("fault", ["evaluate:1:8:raise", "evaluate:0:8:raise", "save-begin:0:8:raise"])
@pytest.mark.parametrize("shard", ["none", "all"])
def test_an_exception_on_one_rank_ends_all(shard: str, fault: str, tiny: Flags, tmp_path: Path) -> None:
    processes = start(tiny(run__shard=shard, **SHARED), tmp_path, 2, fault=fault)
    codes, _, errors = end(processes, timeout=60)
    assert codes == [4, 4]
    assert "RuntimeError: a fault was asked for" in errors  # its traceback, for whoever mends it
    rank = int(fault.split(":")[1])
    summary = read_summary(tmp_path / "runs/tiny")
    assert summary["status"] == "failed" and "a fault was asked for" in summary["error"]
    if rank == 1:
        assert "error: rank 1 failed with RuntimeError" in errors
    else:
        told = (
            "rank 0 failed with RuntimeError",
            "rank 0, or torchrun, is gone or hangs",
        )
        assert any(f"rank 1: {words}" in errors for words in told), errors


SRUN = """#!/bin/bash
[ "$1" = --cpus-per-task=1 ] || exit 99
shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    pids[rank]=$!
done
echo ${pids[0]} > srun.pid
worst=0
for pid in ${pids[@]}; do
    wait $pid
    code=$?
    ((code > worst)) && worst=$code
done
exit $worst
"""


@pytest.mark.slow
def test_the_script_for_slurm_asks_to_be_queued_again(tiny: Flags, tmp_path: Path) -> None:
    """The batch script itself, under stand-ins for srun and scontrol: preempted, it is queued again and goes on."""
    from conftest import ROOT

    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    (stand_ins / "srun").write_text(SRUN)
    (stand_ins / "scontrol").write_text(
        '#!/bin/bash\nif [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" > asked; fi\n'
    )
    for name in ("srun", "scontrol"):
        (stand_ins / name).chmod(0o755)
    flags = tiny(training__max_steps=400, checkpoint__every=400, evaluation__every=200, **SHARED)
    environment = os.environ | {
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "here",
        "MASTER_PORT": str(free_port()),
        "WELLPOSED": str(ROOT),
    }
    command = ["bash", str(ROOT / "scripts/slurm/train.sbatch"), *flags]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: read_metrics(tmp_path / "runs/tiny"), process)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)  # slurm warns one task, all stop together
    _, errors = process.communicate(timeout=60)
    assert (tmp_path / "asked").read_text().split() == ["requeue", "7"], errors
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["status"] == "preempted"
    (tmp_path / "asked").unlink()
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "goes on from step" in ended.stdout, ended.stderr
    assert not (tmp_path / "asked").exists()
