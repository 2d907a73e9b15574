"""A run that goes on from another one's checkpoint: which one, whether it can, and what differs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import BadInput, Config
from data.shards import Corpus
from tracking.load_run import locate, run_of
from tracking.run_directory import HARDWARE, is_free, path_of, read_config, read_summary
from training.checkpoint import NAME, directory_for, newest, step_of

# What a sample of a run is, where it comes, and what the tensors mean: a branch cannot change these. The other knobs of
# the data section say where the text lies and how it is prepared; what came of it, the corpus's fingerprint compares.
ORDER = (
    "run.seed",
    "training.global_batch_size",
    "data.train_tokens",
    "data.sources",
    "data.shuffle",
    "data.isolate_documents",
)
SAME = (*ORDER, "optimizer.name", "model.")


@dataclass(frozen=True)
class Branch:
    """A verified checkpoint of another run, of which this run is a branch."""

    checkpoint: Path
    step: int
    config: Config
    """That of the other run."""
    total_steps: int
    """The length of the other run, on which its schedules depended."""
    changes: dict[str, list[Any]]
    """Knobs in which the branch differs, ``{"section.key": [there, here]}``."""

    @property
    def described(self) -> dict[str, Any]:
        """What summary.json holds of it."""
        return {"checkpoint": str(self.checkpoint), "step": self.step, "changes": self.changes}

    def lines(self) -> list[str]:
        """What to tell of it at the start of the run."""
        changed = [f"  {key}: {as_word(there)} became {as_word(here)}" for key, (there, here) in self.changes.items()]
        title = "from here on it differs in" if changed else "it differs in nothing"
        return [f"branch     of {self.checkpoint}, after step {self.step:,}; {title}", *changed]


def as_word(value: Any) -> str:
    """A knob's value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def checkpoint_to_branch_from(config: Config) -> str:
    """The checkpoint that run.branch_from names, verified: the one given, or the newest good one of a run.

    Raises BadInput when there is none, or when it is the run's own.
    """
    asked = str(config.run.branch_from)
    path = Path(asked)
    try:
        run = run_of(path)
        if run == path_of(config).resolve():
            raise BadInput("that is this run's own directory; give the branch another --run.name")
        if NAME.fullmatch(path.resolve().name):
            locate(path)
            return asked
        step, _ = newest(path / "checkpoints")
        if step is None:
            raise BadInput(f"{path} has no checkpoint yet; train on, or choose another run")
        return str(directory_for(path / "checkpoints", step))
    except BadInput as problem:
        raise BadInput(f"run.branch_from = {asked}: {problem}") from None


def open_branch(checkpoint: Path, config: Config, corpus: Corpus, total_steps: int) -> Branch:
    """The branch of ``checkpoint`` that a run of ``config``, ``total_steps`` long, on ``corpus`` is.

    Raises BadInput that names each thing in which the two must agree and do not, with the way out.
    """
    run = run_of(checkpoint)
    theirs, summary, step = read_config(run), read_summary(run), step_of(checkpoint)
    there, here = theirs.flat(), config.flat()
    changes = {key: [there[key], here[key]] for key in here if there[key] != here[key] and not is_free(key)}
    changes.pop("run.branch_from", None)
    lines = [
        f"  {key} is {as_word(new)}, and was {as_word(old)} there; use --{key}={as_word(old)}"
        for key, (old, new) in changes.items()
        if key not in HARDWARE and any(key == same or (same.endswith(".") and key.startswith(same)) for same in SAME)
    ]
    if summary.get("corpus") != corpus.fingerprint:
        lines.append(f"  the corpus is {corpus.fingerprint}, and was {summary.get('corpus')} there; give its text")
    if step >= total_steps:
        lines.append(
            f"  it is at step {step:,}, and this run has {total_steps:,} steps; give training.max_steps above {step}"
        )
    if lines:
        raise BadInput(f"run.branch_from = {config.run.branch_from} cannot be gone on from:\n" + "\n".join(lines))
    return Branch(checkpoint, step, theirs, int(summary["total_steps"]), changes)
