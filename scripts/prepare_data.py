"""Prepare a corpus: read the text, split it, train or load the tokenizer, write the tokens.

python -m scripts.prepare_data --data.path='books/*.txt' [--verify]
python -m scripts.prepare_data --data.path='books/*.txt' --shard 0/3      (and 1/3, 2/3; then --merge)

--verify compares every byte of the corpus with its manifest; training compares what it reads, when it first does.
--shard i/n is one of n jobs that share the work, counted from 0; --merge puts together what they made.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from command_line import parse
from config import BadInput
from program import run


def main(arguments: list[str]) -> None:
    """Prepare what the config's data section describes, and show what came out."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--verify", action="store_true")
    own.add_argument("--merge", action="store_true")
    own.add_argument("--shard", nargs="?", const="", type=str)
    options, rest = own.parse_known_args(arguments)
    config = parse(rest, description=__doc__ or "")
    job = None if options.shard is None else job_of(options.shard, options.merge)

    from data.mixtures import prepare_all
    from data.prepare import prepare

    known = set(Path("corpora").glob("*"))
    if job is None and not options.merge:
        directories = prepare_all(config.data)
    elif config.data.sources:
        raise BadInput(
            "--shard and --merge prepare one corpus; give data.path, source by source, and then data.sources"
        )
    else:
        directories = [prepare(config.data, job=job, merge=options.merge)]
    for directory in directories:
        if directory.is_dir():  # else the other jobs are at work, or it is not put together yet
            show(directory, new=directory not in known, verify=options.verify)


def show(directory: Path, new: bool, verify: bool) -> None:
    """Tell what a corpus holds, and compare all of it with its manifest if asked to."""
    from data.prepare import describe
    from data.shards import Corpus

    corpus = Corpus.open(directory)
    train = corpus.split("train")
    tokens = train.read(0, min(20, train.n_tokens)).tolist()
    tokenizer = corpus.tokenizer()
    words = " ".join(repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens)
    if not new:  # it has just been described
        print(describe(corpus.manifest), directory, sep="\n")
    if verify:
        corpus.verify()
        print("every byte is as the manifest says")
    print(f"hash of its contents: {corpus.fingerprint}")
    print(f"the first {len(tokens)} tokens: {words}")


def job_of(shard: str, merge: bool) -> tuple[int, int]:
    """The job i of n that --shard i/n names. Raises BadInput."""
    form = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not form or int(form[1]) >= int(form[2]) or merge:
        raise BadInput(f"--shard {shard!r} is no i/n with i from 0 to n - 1, such as 0/3, without --merge")
    return int(form[1]), int(form[2])


if __name__ == "__main__":
    run(main)
