"""The training losses of twenty steps of each family, plain and regularized, are the literal numbers that they were.

A change of the numbers is a change of what is trained: it must be meant, and then the numbers are written anew by

    PYTHONPATH=. python tests/test_golden_losses.py

Tolerances are for other processors. With the instructions of older ones (ATEN_CPU_CAPABILITY, MKL_CBWR and
DNNL_MAX_CPU_ISA set to AVX2, then to what every x86 has) the first step gave the same numbers and the later ones were
off by 2e-7 of themselves with AdamW and by 5e-5 with Muon, which rounds to bf16 inside. Allowed: 1e-6, 1e-5 and 1e-3.
"""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import TINY, flags_of, made_up_text

from command_line import parse
from data.loader import TrainingLoader
from data.prepare import prepare
from data.shards import Corpus
from hardware import Hardware
from model.gpt import GPT
from training.learner import Learner
from training.step import training_step

FILE = Path(__file__).with_name("golden_losses.json")
STEPS = 20
SHAPES = {
    "gpt2": {"model.tie_embeddings": "true"},
    "llama": {"model.n_kv_heads": "1", "model.tie_embeddings": "false", "data.isolate_documents": "true"},
    "qwen3": {"model.n_kv_heads": "1", "model.head_dim": "8", "optimizer.name": "muon"},
}
# Together they have every regularizer of training but mixup, whose shares NumPy may draw otherwise in another version.
REGULARIZED = {
    "gpt2": {"attention_dropout": 0.1, "mlp_dropout": 0.1, "label_smoothing": 0.1, "l1": 1e-4, "l2": 1e-3},
    "llama": {"token_dropout": 0.1, "token_replacement": 0.1, "embedding_noise": 5, "z_loss": 1e-2, "weight_decay": 3},
    "qwen3": {"embedding_dropout": 0.1, "residual_dropout": 0.1, "stochastic_depth": 0.3, "entropy_penalty": 0.1}
    | {"weight_decay_schedule": "linear", "decay_embeddings": "false"},
}
RUNS = [f"{family}, {kind}" for family, kind in product(SHAPES, ("plain", "regularized"))]


def losses_of(run: str, text_file: Path, directory: Path) -> list[float]:
    """The plain cross-entropy of each step's batch, in nats per token."""
    family, kind = run.split(", ")
    knobs = SHAPES[family] | {"model.family": family, "training.micro_batch_size": "4"}
    if kind == "regularized":
        knobs |= {f"regularizers.{name}": str(value) for name, value in REGULARIZED[family].items()}
    config = parse(flags_of(TINY | knobs, text_file, directory))
    corpus = Corpus.open(prepare(config.data, directory / "corpora", quiet=True))
    loader = TrainingLoader(corpus.split("train"), config.data, 0, config.model.context_length, 8)
    hardware = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)
    model = GPT(config.model, corpus.vocab_size, config.regularizers).initialize(0)
    learner = Learner(model, config, hardware, STEPS, loader.steps_per_epoch)
    batches = loader.batches(range(STEPS), learner.micro_batches, 4, hardware.device)
    return [training_step(learner, batches, step).terms["loss"] for step in range(STEPS)]


@pytest.mark.parametrize("run", RUNS)
def test_the_losses_are_the_literal_ones(run: str, text_file: Path, tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text())[run]
    found = losses_of(run, text_file, tmp_path)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-3 if SHAPES[run.split(", ")[0]].get("optimizer.name") else 1e-5)


def write() -> None:
    """Make golden_losses.json from the code as it is."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        text_file = Path(directory) / "text.txt"
        text_file.write_text(made_up_text())
        losses = {run: losses_of(run, text_file, Path(directory)) for run in RUNS}
    rows = [f'"{run}": {json.dumps([round(loss, 7) for loss in values])}' for run, values in losses.items()]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write()
