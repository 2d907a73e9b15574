"""What stands before the step: preparing a corpus, reading batches, starting a prepared run, --help."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import ROOT, seconds_of, spread, told
from config import Data
from data.loader import TrainingLoader
from data.prepare import prepare
from data.shards import Corpus

BATCHES = 500
WORDS = {
    "prepare byte": "MB of text prepared a second, bytes as tokens",
    "prepare bpe": "MB of text prepared a second, BPE of 4,096 trained and applied",
    "load": "million tokens loaded a second, batches of 8x256 (eight fast GPUs eat 3.2)",
    "load documents": "the same with documents shuffled and isolated",
    "first step": "seconds from the command to the first step of a prepared run",
    "help": "seconds of --help",
}


def measure(rounds: int = 3) -> dict[str, Any]:
    """Megabytes prepared a second for each tokenizer, million tokens a second from the loader, and seconds."""
    results: dict[str, list[float]] = {name: [] for name in WORDS}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for kind in ("byte", "bpe"):
                data = Data.model_validate({"tokenizer": kind, "max_documents": 200, "vocab_size": 4096})
                started = time.perf_counter()
                corpus = Corpus.open(prepare(data, f"{scratch}/corpora{number}", quiet=True))
                seconds = time.perf_counter() - started
                size = sum(split["bytes"] for split in corpus.manifest["splits"].values())
                results[f"prepare {kind}"].append(1e-6 * size / seconds)
            apart = data.model_copy(update={"shuffle": "documents", "isolate_documents": True})
            for name, order in (("load", data), ("load documents", apart)):
                loader = TrainingLoader(corpus.split("train"), order, 0, 256, 8)
                loader.batch(0)  # the first in a process compares the shards with their hashes
                seconds = sum(seconds_of(loader.batch, step) for step in range(1, BATCHES + 1))
                results[name].append(1e-6 * BATCHES * 8 * 256 / seconds)
            results["first step"].append(seconds_to_first_step(Path(scratch), number))
            results["help"].append(seconds_of(subprocess.check_output, [sys.executable, ROOT / "train.py", "--help"]))
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
    return [f"  {told(spread(values))}  {WORDS[name]}" for name, values in results.items()]
