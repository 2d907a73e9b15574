"""Models that lie in parts on the processes (run.shard): the same run as on one, whatever happens to it (law 5)."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import changed, end, start
from oracle import same_as
from test_regularized_run import KNOBS, NUMBERS

from tracking.metrics import read_metrics
from training.checkpoint import existing, read_tensors

Flags = Callable[..., list[str]]

# A part of each tensor fills whole vector registers, so that its elements are computed as those of the whole tensor.
SHARED = KNOBS | {"training__micro_batch_size": 2, "tracking__log_every": 1, "model__d_model": 64}


def run(flags: list[str], directory: Path, world: int, per_machine: int | None = None, fault: str = "") -> Path:
    """A run on so many processes to its end; returns its directory."""
    codes, _, errors = end(start(flags, directory, world, fault, per_machine))
    assert codes == [0] * world, errors
    return directory / "runs" / next(flag.split("=")[1] for flag in reversed(flags) if flag.startswith("--run.name"))


def agree(one: Path, other: Path) -> None:
    """Each number of each step is the same to 1e-5."""
    ours, theirs = read_metrics(one), read_metrics(other)
    assert len(ours) == len(theirs) == 24
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in (*NUMBERS, "train/grad_norm"):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5), (a["step"], name)


@pytest.mark.fault(5)
def test_whole_or_in_two_parts_a_run_has_the_same_bytes(tiny: Flags, tmp_path: Path) -> None:
    """With every regularizer on; and to rounding it is the run of one process."""
    one = run(tiny(run__name="one", **SHARED), tmp_path, 1)
    whole = run(tiny(run__name="whole", **SHARED), tmp_path, 2)
    parts = run(tiny(run__name="parts", run__shard="all", **SHARED), tmp_path, 2)
    same_as(whole, parts)
    agree(one, whole)
    # Each process made and wrote its own half: what is stored is whole, and all of it was trained.
    first, last = (read_tensors(existing(parts / "checkpoints")[at], "model") for at in (-1, 0))
    assert all((first[name] != last[name]).any(-1).float().mean() > 0.5 for name in first)


def test_sums_during_the_backward_pass_are_those_after_it(tiny: Flags, tmp_path: Path) -> None:
    """As on GPUs: a bucket for each block, sent as soon as it is complete. Two processes add the same two numbers."""
    after = run(tiny(run__name="after", **SHARED), tmp_path, 2)
    program = changed(tmp_path, ("training.gradients", "OVERLAPPING = ('cpu',)"))
    codes, _, errors = end(start(tiny(run__name="during", **SHARED), tmp_path, 2, program=program))
    assert codes == [0, 0], errors
    same_as(after, tmp_path / "runs/during")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_on_four_processes(family: str, tiny: Flags, tmp_path: Path) -> None:
    """Whole on each, in two copies of two parts, and in four parts; widths that the parts do not divide evenly."""
    knobs = SHARED | {"model__family": family, "model__d_model": 36, "model__d_ff": 50}
    one = run(tiny(run__name="one", **knobs), tmp_path, 1)
    for shard in ("none", "node", "all"):
        agree(one, run(tiny(run__name=shard, run__shard=shard, **knobs), tmp_path, 4, per_machine=2))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "node", "all"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_killed_and_started_again(shard: str, name: str, tiny: Flags, tmp_path: Path) -> None:
    knobs = SHARED | {"run__shard": shard, "optimizer__name": name, "checkpoint__every": 4}
    alone = run(tiny(run__name="alone", **knobs), tmp_path, 4, per_machine=2)
    for step in (7, 14):
        codes, _, _ = end(start(tiny(**knobs), tmp_path, 4, f"weights:2:{step}:kill", per_machine=2))
        assert codes[2] == -signal.SIGKILL and 0 not in codes
    same_as(alone, run(tiny(**knobs), tmp_path, 4, per_machine=2))


@pytest.mark.slow
def test_muon_in_two_parts_has_the_bytes_of_two_whole_models(tiny: Flags, tmp_path: Path) -> None:
    """A matrix is orthogonalised on one process, the rest of the step is done on each part."""
    knobs = SHARED | {"optimizer__name": "muon"}
    whole = run(tiny(run__name="whole", **knobs), tmp_path, 2)
    same_as(whole, run(tiny(run__name="parts", run__shard="all", **knobs), tmp_path, 2))


@pytest.mark.slow
def test_compiled_in_parts(tiny: Flags, tmp_path: Path) -> None:
    """Each block for itself, and once for training and once for evaluation, however long the text that is written."""
    knobs = SHARED | {"run__compile": "on", "regularizers__stochastic_depth": 0.2}
    whole = run(tiny(run__name="whole", **knobs), tmp_path, 2)
    codes, _, errors = end(start(tiny(run__name="parts", run__shard="all", **knobs), tmp_path, 2))
    assert codes == [0, 0] and "recompil" not in errors, errors
    agree(whole, tmp_path / "runs/parts")


@pytest.mark.slow
def test_from_four_parts_to_two_whole_models(tiny: Flags, tmp_path: Path) -> None:
    knobs = SHARED | {"checkpoint__every": 4}
    one = run(tiny(run__name="one", **knobs), tmp_path, 1)
    codes, _, _ = end(start(tiny(run__shard="all", **knobs), tmp_path, 4, "weights:0:14:kill"))
    assert codes[0] == -signal.SIGKILL
    codes, output, errors = end(start(tiny(**knobs), tmp_path, 2))
    assert codes == [0, 0] and "goes on from step 12" in output, errors
    assert "parts was 4 when this run began and is 1: bits may differ" in errors
    agree(one, tmp_path / "runs/tiny")


@pytest.mark.slow
@pytest.mark.fault(2)
@pytest.mark.parametrize("shard", ["none", "all"])
def test_killed_at_every_point_of_a_save(shard: str, tiny: Flags, tmp_path: Path) -> None:
    """On the process that writes; what the other has gathered for it is gathered again."""
    knobs = {"training__micro_batch_size": 4, "checkpoint__every": 4, "checkpoint__keep": 1, "run__shard": shard}
    alone = run(tiny(run__name="alone", **knobs), tmp_path, 2)
    for point in ("save-begin:0:4", "save-file:0:8", "save-manifest:0:12", "save-renamed:0:16", "prune-renamed:0:20"):
        codes, _, _ = end(start(tiny(**knobs), tmp_path, 2, f"{point}:kill"))
        assert codes[0] == -signal.SIGKILL and codes[1] != 0, point
    same_as(alone, run(tiny(**knobs), tmp_path, 2))
    assert not list((tmp_path / "runs/tiny/checkpoints").glob(".*"))


@pytest.mark.slow
def test_parts_train_a_model_of_which_a_process_cannot_hold_all(tiny: Flags, tmp_path: Path) -> None:
    """Under a limit on each process's memory at which four whole models end, four parts of one train.

    100 million parameters: 1.6 GB of weights, gradients and moments.
    """
    size = {"model__d_model": 1024, "model__n_layers": 8, "model__n_heads": 8, "training__max_steps": 2}
    knobs = size | {"training__micro_batch_size": 2, "evaluation__every": 2, "evaluation__max_tokens": 64}
    limit = 1700 * 2**20

    def limited(shard: str) -> tuple[list[int], str]:
        processes = start(tiny(run__name=shard, run__shard=shard, **knobs), tmp_path, 4)
        for process in processes:
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (limit, limit))
        codes, _, errors = end(processes, timeout=300)
        return codes, errors

    codes, errors = limited("all")
    assert codes == [0] * 4, errors
    codes, errors = limited("none")
    assert 0 not in codes and "memory" in errors
