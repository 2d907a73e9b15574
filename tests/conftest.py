"""What all tests share: one thread each (two tests run side by side), nothing sent anywhere, nothing left behind."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent

# Read by torch, wandb and the processes that tests start, all of which are imported after this file.
os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
if "WELLPOSED_GPU_CHECK" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(variable, None)

# A run small enough to be repeated: 20 thousand parameters, a step of a few milliseconds.
TINY = {
    "data.corpus": "text",
    "data.tokenizer": "byte",
    "data.split": "tail",
    "model.n_layers": "2",
    "model.d_model": "32",
    "model.n_heads": "2",
    "model.context_length": "32",
    "training.max_steps": "24",
    "training.global_batch_size": "8",
    "evaluation.every": "8",
    "evaluation.sample_tokens": "8",
    "tracking.log_every": "4",
    "run.threads": "1",
    "run.precision": "fp32",
}

# What tests/faults/ breaks: an epoch is 8 steps, each step is logged, a checkpoint comes every 4, all dropouts are on.
BREAKABLE = TINY | {
    "data.train_tokens": "2081",
    "training.micro_batch_size": "4",
    "evaluation.every": "12",
    "tracking.log_every": "1",
    "checkpoint.every": "4",
    "checkpoint.keep": "2",
    "regularizers.embedding_dropout": "0.2",
    "regularizers.attention_dropout": "0.2",
    "regularizers.residual_dropout": "0.2",
    "regularizers.mlp_dropout": "0.2",
}


# Regularizers that train vectors or matrices beside the network, which nobody else may see.
WITH_PARAMETERS = {"reversed_fraction": 0.5, "target_offset": 3, "multi_token_weight": 0.3, "masked_input_weight": 0.4}


def made_up_text(characters: int = 20_000, seed: int = 0) -> str:
    """Text with something to learn: sentences over a small vocabulary whose words follow each other by rule."""
    draw = np.random.default_rng(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "dog", "run", "far", "away"]
    follow = draw.integers(len(words), size=(len(words), 3))
    place, text = 0, []
    while sum(map(len, text)) + len(text) < characters:
        text.append(words[place])
        place = int(follow[place, draw.integers(3)])
    return " ".join(text)[: characters - 1] + "\n"


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 20,000 characters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(made_up_text())
    return path


@pytest.fixture
def tiny(text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a tiny run in this test's directory; keyword arguments change knobs (``training__max_steps=3``)."""

    return lambda **knobs: flags_of(TINY, text_file, tmp_path, **knobs)


@pytest.fixture
def breakable(text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of the run that ``whole_run`` leaves alone and ``interrupted`` kills, in this test's directory."""
    return lambda **knobs: flags_of(BREAKABLE, text_file, tmp_path, **knobs)


def flags_of(base: dict[str, str], text_file: Path, directory: Path, **knobs: object) -> list[str]:
    """The command line's words for a run named tiny in ``directory``/runs."""
    changes = {key.replace("__", "."): str(value) for key, value in knobs.items()}
    chosen = base | {"data.path": str(text_file), "run.dir": str(directory / "runs"), "run.name": "tiny"} | changes
    return [f"--{key}={value}" for key, value in chosen.items()]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """The run directory of ``breakable()``, left alone from start to end: what every broken one must equal."""
    directory = tmp_path_factory.mktemp("whole")
    assert in_this_process(flags_of(BREAKABLE, text_file, directory), directory).returncode == 0
    return directory / "runs/tiny"


@pytest.fixture(scope="session")
def killed_at_20(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A directory with corpora/ and runs/ in which ``breakable()`` was killed when it began to save step 20."""
    directory = tmp_path_factory.mktemp("killed")
    command = [sys.executable, str(ROOT / "train.py"), *flags_of(BREAKABLE, text_file, directory)]
    environment = os.environ | {"WELLPOSED_FAULT": "save-begin:0:20:kill"}
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True)
    assert ended.returncode == -9, ended.stderr
    return directory


@pytest.fixture
def interrupted(killed_at_20: Path, tmp_path: Path) -> Path:
    """A run of this test's own, killed at step 20, with checkpoints of the steps 16 and 12; ``breakable()`` goes on."""
    for name in ("corpora", "runs"):
        shutil.copytree(killed_at_20 / name, tmp_path / name, symlinks=True)
    return tmp_path / "runs/tiny"


def in_this_process(flags: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """train.py with these words in ``directory``, without the seconds that a new process takes to import torch."""
    import torch

    import train as program
    from program import exit_code

    output, errors = io.StringIO(), io.StringIO()
    threads, before = torch.get_num_threads(), os.getcwd()
    os.chdir(directory)
    try:
        with redirect_stdout(output), redirect_stderr(errors):
            code = exit_code(program.main, flags)
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(flags, code, output.getvalue(), errors.getvalue())


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run train.py to its end in a directory of the test's own: in a process of its own if variables are given."""

    def start(flags: list[str], timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        if not environment:
            return in_this_process(flags, tmp_path)
        # W&B tells the children of a process to share its service, which then outlives them and keeps their runs' ids.
        inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *flags],
            cwd=tmp_path,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return start
