"""What a model takes, told before it is there, and how many sequences at once a device has the memory for."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from config import BadInput, Config, Model
from hardware import Hardware, estimated_seconds
from model.gpt import GPT
from randomness import seed_activations

USED = 0.8  # of the memory at most: memory is handed out in pieces, and others want some
COPIES = 5  # of the weights: themselves, their gradients, two moments, and an average or gradients on their way


def build(config: Config, hardware: Hardware, vocab_size: int, total_steps: int) -> GPT:
    """The model of a run with its initial weights, on the CPU; tells how large it is and what the run takes.

    Raises BadInput, before anything is allocated, when the weights and what has their size do not fit.
    """
    here, in_blocks, others = memory_of(hardware), *sizes_of_matrices(config.model, vocab_size)
    if (needs := COPIES * 4 * (in_blocks + others) // hardware.parts) > here:
        other = f"model.n_layers={config.model.n_layers}" if in_blocks > others else f"the vocabulary of {vocab_size:,}"
        raise BadInput(
            f"a model of {in_blocks + others:,} parameters needs {told(needs, here)} of {hardware.device}; "
            f"lower model.d_model={config.model.d_model} or {other}"
        )
    model = GPT(config.model, vocab_size, config.regularizers)
    if hardware.main:
        parameters = model.count_parameters()
        seconds = estimated_seconds(hardware, config, parameters, total_steps)
        time = f"; roughly {seconds / 60:,.0f} minutes" if hardware.device.type == "cpu" and seconds > 90 else ""
        memory = told(COPIES * 4 * parameters // hardware.parts, here)
        print(f"model      {config.model.family}, {parameters:,} parameters: {memory}{time}", flush=True)
    return model.initialize(config.run.seed)


def told(needs: int, here: int) -> str:
    """So much memory of what there is, in words."""
    return f"{needs / 1e9:,.{2 * (needs < 1e10)}f} GB with gradients and moments, of {here / 1e9:,.0f} GB"


def sizes_of_matrices(model: Model, vocab_size: int) -> tuple[int, int]:
    """Elements of the matrices of all blocks, and of the embeddings and the output: nearly all parameters."""
    attention = 2 * model.d_model * model.head_width * (model.n_heads + model.kv_heads)
    mlp = (2 if model.family == "gpt2" else 3) * model.d_model * model.hidden_width
    positions = model.context_length if model.family == "gpt2" else 0
    others = model.d_model * (vocab_size * (1 if model.tie_embeddings else 2) + positions)
    return model.n_layers * (attention + mlp), others


def largest_micro_batch_size(config: Config, hardware: Hardware, vocab_size: int) -> int:
    """The most sequences for which a training step fits, of those that the processes can share; else the fewest.

    By arithmetic and not by trying, so that it is the same each time on the same machine.
    """
    mixes = bool(config.regularizers.mixup_alpha)
    sizes = [size for size in config.training.micro_sizes(hardware.world) if size > mixes]
    fitting = [size for size in sizes if needed(config, hardware, vocab_size, size) <= USED * memory_of(hardware)]
    return max(fitting) if fitting else min(sizes)


def needed(config: Config, hardware: Hardware, vocab_size: int, size: int) -> int:
    """Bytes that a process holds at most in a step of ``size`` sequences at once, roughly.

    The weights and all that has their size, the teachers (as if they were like the model), and what autograd keeps of
    a forward pass, which is done with tensors that have a shape and no content.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), hardware.device:
        model = GPT(config.model, vocab_size, config.regularizers)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        kept = kept_for_backward(model, hardware, torch.zeros(size, config.model.context_length, dtype=torch.long))
    one_block = kept // config.model.n_layers  # on the way back the gradients of what it keeps are held beside it
    return COPIES * weights // hardware.parts + len(config.run.teachers) * weights + kept + one_block


def kept_for_backward(model: nn.Module, hardware: Hardware, tokens_BT: Tensor) -> int:
    """Bytes of what autograd keeps of a forward pass of the model, its parameters left out."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    seed_activations(0, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), hardware.autocast():
        model(tokens_BT)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in own)


def memory_of(hardware: Hardware) -> int:
    """Bytes of the process's device; of a machine's main memory, or its control group's, each process's share."""
    kind = hardware.device.type
    if kind == "cuda":
        return torch.cuda.get_device_properties(hardware.device).total_memory
    if kind == "mps":
        return torch.mps.recommended_max_memory()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    words = limit.read_text().strip() if limit.is_file() else "max"
    whole = min(pages, int(words)) if words.isdecimal() else pages
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
