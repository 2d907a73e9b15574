"""All that a training step changes: the model, its optimizers, the sum of its gradients, the averaged weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import BadInput, Config
from hardware import Hardware
from model.gpt import GPT
from regularizers.activations import STOCHASTIC, dropout_acts
from regularizers.averaging import WeightAverage
from regularizers.weights import weight_decay_at
from training import checkpoint
from training.gradients import GradientSum
from training.optimizer import (
    build_optimizers,
    decayed_parameters,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
    set_weight_decay,
)
from training.processes import my_micro_batches
from training.schedule import learning_rate_ratio
from training.teachers import Teacher


class Learner:
    """One model that is being trained; a checkpoint's tensors come from it and go back into it.

    Args:
        model: on the hardware's device.
        config: that of the run.
        hardware: with ``compile`` resolved.
        total_steps: the length of the run, on which the schedules depend.
        steps_per_epoch: in which a weight decay may be given.
        teachers: whose predictions are distilled.
    """

    def __init__(
        self,
        model: GPT,
        config: Config,
        hardware: Hardware,
        total_steps: int,
        steps_per_epoch: float,
        teachers: Sequence[Teacher] = (),
    ) -> None:
        training = config.training
        self.model, self.config, self.hardware, self.total_steps = model, config, hardware, total_steps
        model.uses_blocks = hardware.compile and hardware.device.type == "cuda"
        self.forward = torch.compile(model, dynamic=False) if hardware.compile else model
        self.teachers = [teacher.compiled() if hardware.compile else teacher for teacher in teachers]
        self.stochastic = [module for module in model.modules() if isinstance(module, STOCHASTIC)]
        self.optimizers = build_optimizers(model, config, steps_per_epoch)
        self.decayed = decayed_parameters(self.optimizers)
        self.gradients = GradientSum(model, hardware, training.micro_batches, training.deterministic == "strict")
        self.average = WeightAverage(config.regularizers, total_steps)
        self.micro_batches = my_micro_batches(hardware, training.micro_batches)

    def follow_schedules(self, step: int) -> float:
        """Set learning rates, weight decay and dropouts for the step with index ``step``; returns AdamW's rate."""
        ratio = learning_rate_ratio(self.config.schedule, step, self.total_steps)
        set_learning_rate(self.optimizers, ratio)
        decay_from = partial(weight_decay_at, self.config.regularizers, step, self.total_steps)
        set_weight_decay(self.optimizers, decay_from)
        # A dropout that does not act now is in evaluation mode. Evaluations put all modules into another mode and into
        # training mode again, so the mode is set for each step, and compiled code knows two of them.
        for module in self.stochastic:
            module.training = dropout_acts(self.config.regularizers, step, self.total_steps)
        return self.config.optimizer.lr * ratio

    def config_at(self, step: int) -> Config:
        """The config by which the step with index ``step`` trains: without token_dropout while dropouts do not act."""
        regularizers = self.config.regularizers
        if not regularizers.token_dropout or dropout_acts(regularizers, step, self.total_steps):
            return self.config
        return self.config.model_copy(update={"regularizers": regularizers.model_copy(update={"token_dropout": 0.0})})

    def tensors(self, step: int) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint after ``step`` steps holds, a safetensors file for each entry."""
        tensors = {"model": self.model.state_dict(), "optimizer": optimizer_state(self.optimizers)}
        return tensors | ({"average": self.average.weights} if self.average.count(step) else {})

    def load(self, path: Path, step: int, average_from: int = 0) -> None:
        """Go on from the checkpoint at ``path``, after ``step`` steps; raises BadInput when its tensors do not fit.

        ``average_from``: averaged weights count what is trained after this step, as in ``Progress``.
        """
        self.average.begins_after = average_from
        try:
            self.model.load_state_dict(checkpoint.read_tensors(path, "model"))
        except RuntimeError as problem:
            raise BadInput(
                f"{path / 'model.safetensors'} does not fit this model: {' '.join(str(problem).split())}; restore the "
                "checkpoint, the code that wrote it, or start afresh with --run.resume=never (what is there is moved "
                "aside)"
            ) from None
        load_optimizer_state(self.optimizers, checkpoint.read_tensors(path, "optimizer"))
        if self.average.count(step):
            self.average.load(checkpoint.read_tensors(path, "average"), self.model)
