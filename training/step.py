"""One optimizer step: forward and backward of each micro-batch, the sum, the update, the average.

This is the only definition of a step: train.py takes it, the benchmark times it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from config import Config
from data.loader import Batch, Batches, fingerprint
from hardware import Hardware
from model.gpt import GPT
from randomness import seed_activations
from regularizers.inputs import draw_changes, replace_tokens
from regularizers.objective import objective
from regularizers.weights import add_penalty_gradients, update_weights
from training.faults import inject_fault
from training.learner import Learner
from training.optimizer import clip_gradients
from training.signals import StopSignals
from training.teachers import Teacher, predictions


@dataclass
class StepResult:
    """What a step came to; all but ``samples`` and ``seconds`` are the same on every process."""

    terms: dict[str, float]
    """The objective and its terms, means over the step's targets (see regularizers.objective)."""
    gradient_norm: float
    """Of the whole gradient, penalties included, before it was clipped."""
    learning_rate: float
    preempted: bool
    """Whether a process was told to stop."""
    samples: int
    """A fingerprint of the samples that this process trained on."""
    seconds: float
    is_spike: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was finite; if not, the step changed nothing."""
        return math.isfinite(self.gradient_norm)


def training_step(learner: Learner, batches: Batches, step: int, signals: StopSignals | None = None) -> StepResult:
    """Train on this process's micro-batches of the step with index ``step``, the next ones of ``batches``."""
    started, config, model = time.perf_counter(), learner.config_at(step), learner.model
    training, names = config.training, list[str]()
    learning_rate, samples = learner.follow_schedules(step), 0
    for micro_batch in learner.micro_batches:
        batch = batches.current
        first = step * training.global_batch_size + micro_batch * training.micro_size
        samples += fingerprint(first, batch.sample_ids_B)
        key = (config.run.seed, step, micro_batch)
        terms = differentiate(batch, key, model, learner.forward, config, learner.hardware, learner.teachers)
        inject_fault("gradient", step + 1, chain(terms.values(), (weight.grad for weight in model.parameters())))
        # What is summed along with the gradients: the loss terms, and whether this process was told to stop.
        names = sorted(terms)
        vote = terms["objective"].new_full((), bool(signals and signals.received))
        learner.gradients.add(micro_batch, torch.stack([*(terms[name].detach() for name in names), vote]))
        batches.advance()  # while a GPU still computes: nothing has waited for it yet
    sums_N = learner.gradients.total()
    add_penalty_gradients(learner.decayed.values(), config.regularizers)
    norm = clip_gradients(model, config.optimizer.grad_clip)
    gradient_norm, *sums, votes = torch.cat([norm[None], sums_N]).tolist()  # the step's only synchronisation
    for optimizer in learner.optimizers:
        if math.isfinite(gradient_norm):  # if not, nothing changes, on no process: it is summed, so all see the same
            update_weights(optimizer, config.regularizers)
        optimizer.zero_grad(set_to_none=True)
    learner.average.update(model, step + 1)
    inject_fault("weights", step + 1, model.parameters())
    sums_by_name = dict(zip(names, sums, strict=True))
    return StepResult(sums_by_name, gradient_norm, learning_rate, votes > 0, samples, time.perf_counter() - started)


def differentiate(
    batch: Batch,
    key: tuple[int, int, int],
    model: GPT,
    forward: Callable[..., Tensor],
    config: Config,
    hardware: Hardware,
    teachers: Sequence[Teacher] = (),
) -> dict[str, Tensor]:
    """Add the gradients of one micro-batch to ``.grad``; returns the objective and its terms (see ``objective``).

    Args:
        batch: on the model's device.
        key: seed, step and global micro-batch, on which all the randomness depends.
        model: whose parameters get the gradients.
        forward: the model, compiled or not.
        config: that of the run; the gradients of a step are those of the mean over all of its tokens.
        hardware: the precision in which the model runs.
        teachers: whose predictions are distilled.
    """
    regularizers = config.regularizers
    seed_activations(*key)
    tokens_BT = replace_tokens(batch.tokens_BT, regularizers.token_replacement, model.vocab_size, *key)
    changes = draw_changes((*tokens_BT.shape, config.model.d_model), regularizers, *key, hardware.device)
    taught = predictions(teachers, batch, changes, hardware)
    with hardware.autocast():
        hidden_BTD = forward(tokens_BT, batch.positions_BT, batch.documents_BT, changes=changes)
    terms = objective(
        hidden_BTD.flatten(0, 1).to(hardware.dtype),
        model.output_weight,
        batch.targets_BT.flatten(),
        regularizers,
        config.tokens_per_step,
        mixed=changes.mixed_targets(batch.targets_BT) if changes else None,
        taught=taught,
    )
    terms["objective"].backward()
    return terms
