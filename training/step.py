"""Forward and backward of one micro-batch, with every regularizer that acts in them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from config import Config
from data.loader import Batch
from model.gpt import GPT
from randomness import seed_activations
from regularizers.inputs import draw_changes, replace_tokens
from regularizers.objective import objective
from training.distributed import Hardware


def differentiate(
    batch: Batch,
    place: tuple[int, int, int],
    model: GPT,
    forward: Callable[..., Tensor],
    config: Config,
    targets_in_step: int,
    hardware: Hardware,
) -> dict[str, Tensor]:
    """Add the gradients of one micro-batch to ``.grad``; returns the objective and its terms (see ``objective``).

    Args:
        batch: on the model's device.
        place: seed, step and global micro-batch, on which all the randomness depends.
        forward: the model, compiled or not.
        targets_in_step: over all micro-batches and processes; the gradients of a step are those of its mean.
    """
    regularizers = config.regularizers
    seed_activations(*place)
    tokens_BT = replace_tokens(batch.tokens_BT, regularizers.token_replacement, model.vocab_size, *place)
    changes = draw_changes((*tokens_BT.shape, config.model.d_model), regularizers, *place, hardware.device)
    with hardware.autocast():
        hidden_BTD = forward(tokens_BT, batch.positions_BT, batch.documents_BT, changes=changes)
    terms = objective(
        hidden_BTD.flatten(0, 1).to(hardware.dtype),
        model.output_weight,
        batch.targets_BT.flatten(),
        regularizers,
        targets_in_step,
        mixed=changes.mixed_targets(batch.targets_BT) if changes else None,
    )
    terms["objective"].backward()
    return terms
