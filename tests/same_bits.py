"""Seventeen short runs, to see whether a change of the code changed a single bit of what it trains.

python tests/same_bits.py --json /tmp/now.json                       # run and remember
python tests/same_bits.py --root /tmp/old --json /tmp/old.json       # the same runs by another checkout of the code
python tests/same_bits.py --json /tmp/now.json --against /tmp/old.json

Compared are the sha256 of all weights, moments and averages at the end, and every number of metrics.jsonl but times.
Both must come from one machine: other processors round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conftest import BREAKABLE, ROOT, made_up_text

EVERYTHING = {
    "regularizers.embedding_dropout": 0.1,
    "regularizers.attention_dropout": 0.1,
    "regularizers.residual_dropout": 0.1,
    "regularizers.mlp_dropout": 0.1,
    "regularizers.stochastic_depth": 0.1,
    "regularizers.token_dropout": 0.1,
    "regularizers.token_replacement": 0.1,
    "regularizers.embedding_noise": 5.0,
    "regularizers.mixup_alpha": 0.2,
    "regularizers.reversed_fraction": 0.3,
    "regularizers.target_offset": 3,
    "regularizers.label_smoothing": 0.1,
    "regularizers.z_loss": 1e-4,
    "regularizers.entropy_penalty": 0.1,
    "regularizers.multi_token_weight": 0.3,
    "regularizers.masked_input_weight": 0.4,
    "regularizers.weight_decay": 0.5,
    "regularizers.cautious_weight_decay": True,
    "regularizers.dropout_from": 0.2,
    "regularizers.dropout_until": 0.8,
    "regularizers.l1": 1e-5,
    "regularizers.l2": 1e-4,
    "regularizers.ema_decay": 0.9,
}
BASE = {key: value for key, value in BREAKABLE.items() if not key.startswith("regularizers.")}
TWO_THREADS = {"run.threads": 2, "run.precision": "bf16"}
ACCUMULATION = {"training.micro_batch_size": 2}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

RUNS: dict[str, dict[str, Any]] = {
    "gpt2, adamw": {"model.family": "gpt2"},
    "llama, adamw, untied": {"model.family": "llama", "model.tie_embeddings": False},
    "qwen3, muon, grouped heads": {"model.family": "qwen3", "optimizer.name": "muon", "model.n_kv_heads": 1},
    "everything on": EVERYTHING | {"model.family": "gpt2"},
    "everything on, accumulation": EVERYTHING | ACCUMULATION,
    "everything on, muon, bf16": EVERYTHING | TWO_THREADS | {"optimizer.name": "muon", "model.family": "qwen3"},
    "swa, decay schedule, wsd": {
        "regularizers.swa_start": 0.5, "regularizers.swa_every": 2, "regularizers.weight_decay_schedule": "cosine",
        "regularizers.decay_embeddings": False, "schedule.name": "wsd",
    },
    "points, decay in epochs, muon": {
        "schedule.name": "points", "schedule.points": "[[0,0.1],[0.3,1],[0.6,0.2],[0.6,1],[1,0]]",
        "regularizers.weight_decay_epochs": 2, "regularizers.weight_decay_schedule": "linear",
        "regularizers.cautious_weight_decay": True, "optimizer.name": "muon", "fault": "gradient:0:15:kill",
    },
    "isolated documents": {
        "data.document": "line", "data.split": "documents", "data.val_fraction": 0.2, "data.isolate_documents": True,
        "data.shuffle": "documents", "data.tokenizer": "bpe", "data.vocab_size": 300,
        "regularizers.attention_dropout": 0.1,
    },
    "early stopping, one cycle, epochs": {
        "regularizers.early_stopping_patience": 1, "regularizers.early_stopping_min_delta": 0.3,
        "schedule.name": "one_cycle", "training.max_steps": "null", "training.max_epochs": 4,
        "evaluation.every": "epoch",
    },
    "bf16": TWO_THREADS,
    "compiled, bf16, everything on": EVERYTHING | TWO_THREADS | {"run.compile": "on", "training.max_steps": 12},
    "strict": EVERYTHING | ACCUMULATION | {"training.deterministic": "strict"},
    "two processes": EVERYTHING | ACCUMULATION | {"processes": 2},
    "two processes, strict": EVERYTHING | ACCUMULATION | {"training.deterministic": "strict", "processes": 2},
    "killed and resumed": EVERYTHING | ACCUMULATION | {"fault": "save-file:0:16:kill"},
    "killed and resumed, muon, bf16": TWO_THREADS
    | {"optimizer.name": "muon", "regularizers.swa_start": 0.25, "fault": "gradient:0:15:kill"},
}  # fmt: skip


def outcome(root: Path, knobs: dict[str, Any], scratch: Path, text: Path) -> dict[str, Any]:
    """What one run ends with; ``processes`` and ``fault`` among the knobs say how it is launched."""
    knobs = dict(knobs)
    processes, fault = knobs.pop("processes", 1), knobs.pop("fault", None)
    chosen = BASE | knobs | {"data.path": text, "run.dir": scratch / "runs", "run.name": "run"}
    program = [sys.executable, *(TORCHRUN if processes > 1 else []), str(root / "train.py")]
    command = [*program, *(f"--{key}={value}" for key, value in chosen.items())]
    for environment in ([{"WELLPOSED_FAULT": fault}] if fault else []) + [{}]:
        ended = subprocess.run(command, cwd=scratch, env=os.environ | environment, capture_output=True, text=True)
        if ended.returncode != (-9 if environment else 0):
            raise SystemExit(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout}\n{ended.stderr}")
    run = scratch / "runs/run"
    newest = max((run / "checkpoints").glob("step_*"))
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.glob("*.safetensors")}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    numbers = [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]
    return {"step": newest.name, "files": files, "numbers": numbers}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What two outcomes differ in."""
    found = [f"{one['step']} and {other['step']}"] if one["step"] != other["step"] else []
    names = sorted({*one["files"], *other["files"]})
    found += [name for name in names if one["files"].get(name) != other["files"].get(name)]
    if len(one["numbers"]) != len(other["numbers"]):
        found.append(f"{len(one['numbers'])} and {len(other['numbers'])} lines of metrics")
    metrics = {
        key
        for line, twin in zip(one["numbers"], other["numbers"], strict=False)
        for key in {*line, *twin}
        if line.get(key) != twin.get(key)
    }
    return found + sorted(metrics)


def main() -> int:
    """Run all, remember, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout whose train.py is run")
    parser.add_argument("--json", type=Path, required=True, help="where the outcomes are written")
    parser.add_argument("--against", type=Path, help="outcomes of an earlier call")
    parser.add_argument("--only", default="", help="only the runs whose name contains this")
    options = parser.parse_args()
    before = json.loads(options.against.read_text()) if options.against else {}
    outcomes, differing = {}, 0
    with tempfile.TemporaryDirectory() as home:
        text = Path(home) / "text.txt"
        text.write_text(made_up_text().replace(" the ", "\nthe "))
        for number, (name, knobs) in enumerate(RUNS.items()):
            if options.only not in name:
                continue
            scratch = Path(home) / str(number)
            scratch.mkdir()
            outcomes[name] = outcome(options.root.resolve(), knobs, scratch, text)
            found = differences(before[name], outcomes[name]) if name in before else []
            differing += bool(found)
            words = "differs in " + ", ".join(found) if found else "the same" if name in before else "done"
            print(f"{name:<36} {words}", flush=True)
    options.json.write_text(json.dumps(outcomes))
    return 1 if differing else 0


if __name__ == "__main__":
    raise SystemExit(main())
