"""Prepare a corpus: read the text, split it, train or load the tokenizer, write the tokens.

python -m scripts.prepare_data --data.corpus=text --data.path='books/*.txt'

A job array shares the work; each job is one of n, counted from 0, and what they made is put together at the end:

python -m scripts.prepare_data --data.corpus=text --data.path='books/*.txt' --shard 0/3
python -m scripts.prepare_data --data.corpus=text --data.path='books/*.txt' --merge
"""

from __future__ import annotations

import re
from pathlib import Path

from command_line import parse
from config import BadInput
from program import run


def main(arguments: list[str]) -> None:
    """Prepare what the config's data section describes, and show what came out."""
    job, merge, arguments = job_of(arguments)
    config = parse(arguments, description=__doc__ or "")

    from data.prepare import describe, prepare
    from data.shards import Corpus

    known = set(Path("corpora").glob("*"))
    directory = prepare(config.data, job=job, merge=merge)
    if job and directory not in known:
        return
    corpus = Corpus.open(directory)
    train = corpus.split("train")
    tokens = train.read(0, min(20, train.n_tokens)).tolist()
    tokenizer = corpus.tokenizer()
    words = " ".join(repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens)
    if directory in known:  # a new one has just been described
        print(describe(corpus.manifest), directory, sep="\n")
    print(f"hash of its contents: {corpus.fingerprint}")
    print(f"the first {len(tokens)} tokens: {words}")


def job_of(arguments: list[str]) -> tuple[tuple[int, int] | None, bool, list[str]]:
    """The job i of n that --shard i/n names, whether --merge was given, and the other arguments. Raises BadInput."""
    given = list(arguments)
    merge = "--merge" in given
    if merge:
        given.remove("--merge")
    place = next((at for at, word in enumerate(given) if word.partition("=")[0] == "--shard"), None)
    if place is None:
        return None, merge, given
    _, joined, value = given.pop(place).partition("=")
    if not joined and place < len(given):
        value = given.pop(place)
    form = re.fullmatch(r"(\d+)/(\d+)", value)
    if not form or int(form[1]) >= int(form[2]) or merge:
        raise BadInput(f"--shard {value!r} is no i/n with i from 0 to n - 1, such as 0/3, without --merge")
    return (int(form[1]), int(form[2])), merge, given


if __name__ == "__main__":
    run(main)
