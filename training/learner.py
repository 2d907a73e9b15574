"""All that a training step changes: the model, its optimizers, the sum of its gradients, the averaged weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import BadInput, Config
from hardware import Hardware
from model.gpt import GPT
from regularizers.activations import STOCHASTIC, dropout_acts
from regularizers.averaging import WeightAverage
from regularizers.weights import sparsity, weight_decay_at
from training import checkpoint
from training.gradients import gradient_sum
from training.layout import Layout
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
        model: which is laid out over the processes, on the hardware's device.
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
        self.forward = model.compiled(hardware.compiles_blocks) if hardware.compile else model
        self.layout = Layout(model, hardware)
        in_blocks = hardware.compiles_blocks
        self.teachers = [teacher.compiled(in_blocks) if hardware.compile else teacher for teacher in teachers]
        self.stochastic = [module for module in model.modules() if isinstance(module, STOCHASTIC)]
        self.optimizers = build_optimizers(self.layout, config, steps_per_epoch)
        self.decayed = decayed_parameters(self.optimizers)
        self.gradients = gradient_sum(self.layout, training.micro_batches, training.deterministic == "strict")
        self.average = WeightAverage(config.regularizers, total_steps)
        self.micro_batches = my_micro_batches(hardware, training.micro_batches)
        self.steps_computed = 0  # since this start, up to where a step waits for the other processes

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

    def tensors(self, step: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """All that a checkpoint after ``step`` steps holds: the name of each safetensors file, and whole tensors.

        Where processes share the model, all of them ask for each file together; it is gathered in the main memory of
        the main process, and the others get an empty one. A model too large for that (``Layout.saves_rows``) has a
        file of each process.
        """
        yield self._file("model", self.layout.weights)
        yield self._file("optimizer", optimizer_state(self.optimizers))
        if self.average.count(step):
            yield self._file("average", self.average.weights)

    def _file(self, name: str, held: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        layout = self.layout
        if layout.saves_rows:
            return checkpoint.file_of_rows(name, layout.part, layout.parts), dict(held)
        return name, dict(held) if layout.parts == 1 else layout.gathered(held)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], path: Path) -> None:
        """Give the model these whole tensors, read from ``path``; raises BadInput when they do not fit it."""
        self.layout.release()
        left = set(self.layout.shapes)
        for name, tensor in weights:
            if self.layout.shapes.get(name) != tensor.shape:
                raise misfit(path, [name])
            self.layout.weights[name].copy_(self.layout.part_of(tensor))
            left.remove(name)
        if left:
            raise misfit(path, sorted(left))

    def load(self, path: Path, step: int, average_from: int = 0) -> None:
        """Go on from the checkpoint at ``path``, after ``step`` steps; raises BadInput when its tensors do not fit.

        ``average_from``: averaged weights count what is trained after this step, as in ``Progress``.
        """
        self.average.begins_after = average_from
        self.load_weights(checkpoint.each_tensor(path, "model"), path / "model.safetensors")
        load_optimizer_state(self.optimizers, self._parts(path, "optimizer"))
        if self.average.count(step):
            device = self.hardware.device
            self.average.weights = {name: part.to(device) for name, part in self._parts(path, "average").items()}

    def _parts(self, path: Path, file: str) -> dict[str, Tensor]:
        return {name: self.layout.part_of(whole).clone() for name, whole in checkpoint.each_tensor(path, file)}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its averaged weights inside this context, and its own, bit for bit, after it."""
        self.layout.release()
        with self.average.in_place_of(self.layout.weights):
            yield
            self.layout.release()

    def held_bytes(self) -> int:
        """Memory of the weights, gradients and moments of this process."""
        moments = optimizer_state(self.optimizers).values()
        return sum(2 * weight.nbytes for weight in self.layout.weights.values()) + sum(part.nbytes for part in moments)

    def sparsity(self) -> dict[str, float]:
        """The share of small elements in each tensor on which penalties act; computed by all processes together."""
        return sparsity({name: self.layout.whole(name, weight) for name, weight in self.decayed.items()})


def misfit(path: Path, names: list[str]) -> BadInput:
    """What to tell of tensors that a file has in another shape, or lacks."""
    return BadInput(
        f"{path} does not fit this model in {', '.join(names[:3])}{' and more' if names[3:] else ''}; restore the "
        "checkpoint, the code that wrote it, or start afresh with --run.resume=never (what is there is moved aside)"
    )
