"""Checkpoints that are whole or absent, whenever the process dies.

Commit: a temporary directory, each file fsynced, a manifest with sizes and sha256 last, rename, fsync of the
parent; then the checkpoint is reopened and verified, and only after that an older one is pruned. Reading
goes from the newest backwards to the first one that verifies. Everything is safetensors or JSON.

    checkpoints/step_00001000/{model,optimizer,average}.safetensors + state.json + manifest.json

Of a model that is too large for one process, each process writes its rows of all tensors: model.rows-0-of-4.safetensors
and so on. The main process waits for the others' files, and commits all of them together.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

import files
from config import BadInput
from training.faults import inject_fault

SECONDS_BETWEEN_LOOKS = 0.05

if TYPE_CHECKING:  # a study asks run directories for their state without importing torch
    from torch import Tensor

NAME = re.compile(r"step_(\d{8,})")
ROWS = re.compile(r"(\w+)\.rows-(\d+)-of-(\d+)")  # the name of a file with a part of each tensor, without its suffix


def directory_for(checkpoints: Path, step: int) -> Path:
    """The directory of the checkpoint of ``step``."""
    return checkpoints / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rsplit("_", 1)[1])


def file_of_rows(name: str, part: int, parts: int) -> str:
    """The name of the file with this part of the tensors of ``name``, without its suffix."""
    return f"{name}.rows-{part}-of-{parts}"


def begin(checkpoints: Path, step: int) -> bool:
    """Make the directory into which ``save`` writes; False when there is an intact checkpoint of the step already."""
    final = directory_for(checkpoints, step)
    if final.exists():
        if not problem_of(final):
            return False
        _remove(final)
    temporary = _temporary(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return True


def save(
    checkpoints: Path,
    tensors: Iterable[tuple[str, dict[str, Tensor]]],
    state: dict[str, Any],
    begun: bool = False,
    patience: float = 600,
) -> Path:
    """Commit a checkpoint and verify it; an intact one of the same step is left as it is.

    Args:
        checkpoints: the run's directory of checkpoints.
        tensors: ``("model", {name: tensor})`` and so on, one safetensors file each; asked for one after the other.
        state: everything else, JSON; ``state["step"]`` is the number of optimizer steps done.
        begun: whether ``begin`` was called, and found none.
        patience: seconds to wait for the parts that other processes write, if these tensors are parts.

    Raises OSError when the disk refuses; what was there before is untouched then, and the temporary is gone.
    """
    step = state["step"]
    final = directory_for(checkpoints, step)
    temporary = _temporary(final)
    try:
        if not begun and not begin(checkpoints, step):
            return final
        _write(temporary, tensors, state, patience)
        os.rename(temporary, final)
        inject_fault("save-renamed", step)
        files.sync(checkpoints)
    except (OSError, SafetensorError) as problem:
        reason = problem if temporary.exists() or not begun else "another process could not write its part"
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot save the checkpoint {final}: {reason}") from problem
    damage = problem_of(final)
    if damage:
        raise OSError(f"the checkpoint just written does not verify: {damage}")
    return final


def write_rows(checkpoints: Path, tensors: Iterable[tuple[str, dict[str, Tensor]]], step: int) -> None:
    """Write this process's part of a checkpoint that the main process has begun and commits; raises OSError."""
    directory = _temporary(directory_for(checkpoints, step))
    try:
        for name, contents in tensors:
            _write_file(directory, name, contents)
            inject_fault("save-file", step)
    except (OSError, SafetensorError) as problem:
        with suppress(FileNotFoundError):  # another process could not write either
            _remove(directory)  # in one step, whatever the others are writing into it; by that the main process sees it
        raise OSError(problem) from problem


def _temporary(final: Path) -> Path:
    return final.with_name(f".saving_{final.name}")


