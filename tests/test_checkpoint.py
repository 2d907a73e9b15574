"""A checkpoint is whole or refused by name, the newest whole one is found by step, nothing good is deleted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
import torch

from config import BadInput
from files import write_json
from training.checkpoint import (
    begin,
    existing,
    file_of_rows,
    newest,
    problem_of,
    prune,
    read_state,
    read_tensors,
    save,
    sweep,
    write_rows,
)


def write(checkpoints: Path, step: int) -> Path:
    tensors = {"model": {"a": torch.full((4, 4), float(step))}, "optimizer": {"a/exp_avg": torch.zeros(4, 4)}}
    return save(checkpoints, tensors.items(), {"step": step, "best": None})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert path.name == "step_00000005" and problem_of(path) is None
    assert torch.equal(read_tensors(path, "model")["a"], torch.full((4, 4), 5.0))
    assert read_state(path) == {"step": 5, "best": None}
    assert not list(tmp_path.glob(".*"))


def rows(part: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """What each of three processes holds of ten rows and a scalar: 4, 4 and 2 rows."""
    whole = torch.arange(20.0).view(10, 2)
    yield file_of_rows("model", part, 3), {"a": whole[4 * part : 4 * part + 4], "step": torch.tensor(7.0)}


def test_each_process_writes_its_rows(tmp_path: Path) -> None:
    """The main process waits for the others, and what they wrote is read as whole tensors."""
    assert begin(tmp_path, 5)
    later = [Timer(0.2 * part, write_rows, (tmp_path, rows(part), 5)) for part in (2, 1)]
    for timer in later:
        timer.start()
    path = save(tmp_path, rows(0), {"step": 5}, begun=True, patience=10)
    assert problem_of(path) is None and not begin(tmp_path, 5)
    read = read_tensors(path, "model")
    assert torch.equal(read["a"], torch.arange(20.0).view(10, 2)) and read["step"] == 7
    (path / "model.rows-1-of-3.safetensors").unlink()
    assert "model.rows-1-of-3.safetensors" in (problem_of(path) or "")


@pytest.mark.fault(20)
def test_a_process_that_does_not_write_its_rows_is_named(tmp_path: Path) -> None:
    begin(tmp_path, 5)
    write_rows(tmp_path, rows(1), 5)
    with pytest.raises(OSError, match=r"rank 2 has not written model\.rows-2-of-3\.safetensors within 0\.1 s"):
        save(tmp_path, rows(0), {"step": 5}, begun=True, patience=0.1)
    assert not list(tmp_path.iterdir())


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]


@pytest.mark.fault(15)
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", ["0", "8", "half", "-1"])
def test_a_truncated_file_is_named_and_the_one_before_is_used(tmp_path: Path, name: str, length: str) -> None:
    _, bad = write(tmp_path, 1), write(tmp_path, 2)
    size = (bad / name).stat().st_size
    os.truncate(bad / name, {"0": 0, "8": 8, "half": size // 2, "-1": size - 1}[length])
    found, problems = newest(tmp_path)
    assert found == 1 and len(problems) == 1 and name in problems[0]


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    _, bad = write(tmp_path, 1), write(tmp_path, 2)
    content = bytearray((bad / name).read_bytes())
    digit = content.index(b'"sha256": "') + 15 if name == "manifest.json" else len(content) // 2
    content[digit] ^= 1
    (bad / name).write_bytes(content)
    found, problems = newest(tmp_path)
    assert found == 1 and len(problems) == 1


@pytest.mark.fault(16)
def test_a_zeroed_tail_is_found(tmp_path: Path) -> None:
    bad = write(tmp_path, 2)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:-16] + bytes(16))
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged"):
        newest(tmp_path)


@pytest.mark.fault(17)
def test_none_exist_is_not_none_load(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") == (None, [])
    (write(tmp_path, 3) / "state.json").unlink()
    with pytest.raises(BadInput, match="resume=never"):
        newest(tmp_path)


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["../outside", "/etc/passwd"])
def test_a_manifest_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert "not a plain file" in (problem_of(path) or "")


@pytest.mark.fault(19)
def test_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "model.safetensors").rename(tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in (problem_of(path) or "")


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1).rename(tmp_path / "step_00000009")
    assert "is of step 1" in (problem_of(tmp_path / "step_00000009") or "")


@pytest.mark.fault(25)
def test_newest_is_by_step_whatever_the_clock_says(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        write(tmp_path, step)
    os.utime(tmp_path / "step_00000009", (time.time() + 4e7,) * 2)
    assert [path.name[-3:] for path in existing(tmp_path)] == ["100", "020", "009"]


@pytest.mark.fault(23)
def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    prune(tmp_path, keep=2, protected={2})
    assert [int(path.name[5:]) for path in existing(tmp_path)] == [6, 5, 2]


@pytest.mark.fault(2)
def test_debris_is_swept(tmp_path: Path) -> None:
    kept = write(tmp_path, 1)
    for name in (".saving_step_00000002", ".deleting_step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.fault(20)
def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: the old checkpoint loads, the temporary is gone."""
    import subprocess
    import sys

    write(tmp_path, 1)
    code = f"""
import resource, signal, torch
from pathlib import Path
from training.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(Path({str(tmp_path)!r}), {{"model": {{"a": torch.zeros(100_000)}}}}.items(), {{"step": 2}})
except OSError as problem:
    print("refused", problem)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused" in asked.stdout, asked.stderr
    assert newest(tmp_path)[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_saving_a_step_again_replaces_only_a_damaged_one(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert write(tmp_path, 1) == path and (path / "model.safetensors").stat().st_mtime_ns == stamp
    os.truncate(path / "model.safetensors", 10)
    assert problem_of(write(tmp_path, 1)) is None


def test_small_files_are_replaced_in_one_step(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
