"""The runs that teach another one: which they are, whether they can, and their models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from config import BadInput, Config
from data.shards import Corpus
from files import hash_of
from tracking.load_run import Listed, has_average, list_members, load_model, run_of
from tracking.run_directory import path_of, read_config, read_summary
from training.checkpoint import NAME, entries_of
from training.teachers import Teacher


def load_teachers(
    config: Config, corpus: Corpus, device: torch.device | str = "cpu"
) -> tuple[list[Teacher], list[str]]:
    """The models of run.teachers, for a run of ``config`` on ``corpus``, and what is to be warned of.

    Of a run the best checkpoint is taken, of a checkpoint the averaged weights, where it has some. Raises BadInput that
    names each one that is not finished, reads other tokens, or cannot read as many, with the way out.
    """
    try:
        lines = [line for path in config.run.teachers for line in unfinished(path, config)]
        listed = [] if lines else list_members(config.run.teachers)
        lines += [line for entry in listed for line in differences(entry, config, corpus)]
    except BadInput as problem:
        raise BadInput(f"run.teachers: {problem}") from None
    if lines:
        raise BadInput("run.teachers cannot teach this run:\n" + "\n".join(f"  {line}" for line in lines))
    total, teachers, warnings = sum(entry.weight for entry in listed), [], []
    for entry in listed:
        model, _, _ = load_model(entry.path, device)
        share = entry.weight / total
        described = identity(entry.path) | {"share": share}
        teachers.append(Teacher(model.requires_grad_(False), model, share, described))
        theirs = read_summary(run_of(entry.path)).get("corpus")
        if theirs != corpus.fingerprint:
            warnings.append(
                f"the teacher {entry.run} was trained on another corpus ({theirs}): if that holds text of this run's "
                "val or test split, what it knows of it flatters this run's losses"
            )
    return teachers, warnings


def unfinished(path: str, config: Config) -> list[str]:
    """Why the run at ``path`` can teach nobody yet; a checkpoint of it, or a file that lists some, is as it is."""
    if Path(path).is_file():
        return []
    run = run_of(Path(path))
    if run == path_of(config).resolve():
        return [f"{path} is this run itself; give it another --run.name"]
    status = read_summary(run).get("status")
    if NAME.fullmatch(Path(path).resolve().name) or status == "finished":
        return []
    return [f"{path} is not finished ({status or 'without summary.json'}); start it again, or name a checkpoint of it"]


def differences(entry: Listed, config: Config, corpus: Corpus) -> list[str]:
    """What keeps a teacher from reading what the student reads."""
    run, tokenizer = run_of(entry.path), corpus.manifest["tokenizer"]["sha256"]
    theirs, lines = read_config(run), []
    if read_summary(run).get("tokenizer") != tokenizer:
        lines.append(f"{entry.run} has another tokenizer; use that, with --data.tokenizer={run}, or another teacher")
    if theirs.model.context_length < config.model.context_length:
        lengths = f"{theirs.model.context_length} tokens, and this run's windows have {config.model.context_length}"
        lines.append(f"{entry.run} reads at most {lengths}; use --model.context_length={theirs.model.context_length}")
    isolated = theirs.data.isolate_documents
    if isolated != config.data.isolate_documents:
        learnt = "one document at a time" if isolated else "across the borders of documents"
        lines.append(f"{entry.run} has learnt to read {learnt}; use --data.isolate_documents={str(isolated).lower()}")
    return lines


def identity(checkpoint: Path) -> dict[str, Any]:
    """Where a teacher's weights are, which they are, and their sha256 (from the manifest of a verified checkpoint)."""
    weights = "average" if has_average(checkpoint) else "model"
    hashes = [entry["sha256"] for entry in entries_of(checkpoint, weights).values()]
    return {
        "checkpoint": str(checkpoint),
        "weights": weights,
        "sha256": hashes[0] if len(hashes) == 1 else hash_of(hashes),
    }


def check_unchanged(before: list[dict[str, Any]], teachers: list[Teacher], run: Path) -> None:
    """Raises BadInput when the teachers are not those with which the run at ``run`` began, or count otherwise."""
    now = [teacher.described for teacher in teachers]
    if before and [known_by(one) for one in before] != [known_by(one) for one in now]:
        told = {"then": before, "now ": now}
        lines = "".join(
            f"\n  {when} {one['checkpoint']}, sha256 {one['sha256'][:16]}, {one['share']:.3g} of the mean"
            for when, ones in told.items()
            for one in ones
        )
        raise BadInput(
            f"{run} began with other teachers; nothing was changed:{lines}\n"
            "  restore them, use another --run.name, or --run.resume=never (what is there is moved aside)"
        )


def known_by(described: dict[str, Any]) -> tuple[str, float]:
    """What tells a teacher from another."""
    return described["sha256"], described["share"]
