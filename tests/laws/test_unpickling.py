"""Nothing is ever unpickled. (Imports are watched by import-linter and ruff, see pyproject.toml.)"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "build"} & set(path.relative_to(ROOT).parts) and ".egg" not in str(path)
)


@pytest.mark.fault(18)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_unpickles_is_written(path: Path) -> None:
    forbidden = r"torch\.(load|save)\(|import pickle|pickle\.|allow_pickle|yaml\.(unsafe_)?load\(|object_list"
    forbidden += r"|trust_remote_code=(?!False)"
    assert not re.search(forbidden, path.read_text())


@pytest.mark.fault(18)
def test_nothing_is_unpickled_while_training(tmp_path: Path, text_file: Path) -> None:
    """Pickles lie wherever a run reads: in its own directory, its checkpoints, its corpus, and beside its tokenizer.

    It is started, goes on from a checkpoint, writes text and is evaluated; an audit hook sees whether anyone opens one.
    """
    from conftest import TINY

    from data.tokenizers import byte_tokenizer

    trap = tmp_path / "trap.py"
    trap.write_text(f"""
import os, pickle, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import numpy
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)

class Evil:
    def __reduce__(self):
        return (os.system, ("touch {tmp_path}/ran",))

def lay_traps(*directories):
    for directory in map(Path, directories):
        for name in ("model.pt", "pytorch_model.bin", "optimizer.pkl", "state.pkl", "train-00000.bin", "tokenizer.pkl"):
            (directory / name).write_bytes(pickle.dumps(Evil()))
        for name in ("tokens.npy", "train-00000.npy"):
            numpy.save(directory / name, numpy.array([Evil()], dtype=object), allow_pickle=True)

import train
from scripts import evaluate, generate
lay_traps("tokenizer")
assert train.main(sys.argv[1:]) == 0
summary = Path("runs/tiny/summary.json")
summary.write_text(summary.read_text().replace('"finished"', '"running"'))  # so that it reads its checkpoint again
lay_traps("runs", "runs/tiny", "runs/tiny/checkpoints", *Path().glob("runs/tiny/checkpoints/step_*"))
lay_traps("corpora", *Path().glob("corpora/text-*"))
assert train.main(sys.argv[1:]) == 0
assert generate.main(["runs/tiny", "--tokens=3"]) == 0
assert evaluate.main(["runs/tiny"]) == 0
assert not found, found
pickle.loads(pickle.dumps(os.getcwd))
assert found, "the hook sees nothing"
""")
    (tmp_path / "tokenizer").mkdir()
    byte_tokenizer().save(str(tmp_path / "tokenizer/tokenizer.json"))
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    flags += [f"--data.path={text_file}", "--run.name=tiny", "--training.max_steps=2", "--data.tokenizer=tokenizer"]
    ended = subprocess.run([sys.executable, str(trap), *flags], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "goes on from step 2" in ended.stdout and not (tmp_path / "ran").exists()
