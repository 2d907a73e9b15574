"""Let a trained model write: it goes on from a prompt, or begins a document of its own.

python -m scripts.generate runs/my-run --prompt 'import os' --samples 3
python -m scripts.generate runs/seeds/ensemble.json --prompt 'import os'
"""

from __future__ import annotations

import argparse
import sys

from config import BadInput
from program import FINISHED, run, shown


def main(arguments: list[str]) -> int:
    """Print the samples, each as soon as it is drawn."""
    parser = argparse.ArgumentParser("python -m scripts.generate", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    how = "a run directory (its best checkpoint is taken), a checkpoint, or an ensemble.json of scripts.evaluate"
    add("run", metavar="RUN", help=how)
    add("--prompt", default="", metavar="TEXT", help="what each text begins with; default: nothing")
    add("--tokens", type=int, default=200, metavar="N", help="tokens to write at most; default: 200")
    how = "below 1 the likely becomes likelier; 0 always takes the likeliest token; default: 0.8"
    add("--temperature", type=float, default=0.8, metavar="T", help=how)
    add("--top_k", "--top-k", type=int, metavar="K", help="draw only from the K likeliest tokens")
    how = "draw only from the likeliest tokens that together have the probability P"
    add("--top_p", "--top-p", type=float, metavar="P", help=how)
    add("--seed", type=int, default=0, metavar="N", help="the same seed, the same text; default: 0")
    add("--samples", type=int, default=1, metavar="N", help="how many texts; default: 1")
    options = parser.parse_args(arguments)
    if options.samples < 1:
        raise BadInput(f"--samples {options.samples}: give at least 1")

    from data.tokenizers import load_tokenizer
    from evaluation.ensemble import load_members
    from model.generate import check_sampling, sample_text
    from tracking.load_run import list_members, run_tokenizer

    drawing = (options.temperature, options.top_k, options.top_p)
    check_sampling(options.tokens, *drawing)
    listed = list_members([options.run])
    models = [(member.model, member.weight) for member in load_members(listed)]
    tokenizer, end = load_tokenizer(str(run_tokenizer(listed[0].path)))
    begin = (models, tokenizer, options.prompt, end, options.tokens, options.seed)
    for index in range(options.samples):
        if options.samples > 1:
            print(f"--- sample {index + 1} of {options.samples}")
        text = sample_text(*begin, *drawing, index)
        print(shown(text) if sys.stdout.isatty() else text, flush=True)
    return FINISHED


if __name__ == "__main__":
    run(main)
