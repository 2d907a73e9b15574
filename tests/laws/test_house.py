"""Imports go down the house, never up, and nothing is ever unpickled."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# From the top floor down; names on one line may import each other.
FLOORS = [
    ["train", "scripts", "benchmarks"],
    ["studies"],
    ["training"],
    ["model"],
    ["data"],
    ["regularizers"],
    ["command_line"],
    ["config", "pictures", "randomness"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not {".venv", "tests", "build"} & set(path.relative_to(ROOT).parts) and ".egg" not in str(path)
)


def room(path: Path) -> str:
    """The top-level name a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.add((node.module or "").split(".")[0])
    return names


def test_every_file_has_a_floor() -> None:
    assert {room(path) for path in SOURCES} <= set(FLOOR)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    upward = {name for name in imports(path) & set(FLOOR) if FLOOR[name] < FLOOR[room(path)]}
    assert not upward, f"{path.relative_to(ROOT)} imports {upward} from a floor above its own"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_unpickles_is_written(path: Path) -> None:
    forbidden = r"torch\.(load|save)\(|import pickle|pickle\.|allow_pickle|yaml\.(unsafe_)?load\(|object_list"
    forbidden += r"|trust_remote_code=(?!False)"
    assert not re.search(forbidden, path.read_text())


def test_nothing_is_unpickled_while_training(tmp_path: Path, text_file: Path) -> None:
    """Pickles lie in the run, corpus and tokenizer directories; an audit hook sees whether anyone opens one."""
    from conftest import TINY

    trap = tmp_path / "trap.py"
    trap.write_text(f"""
import os, pickle, sys
sys.path.insert(0, {str(ROOT)!r})
found = []
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" else None)
class Evil:
    def __reduce__(self):
        return (os.system, ("touch {tmp_path}/ran",))
import train
code = train.main(sys.argv[1:])
for directory in ("runs/tiny", "runs/tiny/checkpoints", "corpora/" + sorted(os.listdir("corpora"))[-1]):
    for name in ("model.pt", "state.pkl", "tokens.npy", "optimizer.bin"):
        with open(os.path.join(directory, name), "wb") as file:
            pickle.dump(Evil(), file)
code = code or train.main([*sys.argv[1:], "--run.resume=never"])
assert code == 0 and not found, found
""")
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    flags += [f"--data.path={text_file}", "--run.name=tiny", "--training.max_steps=2"]
    ended = subprocess.run([sys.executable, str(trap), *flags], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "ran").exists()


def test_files_stay_readable() -> None:
    """A file that passes 400 lines wants to be two."""
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in long.items() if lines > 400}
    assert os.path.getsize(ROOT / "train.py") < 20_000
