"""What bf16 costs in quality: the same run in fp32 and in bf16, over several seeds."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from tqdm import tqdm

from benchmarks.timing import trained
from tracking.metrics import read_metrics

RUN = ("configs/quickstart.yaml", "--training.max_steps=200", "--regularizers.residual_dropout=0.1")


def measure(rounds: int = 4) -> dict[str, Any]:
    """The last validation losses of each precision, nats per token, by seed."""
    losses: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for seed in tqdm(range(max(2, rounds)), disable=None, leave=False, desc="seeds"):
        for precision, reached in losses.items():
            with trained(*RUN, f"--run.seed={seed}", f"--run.precision={precision}") as run:
                reached.append(read_metrics(run)[-1]["val/loss"])
    return losses


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print: the difference with its standard error, beside what another seed changes."""
    gaps = [low - full for low, full in zip(results["bf16"], results["fp32"], strict=True)]
    error = f"standard error {stdev(gaps) / len(gaps) ** 0.5:.4f}, {len(gaps)} seeds, {' '.join(RUN)}"
    lines = [f"  {mean(gaps):+7.4f}  val loss of bf16 - fp32, {error}"]
    for kind, held in results.items():
        lines.append(f"  {mean(held):7.4f}  {kind}, standard deviation over seeds {stdev(held):.4f}")
    return lines
