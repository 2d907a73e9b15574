"""Damaged and hostile files: rejected by name, the one before is used, nothing is overwritten, allocated or run."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from oracle import Flags, Train, contents, flip, replace_in_checkpoint, same_as

from training.checkpoint import existing, newest, problem_of, save, step_of


@pytest.fixture
def two_saved(tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints of the steps 1 and 2, with all files that there can be."""
    files = {"model": "blocks.0.weight", "optimizer": "blocks.0.weight/exp_avg", "average": "blocks.0.weight"}
    tensors = {name: {key: torch.rand(8, 8)} for name, key in files.items()}
    one, two = (save(tmp_path / "checkpoints", tensors.items(), {"step": step, "best": None}) for step in (1, 2))
    return one, two


FILES = ["model.safetensors", "optimizer.safetensors", "average.safetensors", "state.json", "manifest.json"]


def refusal(good: Path) -> str:
    """What is wrong with the newest checkpoint, where ``good`` is the one before it and is found instead."""
    found, problems = newest(good.parent)
    assert found == step_of(good) and len(problems) == 1
    return problems[0]


@pytest.mark.fault(15)
@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_place_is_named(name: str, two_saved: tuple[Path, Path]) -> None:
    good, bad = two_saved
    content = (bad / name).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little") if name.endswith("safetensors") else 20
    for length in (0, 1, 8, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        (bad / name).write_bytes(content[:length])
        assert f"{bad.name}/{name}" in refusal(good), length
    (bad / name).unlink()
    assert f"{bad.name}/{name}" in refusal(good)
    (bad / name).write_bytes(content)
    assert newest(good.parent) == (step_of(bad), [])


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", FILES[:4])
def test_a_flipped_bit_in_header_name_or_number_and_a_zeroed_tail_are_named(
    name: str, two_saved: tuple[Path, Path]
) -> None:
    good, bad = two_saved
    content = (bad / name).read_bytes()
    word = b"blocks" if name.endswith("safetensors") else b"best"
    for place in (0, 8, content.index(word) + 2, len(content) // 2, len(content) - 1):
        flip(bad / name, place)
        assert f"{bad.name}/{name} is damaged: its sha256" in refusal(good), place
        (bad / name).write_bytes(content)
    (bad / name).write_bytes(content[:-4] + bytes(4))
    assert f"{bad.name}/{name} is damaged: its sha256" in refusal(good)


@pytest.mark.fault(16)
def test_each_byte_of_the_manifest_counts(two_saved: tuple[Path, Path]) -> None:
    """A bit is flipped in all of them: numbers, names, keys, and the spaces between."""
    good, bad = two_saved
    content = (bad / "manifest.json").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (bad / "manifest.json").write_bytes(damaged)
        assert bad.name in (problem_of(bad) or ""), (place, chr(content[place]), chr(damaged[place]))
    (bad / "manifest.json").write_bytes(bytes(len(content)))
    assert "manifest.json cannot be read" in refusal(good)


@pytest.mark.fault(15, 16)
@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"step": 2, "files": []}',
        '{"step": 2, "files": {"a": 1}}',
        '{"step": 2, "files": {"model.safetensors": {"size": 1e999, "sha256": ""}}}',
        '{"step": "2", "files": {}}',
    ],
    ids=range(9),
)
def test_a_manifest_that_says_something_else_is_damage_too(manifest: str, two_saved: tuple[Path, Path]) -> None:
    good, bad = two_saved
    (bad / "manifest.json").write_text(manifest)
    assert f"{bad.name}/manifest.json" in refusal(good)


@pytest.mark.slow
@pytest.mark.fault(15, 16)
@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(
    name: str, whole_run: Path, interrupted: Path, train: Train, breakable: Flags
) -> None:
    damaged = interrupted / "checkpoints/step_00000016" / name
    if name == "state.json":
        os.truncate(damaged, damaged.stat().st_size - 1)
    else:
        flip(damaged)
    ended = train(breakable())
    assert ended.returncode == 0 and "goes on from step 12\n" in ended.stdout, ended.stderr
    assert "warning: " in ended.stderr and f"step_00000016/{name}" in ended.stderr
    assert (interrupted / "checkpoints/step_00000016.damaged").is_dir()  # for whoever wants to know what happened
    same_as(whole_run, interrupted)


@pytest.mark.fault(17)
def test_if_no_checkpoint_can_be_trusted_nothing_is_overwritten(
    interrupted: Path, train: Train, breakable: Flags
) -> None:
    for checkpoint in existing(interrupted / "checkpoints"):
        flip(checkpoint / "model.safetensors")
    before = contents(interrupted)
    refused = train(breakable())
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    for word in ("step_00000016/model", "step_00000012/model", "restore one of them", "--run.resume=never"):
        assert word in refused.stderr, word
    assert contents(interrupted) == before
    afresh = train(breakable(run__resume="never", training__max_steps=1))
    assert afresh.returncode == 0, afresh.stderr
    aside = contents(interrupted.with_name("tiny.previous-1"))
    assert aside == before and contents(interrupted) != before


# ---------------------------------------------------------------------------------------------- hostile files


