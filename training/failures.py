"""What a run cannot go on with: which process is to blame, weights that are wrong, memory that does not suffice."""

from __future__ import annotations

import traceback
from datetime import timedelta
from textwrap import shorten
from threading import Thread

import torch
import torch.distributed as dist

from config import Config, Failure
from hardware import Hardware
from training.layout import Layout
from training.processes import gathered

SECONDS_FOR_ROLL_CALL = 5  # in which a process that still runs answers


def check_weights(layout: Layout, step: int) -> None:
    """Raises Failure when a weight is not finite, or differs between copies, naming the tensor and the ranks.

    What the processes compare is the sum of each tensor's bits, read as integers: one changed element changes it.
    """
    hardware, names = layout.hardware, list(layout.weights)
    finite = [weight.isfinite().all().long() for weight in layout.weights.values()]
    bits = [weight.detach().view(torch.int32).sum(dtype=torch.int64) for weight in layout.weights.values()]
    told = gathered(torch.stack([*finite, *bits]), hardware).view(hardware.world, 2, len(names))
    broken = (told[:, 0] == 0).any(dim=0).tolist()
    if any(broken):
        name = names[broken.index(True)]
        raise Failure(f"step {step}: {name} is not finite any more; it is not saved. Lower optimizer.lr")
    # Processes with the same part of the model are compared, [copies, parts, tensors].
    copies = told[:, 1].view(layout.copies, layout.parts, len(names))
    usual = copies.mode(dim=0).values if layout.copies > 2 else copies[0]
    differs = (copies != usual).flatten(0, 1)  # [world, tensors]
    if differs.any():
        ranks = differs.any(dim=1).nonzero().flatten().tolist()
        tensors = [name for name, one in zip(names, differs.any(dim=0).tolist(), strict=True) if one]
        raise Failure(
            f"step {step}: the weights of rank {', '.join(map(str, ranks))} differ from the others' in "
            f"{', '.join(tensors[:3])}{' and more' if len(tensors) > 3 else ''}; nothing of this step is saved. "
            "Start again to go on from the last checkpoint; if it happens again, look at the memory of that machine"
        )


def explain(problem: Exception, hardware: Hardware) -> Failure | None:
    """Who is to blame when this process cannot go on, as a Failure; None when the problem is its own.

    A failing rank writes its error to the store, a healthy one that merely lost a connection an empty string; one
    that writes nothing within SECONDS_FOR_ROLL_CALL hangs or is dead.
    """
    if hardware.world == 1 or hardware.store is None:
        return None
    own = not (isinstance(problem, dist.DistError) or "gloo" in str(problem))
    words = str(problem).splitlines()[0] if str(problem) else ""
    # Without torchrun the store lives in rank 0, and ends with it.
    blamed = ["rank 0, or torchrun, is gone or hangs, and with it the word of who failed; summary.json may tell"]
    told = f"failed with {type(problem).__name__}: {words}" if own else ""
    calling = Thread(target=_roll_call, args=(hardware, words, told, blamed), daemon=True)
    calling.start()
    calling.join(SECONDS_FOR_ROLL_CALL * (hardware.world + 1))  # the store itself may hang: it lives in a process
    if own:
        return None
    if not blamed:
        return Failure(f"the processes lost each other ({words})")
    return Failure("; ".join(blamed) + ". Start again to go on from the last checkpoint")


def _roll_call(hardware: Hardware, words: str, told: str, blamed: list[str]) -> None:
    """Tell the others of this process's own error, ``told``, or without one put into ``blamed`` who is to blame."""
    store, answers = hardware.store, [f"stopped/{rank}" for rank in range(hardware.world)]
    found = []
    try:
        store.set_timeout(timedelta(seconds=SECONDS_FOR_ROLL_CALL))
        store.set(answers[hardware.rank], told)
        for rank, answer in enumerate([] if told else answers):
            try:
                reason = store.get(answer).decode()
            except dist.DistStoreError:  # nobody wrote it
                timed_out = "timed out" in words.lower()
                reason = f"hangs: nothing came from it for {hardware.hang_timeout} s" if timed_out else "was killed"
            if reason:
                found.append(f"rank {rank} {reason}")
    except dist.DistError:  # the store is gone
        return
    blamed[:] = found


def out_of_memory(problem: Exception, config: Config, hardware: Hardware) -> Failure | None:
    """A lack of memory, as a Failure that names the knob and its next smaller value; None for another problem."""
    words = " ".join(str(problem).split())
    if not isinstance(problem, (torch.OutOfMemoryError, MemoryError)) and "can't allocate memory" not in words:
        return None
    if any(frame.name == "sums_of" for frame in traceback.extract_tb(problem.__traceback__)):
        knob, size = "evaluation.batch_size", config.evaluation_batch_size
        smaller = [size // 2] if size > 1 else []
    else:
        knob, size = "training.micro_batch_size", config.training.micro_size
        least = 2 if config.regularizers.mixup_alpha else 1
        smaller = [each for each in config.training.micro_sizes(hardware.world) if least <= each < size]
    ways = [f"--{knob}={smaller[-1]}"] if smaller else ["a smaller model.context_length or model"]
    if knob.startswith("training") and config.model.checkpoint_activations != "block":
        ways.append("--model.checkpoint_activations=block")
    told = f"{size} sequences at once do not fit into the memory of {hardware.device} ({shorten(words, 200)})"
    return Failure(f"{told}; use {', or '.join(ways)}")
