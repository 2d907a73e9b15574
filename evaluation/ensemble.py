"""Ensembles: several models whose probabilities, never their logits, are averaged (Kim 2025, 2509.14786).

The loss of the average is at most the average of the losses, as -log is convex. What the members know that the others
do not is told by the mutual information, entropy of the mean minus mean of the entropies: their diversity.

Shape suffixes: N tokens of a batch, R tokens of one chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import BadInput, Config
from data.loader import EvaluationBatches
from data.shards import Corpus, Split
from evaluation.evaluate import Sums, hidden_states, in_chunks
from evaluation.uncertainty import Mixture, entropy
from files import write_json
from hardware import Hardware
from model.gpt import GPT
from tracking.load_run import Listed, load_model, run_of
from tracking.run_directory import read_summary


class Member(NamedTuple):
    """One model of an ensemble, in evaluation mode, with its weight and the config of its run."""

    model: GPT
    weight: float
    config: Config


# ---------------------------------------------------------------------------------------------- the members


def check_members(listed: list[Listed]) -> None:
    """Raises BadInput, naming them, when two members do not share tokenizer and corpus: their tokens differ."""
    for what in ("tokenizer", "corpus"):
        values = {member.run: read_summary(run_of(member.path)).get(what) for member in listed}
        first, theirs = next(iter(values.items()))
        for run, value in values.items():
            if run != first and (value is None or value != theirs):
                raise BadInput(
                    f"{run} and {first} cannot be averaged: the {what} of one is {value}, that of the other {theirs}; "
                    "take runs of one corpus"
                )


def load_members(listed: list[Listed], device: torch.device | str = "cpu") -> list[Member]:
    """The models, all in memory; of averaged weights where there are some. Raises BadInput if they do not fit."""
    check_members(listed)
    members = []
    for entry in listed:
        model, config, _ = load_model(entry.path, device)
        members.append(Member(model, entry.weight, config))
    return members


# ---------------------------------------------------------------------------------------------- their evaluation


@dataclass(frozen=True)
class Scores:
    """What an ensemble is worth on one split: means over all targets, in nats per token."""

    members: list[float]
    """The loss of each member alone."""
    after: list[dict[str, float]]
    """For the first 1, 2, … all members the metrics of their mean probability, as ``evaluate`` has them (but ``log_z``:
    a mean of probabilities has no logits), ``gain`` (the mean of their losses minus ``loss``), ``expected_entropy`` and
    ``mutual_information``."""


def evaluate_listed(
    listed: list[Listed], hardware: Hardware, corpus: Corpus, splits: list[str], max_tokens: int | None = None
) -> dict[str, Scores]:
    """The Scores of the members on each of these splits of their corpus, or on its first ``max_tokens`` tokens."""
    members = load_members(listed, hardware.device)
    return {name: evaluate_ensemble(members, corpus, name, hardware, max_tokens) for name in splits}


@torch.no_grad()
def evaluate_ensemble(
    members: list[Member], corpus: Corpus, split: str, hardware: Hardware, max_tokens: int | None = None
) -> Scores:
    """The Scores of ``members`` on a split of their corpus, each reading it in windows of its own context length.

    Memory: hidden states of one batch of each member and a few chunks of logits, however many members there are.
    Every process computes all of it.
    """
    text, tallies = corpus.split(split), [Tally(hardware.device) for _ in members]
    weights_VD = [member.model.output_weight.to(hardware.dtype) for member in members]
    with tqdm(desc=f"ensemble, {split}", unit="token", unit_scale=True, disable=None, leave=False) as bar:
        for hidden, target_N in in_step([read(member, text, max_tokens, hardware) for member in members]):
            chunks = [in_chunks(hidden_ND, target_N, corpus.vocab_size) for hidden_ND in hidden]
            for parts in zip(*chunks, strict=True):
                mixture = Mixture(parts[0][1])
                for member, (hidden_RD, _), weight_VD, tally in zip(members, parts, weights_VD, tallies, strict=True):
                    mixture.add((hidden_RD @ weight_VD.T).float(), member.weight)
                    tally.add(mixture)
            bar.update(len(target_N))
    losses = [tally.mean("member") for tally in tallies]
    weights = [member.weight for member in members]
    bytes_per_token, after = corpus.bytes_per_token(text, max_tokens), []
    for count, tally in enumerate(tallies, 1):
        alone = sum(weight * loss for weight, loss in zip(weights[:count], losses[:count], strict=True))
        entropies = {name: tally.mean(name) for name in ("expected_entropy", "mutual_information")}
        metrics, _ = tally.sums.metrics(hardware, bytes_per_token)
        del metrics["log_z"]
        after.append(metrics | {"gain": alone / sum(weights[:count]) - metrics["loss"]} | entropies)
    return Scores(losses, after)


class Tally:
    """What is added up over all tokens for the mean of the first few members."""

    def __init__(self, device: torch.device) -> None:
        self.sums = Sums(device)
        self.totals = {"member": 0.0, "expected_entropy": 0.0, "mutual_information": 0.0}

    def add(self, mixture: Mixture) -> None:
        """Take in one chunk of tokens, with these members mixed."""
        p_RV, expected_R = mixture.p_RV, mixture.expected_entropy_R
        entropy_R = entropy(p_RV)
        on_device = (mixture.nll_R.to(p_RV), entropy_R.to(p_RV), torch.zeros_like(p_RV[:, 0]))
        self.sums.add(p_RV, mixture.target_R, *on_device)
        self.totals["member"] += float(mixture.last_nll_R.sum())
        self.totals["expected_entropy"] += float(expected_R.sum())
        # Not below 0 for any token but by rounding: it is a difference of fp32 sums.
        self.totals["mutual_information"] += float((entropy_R - expected_R).clamp(min=0).sum())

    def mean(self, name: str) -> float:
        """The mean over all tokens of one of the totals."""
        return self.totals[name] / float(self.sums.totals[0])


def read(member: Member, split: Split, max_tokens: int | None, hardware: Hardware) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states (N, D) and targets (N,) of all tokens in their order, a batch at a time."""
    config = member.config
    sizes = config.model.context_length, config.training.micro_size, max_tokens, config.data.isolate_documents
    batches = EvaluationBatches(split, *sizes)
    for index in range(len(batches)):
        batch = batches.batch(index).to(hardware.device)
        yield hidden_states(member.model, batch, hardware).flatten(0, 1), batch.targets_BT.flatten()


def in_step(streams: list[Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The hidden states of all streams for the same next tokens, and these tokens, whatever portions each gives."""
    waiting = [next(stream) for stream in streams]
    while True:
        count = min(len(target_N) for _, target_N in waiting)
        yield [hidden_ND[:count] for hidden_ND, _ in waiting], waiting[0][1][:count]
        for index, (hidden_ND, target_N) in enumerate(waiting):
            rest = (hidden_ND[count:], target_N[count:]) if len(target_N) > count else next(streams[index], None)
            if rest is None:  # all streams have the same targets, so that all end here
                return
            waiting[index] = rest


def save_ensemble(path: Path, listed: list[Listed], results: dict[str, Any]) -> None:
    """Write ensemble.json: the members, and ``results`` beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"members": [member.model_dump() for member in listed], **results})
