"""A disk that is full or may not be written to (cases 20 and 21)."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from launch import end, start
from oracle import same_as

from tracking.metrics import read_metrics
from tracking.run_directory import read_summary
from training.checkpoint import existing, newest

Flags = Callable[..., list[str]]


def full(flags: list[str], directory: Path, bytes_a_file: int) -> subprocess.CompletedProcess[str]:
    """train.py on a disk that takes no file larger than this."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))

    command = [sys.executable, str(ROOT / "train.py"), *flags]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=90, preexec_fn=limit)


@pytest.mark.slow
@pytest.mark.fault(20)
def test_checkpoints_that_do_not_fit(tiny: Flags, tmp_path: Path) -> None:
    """Told, tried again, given up after so many; the old checkpoint loads, nothing half is left; then the same end."""
    assert end(start(tiny(run__name="alone"), tmp_path))[0] == [0]
    flags = tiny(checkpoint__every=2, training__max_failed_saves=3)
    assert end(start(flags, tmp_path, fault="weights:0:5:kill"))[0] == [-9]
    ended = full(flags, tmp_path, 150_000)
    assert ended.returncode == 4 and "Traceback" not in ended.stderr
    assert "training goes on (1 failed in a row)" in ended.stderr and "(2 failed in a row)" in ended.stderr
    assert "error: step 10: cannot save the checkpoint" in ended.stderr and "File too large" in ended.stderr
    run = tmp_path / "runs/tiny"
    assert read_summary(run)["status"] == "failed"
    assert newest(run / "checkpoints")[0] == 4
    assert not [path for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert end(start(flags, tmp_path))[0] == [0]
    same_as(tmp_path / "runs/alone", run)


@pytest.mark.slow
@pytest.mark.fault(20)
@pytest.mark.parametrize("shard", ["none", "all"])
def test_the_processes_agree_on_a_full_disk(shard: str, tiny: Flags, tmp_path: Path) -> None:
    flags = tiny(training__micro_batch_size=4, checkpoint__every=2, training__max_failed_saves=1, run__shard=shard)
    processes = start(flags, tmp_path, 2)
    resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (150_000, 150_000))
    codes, _, errors = end(processes)
    assert codes == [4, 4] and "error: step 2: cannot save the checkpoint" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.fault(20)
def test_a_disk_that_fills_up(tiny: Flags, tmp_path: Path) -> None:
    """A real one, of one megabyte: metrics and pictures find no room either."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    try:
        assert end(start(tiny(run__name="alone"), tmp_path))[0] == [0]
        flags = tiny(run__dir=small, checkpoint__every=2, checkpoint__keep=9, training__max_failed_saves=2)
        codes, _, errors = end(start(flags, tmp_path))
        assert codes == [4] and "No space left on device" in errors and "Traceback" not in errors, errors
        run = small / "tiny"
        kept, _ = newest(run / "checkpoints")
        assert kept is not None and not list((run / "checkpoints").glob(".*"))
        shutil.rmtree(existing(run / "checkpoints")[-1])  # room again
        shutil.copytree(run, tmp_path / "runs/tiny")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert end(start(tiny(checkpoint__every=2), tmp_path))[0] == [0]
    same_as(tmp_path / "runs/alone", tmp_path / "runs/tiny")


@pytest.mark.fault(21)
@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_a_directory_that_is_read_only_is_refused_before_the_first_step(
    place: str, tiny: Flags, tmp_path: Path
) -> None:
    run = tmp_path / "runs/tiny"
    (run / "checkpoints").mkdir(parents=True)
    (run / place).chmod(0o555)
    command = [sys.executable, str(ROOT / "train.py"), *tiny()]
    if os.geteuid() == 0:  # root may write anywhere, unless that power is taken away
        if shutil.which("setpriv") is None:
            pytest.skip("root may write anywhere, and there is no setpriv to take that power away")
        command = ["setpriv", "--bounding-set=-dac_override", *command]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    (run / place).chmod(0o755)
    assert ended.returncode == 2 and f"cannot write to the run directory {run}" in ended.stderr, ended.stderr
    assert "Permission denied" in ended.stderr and "Traceback" not in ended.stderr and not read_metrics(run)
