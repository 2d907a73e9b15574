"""A trained model out of its run directory, and weights to start another run from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Tokenizer
from torch import Tensor

from config import BadInput, Config, Model, all_errors
from data.mixtures import mixture
from data.shards import Corpus
from data.tokenizers import load_tokenizer
from files import sha256
from hardware import settle_vector_math
from model.gpt import AUXILIARY, GPT
from model.huggingface import read_directory
from program import warn
from tracking.run_directory import read_config, read_summary
from training.checkpoint import NAME, directory_for, entries_of, existing, newest, problem_of, read_tensors

Weights = Literal["best available", "model", "average"]


def load_model(
    path: str | Path, device: torch.device | str = "cpu", weights: Weights = "best available"
) -> tuple[GPT, Config, Path]:
    """A trained model in evaluation mode, the config of its run, and the directory of its corpus.

    ``path`` is a run directory, whose best checkpoint is taken, or a checkpoint. Its bytes are verified. Of its
    ``weights`` the raw ones are ``model``, the averaged ones ``average``, and ``best available`` is the average where
    there is one. The corpus may be gone: that is for the caller to find out.
    Raises BadInput for what is missing or damaged.
    """
    settle_vector_math()  # the model's table of rotations is made of sines and cosines
    run, checkpoint = locate(Path(path))
    config, tensors = read_config(run), read_weights(checkpoint, weights)
    corpus = read_summary(run).get("corpus_directory")
    if not isinstance(corpus, str):
        raise BadInput(f"{run / 'summary.json'} does not name the corpus; start the run again and it will")
    model = GPT(config.model, len(tensors["embedding.weight"]), config.regularizers)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as problem:
        raise BadInput(f"{checkpoint} does not fit {run / 'config.yaml'}: {problem}; restore one of them") from None
    return model.to(device).eval(), config, Path(corpus)


def load_corpus(path: str | Path) -> Corpus:
    """The corpus of the run at ``path`` (or of the checkpoint at ``path``), verified.

    Raises BadInput if it is gone, damaged, or not the one that the run was trained on.
    """
    run = run_of(Path(path))
    summary = read_summary(run)
    sources = summary.get("sources") or []
    directories = [Path(str(entry.get("corpus_directory"))) for entry in sources or [summary]]
    for directory in directories:
        if not (directory / "manifest.json").is_file():
            raise BadInput(
                f"the corpus of {run} is gone: there is no {directory.absolute()}; start in the directory in which the "
                f"run was trained, or prepare it again: python -m scripts.prepare_data {run / 'config.yaml'}"
            )
    corpora = [Corpus.open(directory) for directory in directories]
    corpus = mixture(read_config(run).data.sources, corpora) if sources else corpora[0]
    if summary.get("corpus", corpus.fingerprint) != corpus.fingerprint:
        raise BadInput(
            f"{' and '.join(map(str, directories))} holds the corpus {corpus.fingerprint}, and {run} was trained on "
            f"{summary['corpus']}; "
            "restore that one: the test text of another may have been trained on"
        )
    return corpus


def run_tokenizer(path: str | Path) -> Path:
    """The tokenizer.json that the run at ``path`` (or of the checkpoint at ``path``) was trained with."""
    run = run_of(Path(path))
    summary = read_summary(run)
    corpus = summary.get("corpus_directory")
    candidates = [run / "tokenizer.json", *([Path(corpus) / "tokenizer.json"] if isinstance(corpus, str) else [])]
    for file in candidates:
        if file.is_file():
            if "tokenizer" in summary and sha256(file) != summary["tokenizer"]:
                raise BadInput(f"{file} is not the one that {run} was trained with (its sha256 differs); restore that")
            return file
    raise BadInput(f"there is no tokenizer of {run}: looked for {' and '.join(map(str, candidates))}; restore one")


def initial_weights(
    path: str | Path, config: Model, vocab_size: int, tokenizer: Tokenizer | None = None
) -> dict[str, Tensor]:
    """The network of ``config`` and ``vocab_size``: from a run, a checkpoint, or a Hugging Face directory.

    ``tokenizer`` is the corpus's: its ids must mean what they meant to these weights, where that is known. Raises
    BadInput that names each difference between the two networks, with the flags that remove it.
    """
    directory = Path(path)
    if (directory / "config.json").is_file():
        theirs, their_vocab_size, weights = read_directory(directory)
    elif (directory / "config.yaml").is_file() or NAME.fullmatch(directory.name):
        directory, checkpoint = locate(directory)
        theirs, weights = read_config(directory).model, read_weights(checkpoint)
        their_vocab_size = len(weights["embedding.weight"])
    else:
        raise BadInput(
            f"run.init_from = {path}: there is no run directory (with config.yaml), no checkpoint (step_...) and no "
            "Hugging Face directory (with config.json) there; models of the hub must be downloaded first"
        )
    flags = [
        f"--model.{knob}={str(getattr(theirs, what)).lower()}"
        for knob, what in compared(config).items()
        if getattr(theirs, what) != getattr(config, what)
    ]
    lines = [f"\n  the network differs; one that fits has {' '.join(flags)}"] if flags else []
    use_theirs = f"use its tokenizer, --data.tokenizer={directory}"
    if their_vocab_size != vocab_size:
        lines.append(f"\n  its vocabulary has {their_vocab_size:,} entries, the corpus {vocab_size:,}; {use_theirs}")
    known = tokenizer is not None and (directory / "tokenizer.json").is_file()
    if known and not lines and load_tokenizer(str(directory))[0].get_vocab() != tokenizer.get_vocab():  # type: ignore[union-attr]
        lines.append(f"\n  its vocabulary is as large as the corpus's, but the entries differ; {use_theirs}")
    if lines:
        raise BadInput(f"run.init_from = {path} cannot be the beginning of this run:" + "".join(lines))
    return {name: weight for name, weight in weights.items() if not name.startswith(AUXILIARY)}


def compared(config: Model) -> dict[str, str]:
    """The knobs in which two networks must agree to share weights, and where their resolved value is."""
    same = ("family", "n_layers", "d_model", "n_heads", "tie_embeddings", "norm_eps")
    own = "context_length" if config.family == "gpt2" else "rope_theta"
    resolved = {"n_kv_heads": "kv_heads", "head_dim": "head_width", "d_ff": "hidden_width"}
    return {knob: knob for knob in (*same, own)} | resolved


def run_of(path: Path) -> Path:
    """The run directory of a path that is one, or that is one of its checkpoints."""
    path = path.resolve()
    run = path.parent.parent if NAME.fullmatch(path.name) else path
    if not (run / "config.yaml").is_file():
        raise BadInput(f"{path} is neither a run directory (there is no config.yaml) nor one of its checkpoints")
    return run


def locate(path: Path) -> tuple[Path, Path]:
    """The run directory and a verified checkpoint of it: the one asked for, else the best, else the newest."""
    run = run_of(path)
    if NAME.fullmatch(path.resolve().name):
        problem = problem_of(path.resolve())
        if problem:
            raise BadInput(f"the checkpoint cannot be trusted: {problem}; use another one, or the whole run: {run}")
        return run, path.resolve()
    checkpoints = run / "checkpoints"
    best = best_of(run)
    if best is not None:
        problem = problem_of(best)
        if problem is None:
            return run, best
        if existing(checkpoints):
            warn(f"the best checkpoint cannot be trusted: {problem}; the newest one is taken")
    step, _ = newest(checkpoints)
    if step is None:
        raise BadInput(f"{run} has no checkpoint yet; train on, or choose another run")
    return run, directory_for(checkpoints, step)


def best_of(run: Path) -> Path | None:
    """Where best.json points, None if there is none or it makes no sense."""
    try:
        name = json.loads((run / "best.json").read_text())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run / "checkpoints" / name if isinstance(name, str) and NAME.fullmatch(name) else None


def has_average(checkpoint: Path) -> bool:
    """Whether a verified checkpoint holds averaged weights beside the raw ones."""
    return bool(entries_of(checkpoint, "average"))


def read_weights(checkpoint: Path, which: Weights = "best available") -> dict[str, Tensor]:
    """Weights of a verified checkpoint: by default the ones to use, which are the averaged ones if it has some."""
    if which == "average" and not has_average(checkpoint):
        raise BadInput(
            f"{checkpoint} has no averaged weights; use its raw ones, or train with --regularizers.ema_decay=0.999"
        )
    averaged = which == "average" or (which == "best available" and has_average(checkpoint))
    weights = read_tensors(checkpoint, "average" if averaged else "model")
    if "embedding.weight" not in weights:
        raise BadInput(f"{checkpoint} holds no embedding.weight: it is not a checkpoint of a GPT")
    return weights


# ---------------------------------------------------------------------------------------------- lists of runs


class Listed(BaseModel):
    """One member as ensemble.json lists it."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    run: str
    """A run directory, relative to where the program runs."""
    checkpoint: str = Field(pattern=r"^step_\d{8,}$")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the average is this over the sum of all."""

    @property
    def path(self) -> Path:
        """The checkpoint's directory."""
        return Path(self.run) / "checkpoints" / self.checkpoint


def list_members(paths: list[str]) -> list[Listed]:
    """The members that ``paths`` stand for: run directories (of which the best checkpoint is taken), checkpoints, and
    files as ``save_ensemble`` writes them. Raises BadInput for a path that is none of these."""
    found = []
    for path in map(Path, paths):
        if path.is_file():
            found += read_list(path)
            continue
        run, checkpoint = locate(path)
        here = Path.cwd()
        shown = run.relative_to(here) if run.is_relative_to(here) else run
        found.append(Listed(run=str(shown), checkpoint=checkpoint.name))
    return found


def read_list(path: Path) -> list[Listed]:
    """The members of an ensemble.json; raises BadInput if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        members = [Listed.model_validate(member) for member in content["members"]]
    except ValidationError as problem:
        raise BadInput(f"{path}: {all_errors(problem)}") from None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise BadInput(f"{path} is no list of members as scripts.evaluate --save writes it ({problem!r})") from None
    if not members:
        raise BadInput(f"{path} lists no members; give it some")
    return members
