"""One optimizer step: forward and backward of each micro-batch, the sum, the update, the average.

This is the only definition of a step: train.py takes it, the benchmark times it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from config import Config
from data.loader import Batch, Batches, fingerprint
from hardware import Hardware
from model.gpt import GPT
from randomness import seed_activations
from regularizers.inputs import Readings, draw_changes, draw_readings, mask_inputs, replace_tokens
from regularizers.objective import PLAIN, multi_token_terms, objective
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
    """The objective and its terms, means over the step's targets (see regularizers.objective); ``loss`` is that of the
    sequences that are read as usual, and missing when there is none."""
    gradient_norm: float
    """Of the whole gradient, penalties included, before it was clipped."""
    learning_rate: float
    preempted: bool
    """Whether a process was told to stop."""
    samples: int
    """A fingerprint of the samples that this process trained on."""
    seconds: float
    loss_scale: float | None = None
    """fp16: what the loss was multiplied by."""
    save_due: bool = False
    """Whether a process's clock asks for a checkpoint."""
    is_spike: bool = False

    @property
    def is_finite(self) -> bool:
        """Whether the gradient was finite; if not, the step changed nothing."""
        return math.isfinite(self.gradient_norm)


def training_step(
    learner: Learner,
    batches: Batches,
    step: int,
    signals: StopSignals | None = None,
    loss_scale: float = 2.0**16,
    save_due: bool = False,
) -> StepResult:
    """Train on this process's micro-batches of the step with index ``step``, the next ones of ``batches``.

    ``loss_scale``, a power of two, matters in fp16 alone. ``save_due``: whether this process's clock asks for a
    checkpoint, which all processes must hear of.
    """
    started, config, model = time.perf_counter(), learner.config_at(step), learner.model
    training, names = config.training, list[str]()
    learning_rate, samples = learner.follow_schedules(step), 0
    scale = loss_scale if learner.hardware.precision == "fp16" else None
    for micro_batch in learner.micro_batches:
        batch = batches.current
        first = step * training.global_batch_size + micro_batch * training.micro_size
        samples += fingerprint(first, batch.sample_ids_B)
        key = (config.run.seed, step, micro_batch)
        last = learner.gradients.expect_last_pass if micro_batch == learner.micro_batches[-1] else None
        taught, factor = learner.teachers, scale or 1.0
        terms = differentiate(batch, key, model, learner.forward, config, learner.hardware, taught, last, factor)
        # What is summed along with the gradients: the loss terms, and what this process alone knows.
        names = sorted(terms)
        votes_2 = terms["objective"].new_tensor([bool(signals and signals.received), save_due])
        values_N = torch.cat([torch.stack([terms[name].detach() for name in names]), votes_2])
        inject_fault("gradient", step + 1, [values_N, *learner.layout.gradients()])
        learner.gradients.add(micro_batch, values_N)
        batches.advance()  # while a GPU still computes: nothing has waited for it yet
    learner.steps_computed += 1
    learner.gradients.finish()
    if scale is not None:
        gradients = (weight.grad for weight in learner.layout.weights.values())
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], 1 / scale)
    add_penalty_gradients(learner.decayed.values(), config.regularizers)
    norm, sums_N = learner.gradients.norm_and_values()
    clip_gradients(learner.layout.weights.values(), config.optimizer.grad_clip, norm)
    gradient_norm, *sums, stops, saves = torch.cat([norm[None], sums_N]).tolist()  # the step's only synchronisation
    for optimizer in learner.optimizers:
        if math.isfinite(gradient_norm):  # if not, nothing changes, on no process: it is summed, so all see the same
            update_weights(optimizer, config.regularizers)
        optimizer.zero_grad(set_to_none=True)
    learner.average.update(learner.layout.weights, step + 1)
    inject_fault("weights", step + 1, learner.layout.weights.values())
    sums_by_name = dict(zip(names, sums, strict=True))
    seconds = time.perf_counter() - started
    return StepResult(sums_by_name, gradient_norm, learning_rate, stops > 0, samples, seconds, scale, saves > 0)


