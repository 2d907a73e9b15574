"""The race to nanoGPT's own result on a CPU: tiny Shakespeare, a loss of 1.898 on the full last tenth.

nanoGPT's recipe (4 layers, 128 wide, 2,000 steps of 12 sequences of 64) is run with the plain GPT-2 of opponents.py,
in fp32, by bytes; against it train.py with configs/shakespeare_fast.yaml. Time is that of the steps: preparation,
evaluation and saving are left out on both sides, compilation is not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.opponents import PlainGPT2, Shape, plain_adamw, stepper
from benchmarks.timing import seconds_of, trained
from config import BadInput
from tracking.metrics import read_metrics

GOAL = 1.898  # nats per byte
SHAPE = Shape(4, 128, 4, 64, 12, 256)
STEPS, WARMUP, PEAK, LOWEST = 2000, 100, 1e-3, 1e-4
CONFIG = "configs/shakespeare_fast.yaml"


def measure(rounds: int = 1, text: str = "tinyshakespeare.txt") -> dict[str, Any]:
    """Seconds of steps and the loss they reach, ours and theirs in turn."""
    if not Path(text).is_file():
        raise BadInput(f"the race needs tiny Shakespeare, and there is no {text}; name it with --text")
    results: dict[str, Any] = {"ours": [], "plain": []}
    for seed in range(rounds):
        results["ours"].append(ours(text, seed))
        results["plain"].append(plain(text, seed))
    return results


def plain(text: str, seed: int) -> dict[str, float]:
    """nanoGPT's recipe to its end."""
    bytes_N = torch.from_numpy(np.frombuffer(Path(text).read_bytes(), dtype=np.uint8).astype(np.int64))
    train_N, val_N = bytes_N[: int(0.9 * len(bytes_N))], bytes_N[int(0.9 * len(bytes_N)) :]
    torch.manual_seed(seed)
    model = PlainGPT2(SHAPE, dropout=0.0)
    optimizer = plain_adamw(model)
    take_step = stepper(model, optimizer, bf16=False)

    def step(number: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number)
        first_B1 = torch.randint(len(train_N) - SHAPE.context, (SHAPE.batch, 1))
        windows_BT = train_N[first_B1 + torch.arange(SHAPE.context + 1)]
        take_step(windows_BT[:, :-1], windows_BT[:, 1:])

    seconds = sum(seconds_of(step, number) for number in tqdm(range(STEPS), "plain GPT-2", disable=None, leave=False))
    return {"seconds": seconds, "steps": STEPS, "loss": full_loss(model, val_N)}


def learning_rate(step: int) -> float:
    """A linear warmup to PEAK, then half a cosine down to LOWEST."""
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    return LOWEST + 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) * (PEAK - LOWEST)


@torch.no_grad()
def full_loss(model: PlainGPT2, tokens_N: Tensor) -> float:
    """Nats per byte over all windows of a text, side by side, as wellposed evaluates."""
    model.eval()
    windows_WT = tokens_N.unfold(0, SHAPE.context + 1, SHAPE.context)
    sums = [model(part[:, :-1], part[:, 1:]) * len(part) for part in torch.split(windows_WT, 64)]
    return float(torch.stack(sums).sum()) / len(windows_WT)


def ours(text: str, seed: int) -> dict[str, float]:
    """train.py up to the first evaluation at the goal."""
    seconds, tokens = 0.0, 0
    with trained(CONFIG, f"--data.path={Path(text).resolve()}", f"--run.seed={seed}") as run:
        records = read_metrics(run)
    for record in records:
        seconds += (record["tokens"] - tokens) / record["train/tokens_per_second"]
        tokens = record["tokens"]
        if record.get("val/loss", math.inf) <= GOAL:
            break
    return {"seconds": seconds, "steps": record["step"], "loss": record.get("val/loss", math.nan)}


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, the ratio first."""
    lines = []
    for mine, theirs in zip(results["ours"], results["plain"], strict=True):
        faster = f"{theirs['seconds'] / mine['seconds']:5.1f} times faster to {GOAL}"
        lines.append(f"  {faster}" if mine["loss"] <= GOAL else f"  {GOAL} was not reached")
        for name, held in (("ours", mine), ("plain GPT-2", theirs)):
            lines.append(f"  {held['seconds']:6.1f} s  {held['steps']:5d} steps  val {held['loss']:.4f}  {name}")
    return lines
