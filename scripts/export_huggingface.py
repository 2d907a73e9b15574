"""Write a trained model as a Hugging Face directory, and check that transformers computes the same logits from it.

python -m scripts.export_huggingface runs/my-run exported/my-model
"""

from __future__ import annotations

import argparse
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from config import BadInput, Failure
from program import FINISHED, run

LARGEST_DIFFERENCE = 1e-5  # of logits, as a share of the largest


def main(arguments: list[str]) -> int:
    """Load, write beside OUT, compare, rename into place."""
    parser = argparse.ArgumentParser("python -m scripts.export_huggingface", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="a run directory (its best checkpoint is taken), or a checkpoint")
    parser.add_argument("out", metavar="OUT", help="the directory to write; must not exist, or be empty")
    options = parser.parse_args(arguments)
    out = Path(options.out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} exists and is not an empty directory; choose another one, or remove it first")

    from safetensors import SafetensorError

    from data.tokenizers import load_tokenizer
    from model.huggingface import compare_logits, write_directory
    from tracking.load_run import load_model, run_tokenizer

    model, _, _ = load_model(options.run)
    tokenizer_file = run_tokenizer(options.run)
    _, end = load_tokenizer(str(tokenizer_file))
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    compared = "transformers is not installed, so the logits were NOT compared (pip install transformers)"
    try:
        write_directory(model, tokenizer_file, temporary, end)
        if find_spec("transformers") is not None:
            difference = compare_logits(model, temporary)
            compared = f"largest difference of logits to transformers: {difference:.1e} of the largest logit"
            if not difference <= LARGEST_DIFFERENCE:  # nan too
                raise Failure(f"{compared}; at most {LARGEST_DIFFERENCE:.0e} is allowed, nothing written")
        temporary.rename(out)
    except (OSError, SafetensorError) as problem:
        raise BadInput(f"cannot write {out}: {problem}; check permissions and space") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

    family, parameters = model.config.family, model.count_parameters()
    print(f"{out}: {family}, {parameters:,} parameters, {', '.join(sorted(file.name for file in out.iterdir()))}")
    print(f"""{compared}
load it with:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  model = AutoModelForCausalLM.from_pretrained({str(out)!r})
  tokenizer = AutoTokenizer.from_pretrained({str(out)!r})""")
    return FINISHED


if __name__ == "__main__":
    run(main)
