"""The directory of a run: its name, its lock, its config, its summary.

runs/<name>/  config.yaml  metrics.jsonl  summary.json  checkpoints/  best.json  last.json  curves.png  samples.txt
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any, TextIO

import files
from command_line import from_mapping, load_yaml
from config import BadInput, Config, Failure
from data.sources import kind_of, short_name
from training.checkpoint import existing

# Knobs that say where a run lives, how it is watched and what is kept of it. They are left out of the default
# name and may change on resume; every other change is another run.
LIMITS = tuple(f"training.{name}" for name in ("hang_timeout", "max_nonfinite", "max_failed_saves", "max_attempts"))
FREE = ("run.name", "run.dir", "run.resume", "run.profile", "run.shard", *LIMITS, "tracking.", "checkpoint.")
# Knobs that say how it is computed, not what; a change on resume is taken, with a warning that bits may differ.
COMPUTED = ("evaluation.batch_size", "model.checkpoint_activations")
HARDWARE = ("run.device", "run.precision", "run.compile", "run.threads", *COMPUTED)


def is_free(key: str) -> bool:
    """Whether the knob may change between two starts of one run without changing its result."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def default_name(config: Config) -> str:
    """Short words and a hash of everything that can change the result: the same config finds its own run."""
    default = Config().flat()  # a knob added later, at its default, leaves the names of earlier runs as they were
    identity = {key: value for key, value in config.flat().items() if not is_free(key) and value != default[key]}
    corpus = short_name(config.data.path or "") or kind_of(config.data)
    shape = f"{config.model.family}-{config.model.n_layers}x{config.model.d_model}"
    return f"{corpus}-{shape}-{files.hash_of(identity)[:8]}"


def path_of(config: Config) -> Path:
    """The run's directory: run.dir and run.name, or the name made from the config."""
    return Path(config.run.dir) / (config.run.name or default_name(config))


def lock(directory: Path) -> TextIO:
    """Make the directory ours until the returned file is closed or the process ends, even by kill -9.

    Raises BadInput naming host and process of the run that has it, or why it cannot be written to.
    """
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory / "checkpoints") as probe:
            probe.write(b"room")
        file = files.lock(directory / "lock")
    except BlockingIOError as held:
        owner = str(held) or "another process"
        raise BadInput(
            f"{directory} is in use by {owner}; wait for it, stop it, or give this run another --run.name"
        ) from None
    except OSError as problem:
        raise BadInput(f"cannot write to the run directory {directory}: {problem.strerror}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def move_aside(directory: Path) -> bool:
    """Rename the directory to a free name beside it, if it holds more than our lock; returns whether it did."""
    names = {path.name for path in directory.iterdir()} - {"lock", "checkpoints"}
    if not names and not existing(directory / "checkpoints"):
        return False
    number = 1
    while (aside := directory.with_name(f"{directory.name}.previous-{number}")).exists():
        number += 1
    directory.rename(aside)
    return True


def read_summary(directory: Path) -> dict[str, Any]:
    """What summary.json says; empty when there is none or it is unreadable."""
    try:
        return dict(json.loads((directory / "summary.json").read_text()))
    except (OSError, ValueError):
        return {}


def update_summary(directory: Path, **values: Any) -> dict[str, Any]:
    """Write ``values`` into summary.json; returns the whole of it."""
    summary = read_summary(directory) | values
    files.write_json(directory / "summary.json", summary)
    return summary


def read_config(directory: Path) -> Config:
    """The config that is stored with a run; raises BadInput when it cannot be read."""
    file = directory / "config.yaml"
    return from_mapping(load_yaml(file, "stored config"), str(file))


def check_config(directory: Path, config: Config) -> list[str]:
    """Compare the config with that of the run in ``directory``, if there is one; returns warnings, writes nothing.

    Raises BadInput with the differences when the stored run is another one; knobs of logging and saving may
    differ, and knobs of the hardware may with a warning. A directory without checkpoints holds no run yet.
    """
    if not existing(directory / "checkpoints"):
        return []
    if not (directory / "config.yaml").exists():
        raise BadInput(f"{directory} has checkpoints but no config.yaml; restore it or use another --run.name")
    stored, asked = read_config(directory).flat(), config.flat()
    for key in ("training.micro_batch_size", "data.corpus"):
        # Auto and null are what they came to, and the corpus itself is compared later.
        if asked[key] in ("auto", None) or stored[key] == "auto":
            asked[key] = stored[key]
    changed = {key: (stored[key], asked[key]) for key in asked if stored[key] != asked[key]}
    serious = {key: pair for key, pair in changed.items() if not is_free(key) and key not in HARDWARE}
    if serious:
        lines = "\n".join(f"  {key}: the run has {old!r}, asked for is {new!r}" for key, (old, new) in serious.items())
        way = "use the stored values, another --run.name, or --run.resume=never (what is there is moved aside)"
        length = {"training.max_steps", "training.max_epochs"} & set(serious)
        if length and read_summary(directory).get("status") == "finished":
            way += f"\n  it is finished; to go on from its end: --run.branch_from={directory} and another --run.name"
        raise BadInput(f"{directory} holds a run with another config; nothing was changed:\n{lines}\n  {way}")
    return [
        f"{key} changed from {old!r} to {new!r}: bits may differ from an uninterrupted run"
        for key, (old, new) in changed.items()
        if key in HARDWARE
    ]


def count_attempt(before: dict[str, Any], step: int, limit: int) -> dict[str, int]:
    """Which attempt this start is to get from the checkpoint of ``step`` to the next, for the summary.

    A start counts when the one ``before`` began at the same step and crashed. Raises Failure beyond ``limit``.
    """
    last = before.get("attempt", {})
    crashed = before.get("status") in ("running", "failed") and last.get("from_step") == step
    number = last["number"] + 1 if crashed else 1
    if number > limit:
        reason = f" ({before['error']})" if before.get("error") else ""
        raise Failure(
            f"the run was started {last['number']} times from step {step} and never reached its next checkpoint"
            f"{reason}. Mend the cause, or save more often with --checkpoint.every; then start it again with "
            f"--training.max_attempts={limit + 5}"
        )
    return {"from_step": step, "number": number}


def bits_may_differ(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A warning for each part of the hardware, or version, with which a run began and that is another one now."""
    return [
        f"{key} was {value or 'unknown'} when this run began and is {now.get(key) or 'unknown'}: bits may differ"
        for key, value in before.items()
        if value != now.get(key)
    ]


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
