"""What stands before the step: preparing a corpus, reading batches, starting a prepared run, --help."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import spread
from config import Data
from data.loader import TrainingLoader
from data.prepare import prepare
from data.shards import Corpus

ROOT = Path(__file__).parent.parent
BATCHES = 500


def measure(rounds: int = 3) -> dict[str, Any]:
    """Bytes prepared a second for each tokenizer, tokens a second from the loader, and seconds to the first step."""
    results: dict[str, list[float]] = {f"prepare {kind}": [] for kind in ("byte", "bpe")}
    results |= {"load": [], "first step": [], "help": []}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for kind in ("byte", "bpe"):
                data = Data.model_validate({"tokenizer": kind, "max_documents": 200, "vocab_size": 4096})
                started = time.perf_counter()
                directory = prepare(data, f"{scratch}/corpora{number}", quiet=True)
                corpus = Corpus.open(directory)
                size = sum(split["bytes"] for split in corpus.manifest["splits"].values())
                results[f"prepare {kind}"].append(size / (time.perf_counter() - started))
            loader = TrainingLoader(corpus.split("train"), data, 0, 256, 8)
            started = time.perf_counter()
            for step in range(BATCHES):
                loader.batch(step)
            results["load"].append(BATCHES * 8 * 256 / (time.perf_counter() - started))
            results["first step"].append(seconds_to_first_step(Path(scratch), number))
            started = time.perf_counter()
            subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, capture_output=True)
            results["help"].append(time.perf_counter() - started)
    return results


def seconds_to_first_step(scratch: Path, number: int) -> float:
    """From the command to the first line of metrics of a run of the quickstart's size; its corpus is prepared once."""
    metrics = scratch / f"runs/first{number}/metrics.jsonl"
    command = [sys.executable, "train.py", "configs/quickstart.yaml", f"--run.dir={scratch}/runs"]
    command += [f"--run.name=first{number}", "--tracking.wandb=disabled"]
    subprocess.run([*command, "--training.max_steps=1", f"--run.name=prepared{number}"], cwd=ROOT, capture_output=True)
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
        seconds = time.perf_counter() - started
        process.kill()
    return seconds


def table(results: dict[str, Any]) -> list[str]:
    """The results as lines to print."""
    units = {
        "prepare byte": (1e-6, "MB of text prepared a second, bytes as tokens"),
        "prepare bpe": (1e-6, "MB of text prepared a second, BPE of 4,096 trained and applied"),
        "load": (1e-6, "million tokens loaded a second, batches of 8x256"),
        "first step": (1, "seconds from the command to the first step of a prepared run"),
        "help": (1, "seconds of --help"),
    }
    lines = []
    for name, values in results.items():
        scale, words = units[name]
        middle, low, high = spread(values)
        lines.append(f"  {scale * middle:8.2f} ({scale * low:.2f} to {scale * high:.2f})  {words}")
    return lines
