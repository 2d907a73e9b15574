"""Prepare a corpus: read the text, split it, train or load the tokenizer, write the tokens.

python -m scripts.prepare_data --data.path='books/*.txt'
"""

from __future__ import annotations

from pathlib import Path

from command_line import parse
from program import run


def main(arguments: list[str]) -> None:
    """Prepare what the config's data section describes, and show what came out."""
    config = parse(arguments, description=__doc__ or "")

    from data.prepare import describe, prepare
    from data.shards import Corpus

    known = set(Path("corpora").glob("*"))
    directory = prepare(config.data)
    corpus = Corpus.open(directory)
    train = corpus.split("train")
    tokens = train.read(0, min(20, train.n_tokens)).tolist()
    tokenizer = corpus.tokenizer()
    words = " ".join(repr(tokenizer.decode([token], skip_special_tokens=False)) for token in tokens)
    if directory in known:  # a new one has just been described
        print(describe(corpus.manifest), directory, sep="\n")
    print(f"hash of its contents: {corpus.fingerprint}")
    print(f"the first {len(tokens)} tokens: {words}")


if __name__ == "__main__":
    run(main)
