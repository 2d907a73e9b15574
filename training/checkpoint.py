"""Checkpoints that are whole or absent, whenever the process dies.

Commit: a temporary directory, each file fsynced, a manifest with sizes and sha256 last, rename, fsync of the
parent; then the checkpoint is reopened and verified, and only after that an older one is pruned. Reading
goes from the newest backwards to the first one that verifies. Everything is safetensors or JSON.

    checkpoints/step_00001000/{model,optimizer,average}.safetensors + state.json + manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from config import BadInput
from training.faults import strike

if TYPE_CHECKING:  # a study asks run directories for their state without importing torch
    from torch import Tensor, nn

NAME = re.compile(r"step_(\d{8,})")


def directory_for(checkpoints: Path, step: int) -> Path:
    """The directory of the checkpoint of ``step``."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.split("_")[1])


def save(checkpoints: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Commit a checkpoint and verify it; an intact one of the same step is left as it is.

    Args:
        checkpoints: the run's directory of checkpoints.
        step: optimizer steps done.
        tensors: ``{"model": {name: tensor}, ...}``, one safetensors file each.
        state: everything else, JSON.

    Raises OSError when the disk refuses; what was there before is untouched then, and the temporary is gone.
    """
    from safetensors.torch import save_file

    final = directory_for(checkpoints, step)
    if final.exists():
        if not problem_of(final):
            return final
        _remove(final)
    checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = checkpoints / f".saving_{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        strike("save-begin", step)
        for name, contents in tensors.items():
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in contents.items()}
            save_file(on_cpu, temporary / f"{name}.safetensors", metadata={"format": "pt"})
            strike("save-file", step)
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        strike("save-state", step)
        files = {}
        for path in sorted(temporary.iterdir()):
            _sync(path)
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1))
        _sync(temporary / "manifest.json")
        _sync(temporary)
        strike("save-manifest", step)
        os.rename(temporary, final)
        strike("save-renamed", step)
        _sync(checkpoints)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot save the checkpoint {final}: {problem}") from problem
    damage = problem_of(final)
    if damage:
        raise OSError(f"the checkpoint just written does not verify: {damage}")
    return final


def problem_of(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be trusted, naming the file, or None when each byte is as it was saved."""
    manifest_path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if NAME.fullmatch(checkpoint.name) and directory_for(checkpoint.parent, manifest["step"]) != checkpoint:
            return f"{manifest_path} is of step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        return f"{manifest_path} cannot be read ({problem or type(problem).__name__})"
    for needed in ("model.safetensors", "state.json"):
        if needed not in files:
            return f"{manifest_path} does not list {needed}"
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if Path(name).name != name or path.is_symlink():
            return f"{manifest_path} names {name!r}, which is not a plain file of the checkpoint"
        try:
            if path.stat().st_size != size:
                return f"{path} has {path.stat().st_size:,} bytes instead of {size:,}"
            if sha256(path) != digest:
                return f"{path} is damaged: its sha256 differs from the manifest's"
        except OSError as problem:
            return f"{path} cannot be read ({problem.strerror})"
    return None


def existing(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run by step, newest first, verified or not. File times play no part."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def newest(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one.

    None when there are no checkpoints at all. Raises BadInput when there are some and none verifies:
    nothing is overwritten then.
    """
    problems: list[str] = []
    for checkpoint in existing(checkpoints):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise BadInput(
            f"no checkpoint in {checkpoints} can be trusted:\n{listed}\n"
            "  restore one of them, or start afresh with --run.resume=never (what is there is moved aside)"
        )
    return None, []


def find_newest(checkpoints: Path) -> tuple[str | None, list[str]]:
    """``newest`` with a path that travels as JSON."""
    found, problems = newest(checkpoints)
    return (str(found) if found else None), problems


def set_aside_newer(checkpoints: Path, step: int) -> None:
    """Rename the damaged checkpoints after ``step``, from which the run goes on: none may count as newest again."""
    for checkpoint in existing(checkpoints):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return json.loads((checkpoint / "state.json").read_text())


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint, by name; raises BadInput when it is no safetensors file."""
    from safetensors.torch import load_file

    path = checkpoint / f"{name}.safetensors"
    try:
        return {key: value.clone() for key, value in load_file(path).items()}  # loaded tensors alias the file
    except (OSError, SafetensorError) as problem:
        raise BadInput(f"{path} cannot be read as safetensors: {problem}") from None


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put the checkpoint's raw weights into the model; raises BadInput when they are those of another network."""
    try:
        model.load_state_dict(read_tensors(checkpoint, "model"))
    except RuntimeError as problem:
        listed = " ".join(str(problem).split())
        raise BadInput(
            f"{checkpoint / 'model.safetensors'} does not fit this model: {listed}; restore the checkpoint, the code "
            "that wrote it, or start afresh with --run.resume=never (what is there is moved aside)"
        ) from None


def prune(checkpoints: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of ``protected`` steps."""
    safe = {directory_for(checkpoints, step) for step in protected}
    found = existing(checkpoints)
    if found:
        strike("prune-begin", step_of(found[0]))
    for checkpoint in found[keep:]:
        if checkpoint not in safe:
            _remove(checkpoint)


def sweep(checkpoints: Path) -> None:
    """Remove what a killed save or prune left behind."""
    for pattern in (".saving_*", ".deleting_*"):
        for debris in checkpoints.glob(pattern):
            shutil.rmtree(debris, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Replace a small JSON file in one step, so that a reader finds the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    _sync(temporary)
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves debris, never half a checkpoint."""
    doomed = checkpoint.with_name(f".deleting_{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    strike("prune-renamed", step_of(checkpoint))
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    """fsync a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
