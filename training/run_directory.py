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
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from command_line import dump, load_yaml
from config import BadInput, Config, Failure
from data.sources import short_name
from training import checkpoint
from training.checkpoint import directory_for, existing, write_json

if TYPE_CHECKING:
    from training.tracking import Metrics

# Knobs that say where a run lives, how it is watched and what is kept of it. They are left out of the default
# name and may change on resume; every other change is another run.
LIMITS = tuple(f"training.{name}" for name in ("hang_timeout", "max_nonfinite", "max_failed_saves", "max_attempts"))
FREE = ("run.name", "run.dir", "run.resume", *LIMITS, "tracking.", "checkpoint.")
# Knobs whose resolved value is stored with the run; a change on resume is taken, with a warning that bits may differ.
HARDWARE = ("run.device", "run.precision", "run.compile", "run.threads")


def is_free(key: str) -> bool:
    """Whether the knob may change between two starts of one run without changing its result."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def default_name(config: Config) -> str:
    """Short words and a hash of everything that can change the result: the same config finds its own run."""
    default = Config().flat()  # a knob added later, at its default, leaves the names of earlier runs as they were
    identity = {key: value for key, value in config.flat().items() if not is_free(key) and value != default[key]}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    corpus = short_name(config.data.path or "") or config.data.corpus
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
        (directory / "checkpoints").mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=directory / "checkpoints") as probe:
            probe.write(b"room")
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
    """Rename the run at ``directory`` to a free name beside it; returns the new path, None if there was no run."""
    if not (directory / "config.yaml").exists():
        return None
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


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last line is left out."""
    records = []
    path = directory / "metrics.jsonl"
    # Bytes, because what a dead machine leaves at the end of a file need not even be text.
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def check_config(directory: Path, config: Config) -> list[str]:
    """Compare the config with that of the run in ``directory``, if there is one; returns warnings, writes nothing.

    Raises BadInput with the differences when the stored run is another one; knobs of logging and saving may
    differ, and knobs of the hardware may with a warning. A directory without checkpoints holds no run yet.
    """
    path = directory / "config.yaml"
    if not existing(directory / "checkpoints"):
        return []
    if not path.exists():
        raise BadInput(f"{directory} has checkpoints but no config.yaml; restore it or use another --run.name")
    stored = Config().flat() | read_flat(path)  # a knob that the code did not have then was at its default
    asked = config.flat()
    changed = {key: (stored[key], asked[key]) for key in asked if stored[key] != asked[key]}
    serious = {key: pair for key, pair in changed.items() if not is_free(key) and key not in HARDWARE}
    if serious:
        lines = "\n".join(f"  {key}: the run has {old!r}, asked for is {new!r}" for key, (old, new) in serious.items())
        raise BadInput(
            f"{directory} holds a run with another config; nothing was changed:\n{lines}\n"
            "  use the stored values, another --run.name, or --run.resume=never (what is there is moved aside)"
        )
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


def read_flat(path: Path) -> dict[str, Any]:
    """A run's stored config.yaml as ``{"section.key": value}``."""
    try:
        sections = load_yaml(path)
        return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    except (OSError, yaml.YAMLError, AttributeError) as problem:
        raise BadInput(f"{path} cannot be read ({problem}); restore it or use another --run.name") from None


def write_config(directory: Path, config: Config) -> None:
    """Store the config of the run."""
    temporary = directory / ".config.yaml.new"
    temporary.write_text(dump(config))
    os.replace(temporary, directory / "config.yaml")


def hardware_warnings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs from the hardware a run began on."""
    return [
        f"{key} was {before[key]} when this run began and is {now.get(key)}: bits may differ"
        for key in before
        if before[key] != now.get(key)
    ]


def point_at(directory: Path, step: int, best: dict[str, Any] | None) -> None:
    """Make last.json, and best.json if there is a best, name their checkpoints."""
    for name, values in (("last", {"step": step}), ("best", best)):
        if values is not None:
            checkpoint = directory_for(Path(), values["step"]).name
            write_json(directory / f"{name}.json", {"checkpoint": checkpoint, **values})


def save(
    directory: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], keep: int, metrics: Metrics
) -> None:
    """Commit the checkpoint of ``step``, point at it, and only then prune older ones.

    The lines of ``metrics`` go to the disk first: a resume counts on them. Raises OSError when the disk refuses.
    """
    checkpoints, best = directory / "checkpoints", state["best"]
    metrics.sync()
    checkpoint.save(checkpoints, step, tensors, state)
    point_at(directory, step, best)
    checkpoint.prune(checkpoints, keep, {best["step"]} if best else set())


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