def header(fields: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with these words in its header, and perhaps a false length."""
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HUGE = 2**62
HOSTILE = {
    "header of 2^62 bytes": header({"a": tensor([1], 0, 4)}, bytes(4), length=HUGE),
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header longer than the file": header({"a": tensor([1], 0, 4)}, bytes(4), length=90_000_000),
    "overlapping tensors": header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "one tensor twice": header({"a": tensor([2], 0, 8), "b": tensor([2], 0, 8)}, bytes(8)),
    "a hole": header({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "past the end": header({"a": tensor([HUGE // 4], 0, HUGE)}, bytes(4)),
    "backwards": header({"a": tensor([1], 4, 0)}, bytes(4)),
    "shape larger than its bytes": header({"a": tensor([2**40], 0, 4)}, bytes(4)),
    "shape that overflows": header({"a": tensor([2**32, 2**32], 0, 0)}),
    "shape that overflows to its size": header({"a": tensor([2**62 + 1], 0, 4)}, bytes(4)),
    "negative shape": header({"a": tensor([-1], 0, 4)}, bytes(4)),
    "unknown type": header({"a": tensor([1], 0, 4, "PICKLE")}, bytes(4)),
    "no JSON": header("x")[:8] + b"\xff" * 3,
    "deep JSON": struct.pack("<Q", 50_000) + b"[" * 50_000,
    "bytes behind the last tensor": header({"a": tensor([1], 0, 4)}, bytes(100)),
    "a pickle": b"\x80\x04\x95" + bytes(40),
    "nothing": b"",
}

# Reads each file named on its command line as a checkpoint's model and as a Hugging Face model's weights, with no more
# than 300 MB of memory beyond what the libraries take.
READER = """
import resource, sys
from pathlib import Path
from config import BadInput
from model.huggingface import read_directory
from training.checkpoint import problem_of, read_tensors

in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 300_000_000,) * 2)
for path in map(Path, sys.argv[1:]):
    assert problem_of(path) is None, "the manifest agrees: the reader must refuse"
    for read in (lambda: read_tensors(path, "model"), lambda: read_directory(path)):
        try:
            read()
        except BadInput as refused:
            assert "model.safetensors cannot be read as safetensors" in str(refused), refused
            print(path.name)
"""


@pytest.mark.fault(19)
def test_hostile_files_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    tensors = {"model": {"embedding.weight": torch.zeros(4, 4)}}
    fields = {"model_type": "gpt2", "n_layer": 1, "n_embd": 4, "n_head": 1, "n_positions": 8, "vocab_size": 4}
    checkpoints = []
    for number, content in enumerate(HOSTILE.values()):
        checkpoint = save(tmp_path, tensors.items(), {"step": number})
        replace_in_checkpoint(checkpoint, "model.safetensors", content)
        (checkpoint / "config.json").write_text(json.dumps(fields))
        checkpoints.append(checkpoint)
    command = [sys.executable, "-c", READER, *map(str, checkpoints)]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    refused = asked.stdout.split()
    for kind, checkpoint in zip(HOSTILE, checkpoints, strict=True):
        assert refused.count(checkpoint.name) == 2, kind


@pytest.mark.fault(19)
@pytest.mark.parametrize("kind", ["header of 2^62 bytes", "tensors of another network"])
def test_a_run_refuses_a_hostile_checkpoint(kind: str, interrupted: Path, train: Train, breakable: Flags) -> None:
    """Its manifest agrees with it, so only reading it can tell; what is there stays as it is."""
    content = HOSTILE.get(kind) or header({"embedding.weight": tensor([1], 0, 4)}, bytes(4))
    checkpoint = existing(interrupted / "checkpoints")[0]
    replace_in_checkpoint(checkpoint, "model.safetensors", content)
    before = contents(interrupted)
    refused = train(breakable())
    assert refused.returncode == 2 and "Traceback" not in refused.stderr, refused.stderr
    assert f"{checkpoint.name}/model.safetensors" in refused.stderr
    assert contents(interrupted) == before


@pytest.mark.fault(19)
def test_a_run_does_not_begin_from_a_hostile_model(train: Train, breakable: Flags, tmp_path: Path) -> None:
    fields = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    fields |= {"intermediate_size": 128, "vocab_size": 257, "max_position_embeddings": 32}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text(json.dumps(fields))
    (tmp_path / "hub/model.safetensors").write_bytes(HOSTILE["overlapping tensors"])
    refused = train(breakable(run__init_from=tmp_path / "hub"))
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "hub/model.safetensors cannot be read as safetensors" in refused.stderr
    assert not (tmp_path / "runs/tiny/config.yaml").exists()


@pytest.mark.fault(19)
def test_a_run_reads_nothing_outside_its_directory(interrupted: Path, train: Train, breakable: Flags) -> None:
    """A manifest with ../ and a symbolic link: both checkpoints are refused, though the bytes are right."""
    for checkpoint, what in zip(existing(interrupted / "checkpoints"), ("path", "link"), strict=True):
        shutil.copyfile(checkpoint / "model.safetensors", interrupted / f"{what}.safetensors")
        if what == "link":
            (checkpoint / "model.safetensors").unlink()
            (checkpoint / "model.safetensors").symlink_to(interrupted / "link.safetensors")
        else:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            manifest["files"]["../../path.safetensors"] = manifest["files"]["model.safetensors"]
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    refused = train(breakable())
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "names '../../path.safetensors', which is not a plain file" in refused.stderr
    assert "model.safetensors is a link" in refused.stderr
