"""A training step of wellposed as train.py takes it, on made-up tokens: what the benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, repeat
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.opponents import Shape
from config import Config, Regularizers
from data.loader import Batch, Batches
from hardware import resolve, resolve_compile
from model.gpt import GPT
from training.learner import Learner
from training.step import training_step
from training.teachers import Teacher

STEPS = 1000  # of the run whose first steps are timed
DROPOUT = {f"{place}_dropout": 0.2 for place in ("embedding", "attention", "residual")}  # where GPT-2 has it


def everything_on(**changes: Any) -> dict[str, Any]:
    """Every regularizer that acts in a step at its typical value; three are left out.

    SWA excludes EMA, weight_decay_epochs weight_decay, and distillation is another model's cost.
    """
    knobs = {}
    for name, field in Regularizers.model_fields.items():
        extra: Any = field.json_schema_extra
        left_out = name in ("swa_start", "weight_decay_epochs", "distillation_weight")
        if extra["kind"] not in ("stopping", "modifier") and not left_out:
            knobs[name] = extra["typical"]
    return knobs | changes


def our_step(
    shape: Shape, precision: str, regularizers: dict[str, Any], compile: str = "off", **model: Any
) -> Callable[[Tensor, Tensor], Any]:
    """``step(tokens_BT, targets_BT)``: forward, backward, clip, optimizer, average, as train.py does them.

    With distillation its teacher is as large as the model.
    """
    sizes = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads}
    distilled = bool(regularizers.get("distillation_weight"))
    config = Config.model_validate(
        {
            "model": {"family": "gpt2", "context_length": shape.context, **sizes, **model},
            "training": {"global_batch_size": shape.batch, "max_steps": STEPS},
            "schedule": {"name": "constant", "warmup_steps": 0},
            "regularizers": regularizers,
            "run": {"precision": precision, "compile": compile, "teachers": ["itself"] * distilled},
        }
    )
    hardware = resolve(config.run, fast=config.training.deterministic == "fast")
    network = GPT(config.model, shape.vocab_size, config.regularizers).initialize(0).to(hardware.device)
    hardware = resolve_compile(hardware, config, {}, network.count_parameters(), STEPS)
    teachers = []
    if distilled:
        teacher = GPT(config.model, shape.vocab_size).initialize(1).to(hardware.device).eval().requires_grad_(False)
        teachers = [Teacher(teacher, teacher, 1.0, {})]
    learner = Learner(network, config, hardware, STEPS, STEPS, teachers)
    steps = count()

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        batch = Batch(tokens_BT, targets_BT, None, None, np.arange(len(tokens_BT)))
        return training_step(learner, Batches(repeat(batch), hardware.device), next(steps)).terms["objective"]

    return step
