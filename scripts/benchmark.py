"""Measure this machine: ratios first, then times, medians with quartiles; everything also goes to a JSON file.

python -m scripts.benchmark
python -m scripts.benchmark steps losses --rounds 5
python -m scripts.benchmark race --text tinyshakespeare.txt

steps       a training step: nothing, dropout, each second loss or everything on, against a plain GPT-2, Hugging Face's
losses      the objective at a vocabulary of 50,257: time and memory
pipeline    preparing a corpus, loading batches, the time to the first step
processes   what two processes, strict sums and a checkpoint cost, against a step of one process
precision   the loss that the same run reaches in fp32 and in bf16, over several seeds
race        the training time to nanoGPT's CPU result on tiny Shakespeare; only when asked for
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

from config import BadInput
from program import FINISHED, run

PARTS = ("steps", "losses", "pipeline", "processes", "precision", "race")


def main(arguments: list[str]) -> int:
    """Measure the parts asked for, print each as it is done."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m scripts.benchmark", description=__doc__, formatter_class=plain)
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to measure (default: all but race)")
    parser.add_argument("--rounds", type=int, default=None, help="how often each is measured")
    parser.add_argument("--text", default="tinyshakespeare.txt", help="race: the text (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmark.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        raise BadInput(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    from files import write_json
    from tracking.run_directory import versions

    results: dict[str, Any] = {"versions": versions()}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS[:-1]:
        module = importlib.import_module(f"benchmarks.{part}")
        asked = {"rounds": options.rounds} if options.rounds else {}
        asked |= {"text": options.text} if part == "race" else {}
        results[part] = module.measure(**asked)
        print(f"\n{part}\n" + "\n".join(module.table(results[part])), flush=True)
        write_json(options.json, results)
    print(f"\nresults           {options.json}")
    return FINISHED


if __name__ == "__main__":
    run(main)
