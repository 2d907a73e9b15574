"""What several processes, strict sums and checkpoints cost, on real runs of train.py started in turn."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.opponents import Shape
from benchmarks.timing import ratio, spread
from config import Failure
from program import cores
from tracking.metrics import read_metrics

SHAPES = {
    "4x128, context 64, batch 12": (Shape(4, 128, 4, 64, 12, 257), 150),
    "6x384, context 256, batch 8": (Shape(6, 384, 6, 256, 8, 257), 10),
}  # and the steps of a run
UNCOUNTED = 4  # first steps of a run
REFERENCE = "1 process"


def launches(cores: int) -> dict[str, tuple[int, int, str]]:
    """Name to processes, threads of each, and the sums; all but the last use the same cores."""
    half = max(1, cores // 2)
    return {
        REFERENCE: (1, 2 * half, "ordinary"),
        "2 processes": (2, half, "ordinary"),
        "1 process, strict": (1, 2 * half, "strict"),
        "2 processes, strict": (2, half, "strict"),
        "1 process on half the cores": (1, half, "ordinary"),
    }


def measure(rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of a step for each shape and launch [rounds], and of a checkpoint; two micro-batches a step."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for title, (shape, steps) in SHAPES.items():
            times: dict[str, list[float]] = {name: [] for name in launches(cores())}
            saves: list[float] = []
            turns = [(name, *launch) for _ in range(rounds) for name, launch in launches(cores()).items()]
            for name, world, threads, sums in tqdm(turns, disable=None, leave=False, desc=title):
                run = run_once(Path(scratch), shape, steps, world, threads, sums)
                records = read_metrics(run)[UNCOUNTED:]
                times[name].append(
                    spread([1000 * shape.tokens / record["train/tokens_per_second"] for record in records])[0]
                )
                if name == REFERENCE:
                    saves.append(1000 * seconds_to_save(run))
                shutil.rmtree(run)
            results[title] = {"step_ms": times, "checkpoint_ms": saves}
    return results


def run_once(directory: Path, shape: Shape, steps: int, world: int, threads: int, sums: str) -> Path:
    """Train in a process of its own, or under torchrun; the run directory. Raises Failure with what it said."""
    words = {
        "run.dir": directory / "runs",
        "run.name": "timed",
        "run.threads": threads,
        "data.tokenizer": "byte",
        "data.max_documents": 100,
        "model.n_layers": shape.n_layers,
        "model.d_model": shape.d_model,
        "model.n_heads": shape.n_heads,
        "model.context_length": shape.context,
        "training.global_batch_size": shape.batch,
        "training.micro_batch_size": shape.batch // 2,
        "training.max_steps": steps,
        "training.deterministic": sums,
        "evaluation.every": steps,
        "evaluation.max_tokens": shape.context,
        "evaluation.sample_tokens": 0,
        "tracking.wandb": "disabled",
        "tracking.log_every": 1,
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
    command = [sys.executable, *torchrun, "train.py", *(f"--{key}={value}" for key, value in words.items())]
    ended = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    if ended.returncode:
        raise Failure(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    return directory / "runs/timed"


def seconds_to_save(run: Path) -> float:
    """What committing the checkpoint of a run once more costs: written, flushed, hashed, read back."""
    from training.checkpoint import existing, read_state, read_tensors, save

    newest = existing(run / "checkpoints")[0]
    tensors = {name: read_tensors(newest, name) for name in ("model", "optimizer")}
    state = read_state(newest)
    started = time.perf_counter()
    save(run / "again", tensors, state)
    return time.perf_counter() - started


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, ratios first."""
    lines = []
    for shape, result in results.items():
        reference = result["step_ms"][REFERENCE]
        lines.append(f"{shape}, two micro-batches a step")
        for name, times in result["step_ms"].items():
            more, (milliseconds, low, high) = ratio(times, reference)[0], spread(times)
            lines.append(f"  {more:5.2f}  {name:<28} {milliseconds:8.1f} ms a step ({low:.1f} to {high:.1f})")
        milliseconds, low, high = spread(result["checkpoint_ms"])
        steps = milliseconds / spread(reference)[0]
        lines.append(f"  {steps:5.2f}  {'a checkpoint, in steps':<28} {milliseconds:8.1f} ms ({low:.1f} to {high:.1f})")
    return lines