def _write_file(directory: Path, name: str, contents: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    on_cpu = {key: value.detach().cpu().contiguous() for key, value in contents.items()}
    begun = directory / f"{name}.begun"  # who waits for the file must not find half of it
    save_file(on_cpu, begun, metadata={"format": "pt"})
    files.give_usual_mode(begun)
    os.rename(begun, directory / f"{name}.safetensors")


def _wait_for_rows(directory: Path, name: str, patience: float) -> None:
    """Return when all other processes have written their part of ``name``; raises OSError that names one without."""
    rows = ROWS.fullmatch(name)
    if rows is None:
        return
    until = time.monotonic() + patience
    for part in range(int(rows[3])):
        path = directory / f"{file_of_rows(rows[1], part, int(rows[3]))}.safetensors"
        while not path.exists():
            if time.monotonic() > until or not directory.exists():
                raise OSError(f"rank {part} has not written {path.name} within {patience:g} s")
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _write(
    directory: Path, tensors: Iterable[tuple[str, dict[str, Tensor]]], state: dict[str, Any], patience: float
) -> None:
    """The files of a checkpoint, the manifest last, all on the disk when it returns."""
    step, names = state["step"], []
    inject_fault("save-begin", step)
    for name, contents in tensors:
        _write_file(directory, name, contents)
        names.append(name)
        del contents  # its memory may be needed to gather the next
        inject_fault("save-file", step)
    for name in names:
        _wait_for_rows(directory, name, patience)
    (directory / "state.json").write_text(json.dumps(state, indent=1))
    inject_fault("save-state", step)
    entries = {path.name: files.entry_of(path) for path in sorted(directory.iterdir())}
    (directory / "manifest.json").write_text(json.dumps({"step": step, "files": entries}, indent=1))
    for path in (*directory.iterdir(), directory):
        files.sync(path)
    inject_fault("save-manifest", step)


def problem_of(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be trusted, naming the file, or None when each byte is as it was saved."""
    manifest_path = checkpoint / "manifest.json"
    try:
        manifest = json.loads(manifest_path.read_text())
        entries = dict(manifest["files"])
        if NAME.fullmatch(checkpoint.name) and directory_for(checkpoint.parent, manifest["step"]) != checkpoint:
            return f"{manifest_path} is of step {manifest['step']}"
        if "state.json" not in entries or not any(name.startswith("model.") for name in entries):
            needed = "state.json" if "state.json" not in entries else "model.safetensors"
            return f"{manifest_path} does not list {needed}"
        problems = (files.problem_of(checkpoint, name, entry) for name, entry in entries.items())
        return next((problem for problem in problems if problem), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        return f"{manifest_path} cannot be read ({problem or type(problem).__name__})"


def existing(checkpoints: Path) -> list[Path]:
    """The checkpoints of a run by step, newest first, verified or not. File times play no part."""
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of, reverse=True)


def newest(checkpoints: Path) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint that verifies, and what is wrong with each newer one.

    None when there are no checkpoints at all. Raises BadInput when there are some and none verifies:
    nothing is overwritten then.
    """
    problems: list[str] = []
    for checkpoint in existing(checkpoints):
        problem = problem_of(checkpoint)
        if problem is None:
            return step_of(checkpoint), problems
        problems.append(problem)
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise BadInput(
            f"no checkpoint in {checkpoints} can be trusted:\n{listed}\n"
            "  restore one of them, or start afresh with --run.resume=never (what is there is moved aside)"
        )
    return None, []


def set_aside_newer(checkpoints: Path, step: int) -> None:
    """Rename the damaged checkpoints after ``step``, from which the run goes on: none may count as newest again."""
    for checkpoint in existing(checkpoints):
        if step_of(checkpoint) > step:
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint, aside)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    return dict(json.loads((checkpoint / "state.json").read_text()))


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The whole tensors of one file of a checkpoint, by name; raises BadInput when it is no safetensors file."""
    return dict(each_tensor(checkpoint, name))


def each_tensor(checkpoint: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """The same, one at a time: a process that needs only a part of each never holds them all."""
    import torch
    from safetensors import safe_open

    paths = [checkpoint / file for file in entries_of(checkpoint, name)] or [checkpoint / f"{name}.safetensors"]
    try:
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(path, "pt")) for path in paths]
            for key in opened[0].keys():  # noqa: SIM118
                rows = [file.get_tensor(key) for file in opened]
                # Loaded tensors alias the file. A scalar is the same in all parts.
                yield key, torch.cat(rows) if len(rows) > 1 and rows[0].ndim else rows[0].clone()
    except (OSError, SafetensorError) as problem:
        raise BadInput(f"{paths[0]} cannot be read as safetensors: {problem}") from None


def entries_of(checkpoint: Path, name: str) -> dict[str, dict[str, Any]]:
    """What the manifest says of the file with the tensors of ``name``, or of those with their rows, from top to bottom.

    Empty when there is none.
    """

    def part(file: str) -> int:
        rows = ROWS.fullmatch(Path(file).stem)
        return int(rows[2]) if rows else 0

    entries = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {file: entries[file] for file in sorted(entries, key=part) if file.split(".")[0] == name}


def prune(checkpoints: Path, keep: int, protected: set[int]) -> None:
    """Delete all but the newest ``keep`` checkpoints and those of ``protected`` steps."""
    found = existing(checkpoints)
    if found:
        inject_fault("prune-begin", step_of(found[0]))
    for checkpoint in found[keep:]:
        if step_of(checkpoint) not in protected:
            _remove(checkpoint)


def sweep(checkpoints: Path) -> None:
    """Remove what a killed save or prune left behind."""
    for pattern in (".saving_*", ".deleting_*"):
        for debris in checkpoints.glob(pattern):
            shutil.rmtree(debris, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill in the middle leaves debris, never half a checkpoint."""
    doomed = checkpoint.with_name(f".deleting_{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    inject_fault("prune-renamed", step_of(checkpoint))
    shutil.rmtree(doomed, ignore_errors=True)
