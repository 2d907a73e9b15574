"""What a step adds up, in which order, and what it leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from command_line import parse
from data.loader import TrainingLoader
from data.prepare import prepare
from data.shards import Corpus
from hardware import Hardware
from model.gpt import GPT
from training.gradients import insert, merged
from training.learner import Learner
from training.step import training_step


class Sum(str):
    """A sum that shows in which order it was formed."""

    def __add__(self, other: str) -> Sum:
        return Sum(f"({self}+{other})")


@pytest.mark.parametrize(
    ("leaves", "expected"), [(1, "0"), (2, "(0+1)"), (5, "(((0+1)+(2+3))+4)"), (6, "(((0+1)+(2+3))+(4+5))")]
)
def test_the_tree_is_the_same_however_its_leaves_are_shared_out(leaves: int, expected: str) -> None:
    order = random.Random(0)
    for share in range(1, leaves + 1):
        nodes: dict[tuple[int, int], Sum] = {}
        for first in range(0, leaves, share):  # each process adds what it can, then all meet
            own: dict[tuple[int, int], Sum] = {}
            for leaf in range(first, min(first + share, leaves)):
                insert(own, (0, leaf), Sum(leaf), leaves)
            nodes |= own
        shuffled = dict(order.sample(list(nodes.items()), len(nodes)))
        assert list(merged(shuffled, leaves).values()) == [expected]


def test_a_gradient_that_is_not_finite_changes_nothing(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights, the moments and the count of steps are those of the step before, and the next step goes on."""
    config = parse(tiny(training__micro_batch_size=4))
    corpus = Corpus.open(prepare(config.data, tmp_path, quiet=True))
    loader = TrainingLoader(corpus.split("train"), config.data, 0, 32, 8)
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    learner = Learner(GPT(config.model, corpus.vocab_size, config.regularizers).initialize(0), config, hardware, 5, 5)
    batches = loader.batches(range(5), learner.micro_batches, 4, hardware.device)

    def step(number: int) -> tuple[bool, dict[str, torch.Tensor]]:
        finite = training_step(learner, batches, number).is_finite
        tensors = learner.tensors(number + 1)
        return finite, {f"{file}/{name}": value.clone() for file in tensors for name, value in tensors[file].items()}

    monkeypatch.setenv("WELLPOSED_FAULT", "gradient:0:2:nan")
    (_, first), (second_is_finite, second), (third_is_finite, third) = map(step, range(3))
    assert not second_is_finite and all(torch.equal(first[name], second[name]) for name in first)
    assert third_is_finite and not any(torch.equal(second[name], third[name]) for name in second)
