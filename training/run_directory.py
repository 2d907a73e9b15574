"""The directory of a run: its name, its lock, its config, its summary.

runs/<name>/  config.yaml  metrics.jsonl  summary.json  checkpoints/  best.json  last.json  curves.png  samples.txt
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import yaml

from command_line import dump
from config import BadInput, Config
from training.checkpoint import directory_for, existing, write_json

# Knobs that say where a run lives, how it is watched and what is kept of it. They are left out of the default
# name and may change on resume; every other change is another run.
FREE = ("run.name", "run.dir", "run.resume", "training.max_nonfinite", "tracking.", "checkpoint.")
# Knobs whose resolved value is stored with the run; a change on resume is taken, with a warning that bits may differ.
HARDWARE = ("run.device", "run.precision", "run.compile", "run.threads")


def is_free(key: str) -> bool:
    """Whether the knob may change between two starts of one run without changing its result."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def default_name(config: Config) -> str:
    """Short words and a hash of everything that can change the result: the same config finds its own run."""
    identity = {key: value for key, value in config.flat().items() if not is_free(key)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    corpus: str = config.data.corpus
    if config.data.path:
        stem = config.data.path.rstrip("/").split("/")[-1].split(".")[0]
        corpus = "".join(c if c.isalnum() else "-" for c in stem).strip("-")[:24] or corpus
    return f"{corpus}-{config.model.family}-{config.model.n_layers}x{config.model.d_model}-{digest}"


def path_of(config: Config) -> Path:
    """The run's directory: run.dir and run.name, or the name made from the config."""
    return Path(config.run.dir) / (config.run.name or default_name(config))


def lock(directory: Path) -> TextIO:
    """Make the directory ours until the returned file is closed or the process ends, even by kill -9.

    Raises BadInput naming host and process of the run that has it, or why it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / "lock", "a+")
    except OSError as problem:
        raise BadInput(f"cannot write to the run directory {directory}: {problem.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise BadInput(
            f"{directory} is in use by {owner}; wait for it, stop it, or give this run another --run.name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def move_aside(directory: Path) -> Path | None:
    """Rename what is at ``directory`` to a free name beside it; returns the new path, None if nothing was there."""
    if not directory.exists():
        return None
    lock(directory).close()  # refuse to move a run that is under way
    number = 1
    while (aside := directory.with_name(f"{directory.name}.previous-{number}")).exists():
        number += 1
    directory.rename(aside)
    return aside


def read_summary(directory: Path) -> dict[str, Any]:
    """What summary.json says; empty when there is none or it is unreadable."""
    try:
        return dict(json.loads((directory / "summary.json").read_text()))
    except (OSError, ValueError):
        return {}


def update_summary(directory: Path, **values: Any) -> dict[str, Any]:
    """Write ``values`` into summary.json; returns the whole of it."""
    summary = read_summary(directory) | values
    write_json(directory / "summary.json", summary)
    return summary


def check_config(directory: Path, config: Config) -> list[str]:
    """Store the config of a new run, or compare it with the stored one; returns warnings.

    Raises BadInput with the differences when the stored run is another one; knobs of logging and saving may
    differ, and knobs of the hardware may with a warning.
    """
    path = directory / "config.yaml"
    if not path.exists():
        if existing(directory / "checkpoints"):
            raise BadInput(f"{directory} has checkpoints but no config.yaml; restore it or use another --run.name")
        _write_config(path, config)
        return []
    stored = read_flat(path)
    asked = config.flat()
    changed = {
        key: (stored.get(key, asked[key]), asked[key]) for key in asked if stored.get(key, asked[key]) != asked[key]
    }
    serious = {key: pair for key, pair in changed.items() if not is_free(key) and key not in HARDWARE}
    if serious:
        lines = "\n".join(f"  {key}: the run has {old!r}, asked for is {new!r}" for key, (old, new) in serious.items())
        raise BadInput(
            f"{directory} holds a run with another config; nothing was changed:\n{lines}\n"
            "  use the stored values, another --run.name, or --run.resume=never (what is there is moved aside)"
        )
    _write_config(path, config)
    return [
        f"{key} changed from {old!r} to {new!r}: bits may differ from an uninterrupted run"
        for key, (old, new) in changed.items()
        if key in HARDWARE
    ]


def read_flat(path: Path) -> dict[str, Any]:
    """A run's stored config.yaml as ``{"section.key": value}``."""
    try:
        sections = yaml.safe_load(path.read_text())
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    except (OSError, yaml.YAMLError, AttributeError) as problem:
        raise BadInput(f"{path} cannot be read ({problem}); restore it or use another --run.name") from None


def _write_config(path: Path, config: Config) -> None:
    temporary = path.with_name(".config.yaml.new")
    temporary.write_text(dump(config))
    os.replace(temporary, path)


def point(directory: Path, name: str, step: int, **values: Any) -> None:
    """Make ``best`` or ``last`` name the checkpoint of ``step``, in a small JSON file."""
    write_json(directory / f"{name}.json", {"checkpoint": directory_for(Path(), step).name, "step": step, **values})


def copy_tokenizer(directory: Path, corpus: Path) -> None:
    """Keep the corpus's tokenizer with the run, so that a run can be moved or exported alone."""
    if not (directory / "tokenizer.json").exists():
        shutil.copyfile(corpus / "tokenizer.json", directory / ".tokenizer.json.new")
        os.replace(directory / ".tokenizer.json.new", directory / "tokenizer.json")


def versions() -> dict[str, str]:
    """Versions on which the bits of a run depend."""
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "commit": git_commit()}


def git_commit() -> str:
    """The code's commit, with + when files differ from it; empty outside a git checkout."""
    root = Path(__file__).parent.parent
    try:
        ask = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def version_warnings(before: dict[str, str]) -> list[str]:
    """What differs from the versions a run began with."""
    now = versions()
    return [
        f"{name} was {before[name] or 'unknown'} when this run began and is {now[name] or 'unknown'}: bits may differ"
        for name in before
        if before[name] != now.get(name, "")
    ]


def say(*words: object) -> None:
    """A warning, on standard error."""
    print("warning:", *words, file=sys.stderr, flush=True)
