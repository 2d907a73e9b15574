"""A training step of wellposed as train.py takes it, on made-up tokens: what the benchmark times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.opponents import Shape
from config import Config, Regularizers
from data.loader import Batch
from model.gpt import GPT
from regularizers.averaging import WeightAverage
from regularizers.weights import add_penalty_gradients
from training.distributed import decide_compile, start
from training.gradients import GradientSum
from training.optimizer import build_optimizers, clip_gradients, decayed_parameters
from training.step import differentiate

DROPOUT = {f"{place}_dropout": 0.2 for place in ("embedding", "attention", "residual")}  # where GPT-2 has it


def everything_on(**changes: Any) -> dict[str, Any]:
    """Every regularizer that acts in a step at its typical value; SWA excludes EMA, and is left out."""
    knobs = {}
    for name, field in Regularizers.model_fields.items():
        extra: Any = field.json_schema_extra
        if extra["kind"] not in ("stopping", "modifier") and name != "swa_start":
            knobs[name] = extra["typical"]
    return knobs | changes


def our_step(
    shape: Shape, precision: str, regularizers: dict[str, Any], compile: str = "off", **model: Any
) -> Callable[[Tensor, Tensor], Any]:
    """``step(tokens_BT, targets_BT)``: forward, backward, clip, optimizer, average, as train.py does them."""
    sizes = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads}
    config = Config.model_validate(
        {
            "model": {"family": "gpt2", "context_length": shape.context, **sizes, **model},
            "training": {"global_batch_size": shape.batch, "max_steps": 1000},
            "regularizers": regularizers,
            "run": {"precision": precision, "compile": compile},
        }
    )
    hardware = start(config.run)
    network = GPT(config.model, shape.vocab_size, config.regularizers).initialize(0).to(hardware.device)
    hardware = decide_compile(hardware, config, {}, network.count_parameters(), 1000)
    optimizers = build_optimizers(network, config)
    average = WeightAverage(config.regularizers, 1000)
    gradients = GradientSum(network, hardware, 1, strict=False)
    forward = torch.compile(network, dynamic=False) if hardware.compile else network
    steps = count()

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> float:
        number = next(steps)
        batch = Batch(tokens_BT, targets_BT, None, None, np.arange(len(tokens_BT)))
        terms = differentiate(batch, (0, number, 0), network, forward, config, shape.tokens, hardware)
        gradients.add(0, torch.stack([terms[name].detach() for name in sorted(terms)]))
        sums_N = gradients.total()
        add_penalty_gradients(decayed_parameters(optimizers).values(), config.regularizers)
        norm = clip_gradients(network, config.optimizer.grad_clip)
        told = torch.cat([norm[None], sums_N]).tolist()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(network, number)
        return float(told[1 + sorted(terms).index("objective")])

    return step
