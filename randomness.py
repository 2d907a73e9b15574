"""The only source of randomness.

Every draw in wellposed is made by a generator whose seed is a function of the run's seed, of what the
draw is for, and of where in the run it happens (epoch, step, global micro-batch). Nothing depends on
what was drawn before, so no generator state is ever saved, and neither a resume nor the number of
processes changes a single draw. Another model of GPU does: see ``seed_activations``.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


def seed_for(seed: int, purpose: str, *indices: int) -> int:
    """A seed in [0, 2^63) for one purpose at one place of the run.

    Different purposes and indices give unrelated seeds (BLAKE2b of all of them), so seed 0 in epoch 2 has
    nothing in common with seed 1 in epoch 1. ``indices`` are integers such as epoch, step, micro-batch.
    """
    text = "\x1f".join([str(int(seed)), purpose, *(str(int(index)) for index in indices)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_generator(seed: int, purpose: str, *indices: int) -> numpy.random.Generator:
    """A NumPy generator (Philox, whose stream is the same on every platform) for data order."""
    import numpy

    return numpy.random.Generator(numpy.random.Philox(seed_for(seed, purpose, *indices)))


def torch_generator(seed: int, purpose: str, *indices: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator on ``device``, for draws that do not go through the model (initialisation, sampling)."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_for(seed, purpose, *indices))


def seed_activations(seed: int, step: int, micro_batch: int, purpose: str = "activations") -> None:
    """Seed torch's own generators for the random activations of one global micro-batch.

    Dropout inside the model draws from torch's default generators, in eager and compiled form and inside
    fused attention kernels alike; seeding them here, by global micro-batch and never by rank, is what makes
    the masks of a run independent of the number of processes. What a seed gives is up to the device: CPUs draw
    the same numbers everywhere, but a GPU's depend on its model, too (on how many multiprocessors it has).
    """
    import torch

    number = seed_for(seed, purpose, step, micro_batch)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():
        torch.manual_seed(number)
    else:  # torch.manual_seed would note every call for a GPU that is never used, 0.4 ms and a little memory each time
        torch.default_generator.manual_seed(number)
