"""What a model takes, told before it is there, and how many sequences at once a device has the memory for."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from config import BadInput, Config
from hardware import Hardware, estimated_seconds
from model.gpt import GPT
from randomness import seed_activations

USED = 0.8  # of the memory at most: memory is handed out in pieces, and others want some
COPIES = 5  # of the weights: themselves, their gradients, two moments, and an average or gradients on their way


def build(config: Config, hardware: Hardware, vocab_size: int, total_steps: int) -> GPT:
    """The model of a run with its initial weights, on the CPU; how large it is has then been told.

    Raises BadInput, before anything is allocated, when the weights and what has their size do not fit.
    """
    with torch.device("meta"):
        blank = GPT(config.model, vocab_size, config.regularizers)
    parameters, here = blank.count_parameters(), memory_of(hardware)
    needs = COPIES * 4 * parameters // hardware.parts
    size = f"{config.model.family}, {parameters:,} parameters"
    memory = f"{needs / 1e9:,.{2 * (needs < 1e10)}f} GB with gradients and moments, of {here / 1e9:,.0f} GB"
    if needs > here:
        in_blocks = sum(parameter.numel() for parameter in blank.blocks.parameters())
        sizes = {
            f"model.d_model={config.model.d_model} or model.n_layers={config.model.n_layers}": in_blocks,
            f"model.d_model={config.model.d_model} or the vocabulary of {vocab_size:,}": parameters - in_blocks,
        }
        largest = max(sizes, key=sizes.__getitem__)
        raise BadInput(f"the model ({size}) needs {memory} of {hardware.device}; lower {largest}")
    if hardware.main:
        seconds = estimated_seconds(hardware, config, parameters, total_steps)
        time = f"; roughly {seconds / 60:,.0f} minutes" if hardware.device.type == "cpu" and seconds > 90 else ""
        print(f"model      {size}: {memory}{time}", flush=True)
    return GPT(config.model, vocab_size, config.regularizers).initialize(config.run.seed)


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
