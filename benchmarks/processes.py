"""What several processes, strict sums and checkpoints cost, on real runs of train.py started in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.opponents import Shape
from benchmarks.timing import ratio, seconds_of, spread, told, trained
from program import cores
from tracking.metrics import read_metrics
from tracking.run_directory import read_summary

SHAPES = {
    "4x128, context 64, batch 12": (Shape(4, 128, 4, 64, 12, 257), 150),
    "6x384, context 256, batch 8": (Shape(6, 384, 6, 256, 8, 257), 10),
}  # and the steps of a run
LARGE = Shape(9, 512, 8, 64, 8, 257)
HELD = "held"
UNCOUNTED = 4  # first steps of a run
REFERENCE = "1 process"


def launches(cores: int) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    """Name to processes, threads of each, and what is said beside; all but the last use the same cores."""
    half = max(1, cores // 2)
    strict, parts = ("--training.deterministic=strict",), ("--run.shard=all",)
    return {
        REFERENCE: (1, 2 * half, ()),
        "2 processes": (2, half, ()),
        "2 processes, the model in 2 parts": (2, half, parts),
        "1 process, strict": (1, 2 * half, strict),
        "2 processes, strict": (2, half, strict),
        "1 process on half the cores": (1, half, ()),
    }


def measure(rounds: int = 3) -> dict[str, Any]:
    """Milliseconds of a step for each shape and launch [rounds], and of a checkpoint, with two micro-batches a step;
    and the bytes that a process holds of a larger model, by the number of its parts."""
    results: dict[str, Any] = {}
    for title, (shape, steps) in SHAPES.items():
        times: dict[str, list[float]] = {name: [] for name in launches(cores())}
        saves: list[float] = []
        for name in tqdm([*times] * rounds, disable=None, leave=False, desc=title):
            processes, threads, words = launches(cores())[name]
            with trained(*flags(shape, steps), f"--run.threads={threads}", *words, processes=processes) as run:
                speeds = [record["train/tokens_per_second"] for record in read_metrics(run)[UNCOUNTED:]]
                times[name].append(1000 * shape.tokens / spread(speeds)[0])
                if name == REFERENCE:
                    saves.append(1000 * seconds_to_save(run))
        results[title] = {"step_ms": times, "checkpoint_ms": saves}
    return results | {HELD: {parts: bytes_held(parts) for parts in (1, 4)}}


def bytes_held(parts: int) -> int:
    """What one of four processes holds of weights, gradients and moments of 30 million parameters in so many parts."""
    shard = "none" if parts == 1 else "all"
    words = "--training.micro_batch_size=2", "--run.threads=1", f"--run.shard={shard}"
    with trained(*flags(LARGE, 1), *words, processes=4) as run:
        return int(read_summary(run)["held_bytes"])


def flags(shape: Shape, steps: int) -> list[str]:
    """The words of a run of this shape on bytes, in two micro-batches a step, evaluated once and hardly."""
    return f"""
        --data.tokenizer=byte --data.max_documents=100
        --model.n_layers={shape.n_layers} --model.d_model={shape.d_model}
        --model.n_heads={shape.n_heads} --model.context_length={shape.context}
        --training.global_batch_size={shape.batch} --training.micro_batch_size={shape.batch // 2}
        --training.max_steps={steps} --evaluation.every={steps}
        --evaluation.max_tokens={shape.context} --evaluation.sample_tokens=0
    """.split()


def seconds_to_save(run: Path) -> float:
    """What committing the checkpoint of a run once more costs: written, flushed, hashed, read back."""
    from training.checkpoint import existing, read_state, read_tensors, save

    newest = existing(run / "checkpoints")[0]
    tensors = [(name, read_tensors(newest, name)) for name in ("model", "optimizer")]
    state = read_state(newest)
    return seconds_of(save, run / "again", tensors, state)


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print, ratios first."""
    lines = []
    for shape, result in results.items():
        if shape == HELD:
            whole = result[1]
            lines.append("what a process holds of weights, gradients and moments, 30 million parameters on 4 processes")
            lines += [
                f"  {held / whole:5.2f}  {f'in {n} parts':<34} {held / 1e6:8.1f} MB" for n, held in result.items()
            ]
            continue
        reference, saves = result["step_ms"][REFERENCE], spread(result["checkpoint_ms"])
        lines.append(f"{shape}, two micro-batches a step")
        for name, times in result["step_ms"].items():
            lines.append(f"  {ratio(times, reference)[0]:5.2f}  {name:<34} {told(spread(times), ' ms a step', 1)}")
        steps = saves[0] / spread(reference)[0]
        lines.append(f"  {steps:5.2f}  {'a checkpoint, in steps':<34} {told(saves, ' ms', 1)}")
    return lines