def differentiate(
    batch: Batch,
    key: tuple[int, int, int],
    model: GPT,
    forward: Callable[..., Tensor],
    config: Config,
    hardware: Hardware,
    teachers: Sequence[Teacher] = (),
    before_last_pass: Callable[[], None] | None = None,
    scale: float = 1.0,
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
        before_last_pass: what to call before the last of the backward passes.
        scale: the gradients are multiplied by it, the terms returned are not. A power of two changes no digit of them.
    """
    regularizers, (seed, step, micro_batch), compiled = config.regularizers, key, hardware.compile
    step_readings = draw_readings(regularizers, config.training.global_batch_size, seed, step)
    n_targets, n_ordinary = count_targets(step_readings, config)
    per_target, per_ordinary = n_targets / scale, max(1, n_ordinary) / scale
    batch, readings = as_read(batch, step_readings, micro_batch)
    tokens_BT = replace_tokens(batch.tokens_BT, regularizers.token_replacement, model.vocab_size, *key)
    changes = draw_changes((*tokens_BT.shape, config.model.d_model), regularizers, *key, hardware.device, readings)
    taught = predictions(teachers, batch, changes, hardware)
    seed_activations(*key)
    with hardware.autocast():
        hidden_BTD = forward(tokens_BT, batch.positions_BT, batch.documents_BT, changes=changes)
    hidden_BTD, targets_BT = hidden_BTD.to(hardware.dtype), batch.targets_BT
    mixed = changes.mixed_targets(targets_BT) if changes else None
    ordinary_BT = None if readings is None else readings.ordinary_B[:, None].expand_as(tokens_BT) / per_ordinary
    terms = objective(
        hidden_BTD.flatten(0, 1),
        model.output_weight,
        targets_BT.flatten(),
        regularizers,
        per_target,
        mixed=mixed,
        ordinary_N=None if ordinary_BT is None else ordinary_BT.flatten(),
        taught=taught,
        compiled=compiled,
    )
    n_after_next = max(1, n_targets - config.training.global_batch_size) / scale
    second = multi_token_terms(
        hidden_BTD, model.auxiliary, model.output_weight, targets_BT, regularizers, n_after_next, mixed, compiled
    )
    for name, term in second.items():
        terms[name] = terms[name] + term if name in terms else term
    masked = mask_inputs(changes, (len(tokens_BT), tokens_BT.shape[1]), regularizers, *key, hardware.device)
    if masked is None and before_last_pass:
        before_last_pass()
    terms["objective"].backward()
    if masked is not None:  # the same again, after the first pass has freed its memory
        seed_activations(*key, purpose="activations of the masked pass")
        with hardware.autocast():
            hidden_BTD = forward(tokens_BT, batch.positions_BT, batch.documents_BT, changes=masked)
        hidden_ND = hidden_BTD.flatten(0, 1).to(hardware.dtype)
        targets_N = targets_BT.flatten()
        again = objective(hidden_ND, model.output_weight, targets_N, PLAIN, per_target, mixed, compiled=compiled)
        weighted = regularizers.masked_input_weight * again["objective"]
        if before_last_pass:
            before_last_pass()
        weighted.backward()
        terms["objective"] = terms["objective"].detach() + weighted.detach()
        terms["masked_input_loss"] = again["loss"]
    if not n_ordinary:  # on no process: the step has no plain loss
        del terms["loss"]
    return terms if scale == 1 else {name: term / scale for name, term in terms.items()}


def as_read(batch: Batch, step_readings: Readings | None, micro_batch: int) -> tuple[Batch, Readings | None]:
    """The batch of one micro-batch as its sequences are read, and how that is, on the batch's device."""
    if step_readings is None:
        return batch, None
    size = len(batch.tokens_BT)
    readings = step_readings.of(micro_batch * size, size, batch.tokens_BT.device)
    tokens_BT, targets_BT, positions_BT, documents_BT = readings.apply(
        batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.documents_BT
    )
    return Batch(tokens_BT, targets_BT, positions_BT, documents_BT, batch.sample_ids_B), readings


def count_targets(step_readings: Readings | None, config: Config) -> tuple[int, int]:
    """The targets of the whole step, and those of its ordinary sequences, over all micro-batches and processes."""
    if step_readings is None:
        return config.tokens_per_step, config.tokens_per_step
    targets_B = step_readings.targets_B(config.model.context_length, config.data.isolate_documents)
    return int(targets_B.sum()), int(targets_B[step_readings.ordinary_B].sum())
