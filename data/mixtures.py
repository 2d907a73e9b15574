"""The corpus that a config's data section describes: prepared if need be, and opened. Or several: a mixture.

Each source of a mixture is prepared as a corpus of its own, with all knobs of the section but its own path, so one can
be added without preparing the others again. All must have one tokenizer:

- byte, a file or a name on the hub is simply used for each;
- a bpe is that of the sources that are prepared corpora already, if there are some;
- else it is trained on the training splits of all sources together and kept in corpora/tokenizer-<fingerprint>/.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import files
from config import BadInput, Data, Source
from data.known import prepared
from data.prepare import Splits, prepare, train_on_sample
from data.shards import Corpus
from data.sources import open_source
from data.tokenizers import CONFIG, TOKENIZER, end_of_text, tokenizer_identity


def open_data(config: Data, root: Path | str = "corpora", quiet: bool = False, verify: bool = True) -> Corpus:
    """The corpus of ``config``, or the mixture of its sources, prepared under ``root`` if it is not there yet.

    ``verify`` as in ``Corpus.open``. Raises BadInput as ``prepare`` and ``mixture`` do.
    """
    corpora = [Corpus.open(directory, verify) for directory in prepare_all(config, root, quiet)]
    return mixture(config.sources, corpora) if config.sources else corpora[0]


def prepare_all(config: Data, root: Path | str = "corpora", quiet: bool = False) -> list[Path]:
    """The directories of the corpora of all sources, or of the only corpus; made if they are not there yet."""
    if not config.sources:
        return [prepare(config, root, quiet)]
    configs = [config.model_copy(update={"path": source.path, "sources": []}) for source in config.sources]
    there = [prepared(one) for one in configs]
    text = [one for one, directory in zip(configs, there, strict=True) if directory is None]
    tokenizer = config.tokenizer
    if tokenizer == "bpe" and len(text) < len(configs):
        tokenizer = str(next(directory for directory in there if directory is not None))
    elif tokenizer == "bpe" and len(text) > 1:
        tokenizer = str(shared_tokenizer(text, Path(root), quiet))
    return [
        directory or prepare(one.model_copy(update={"tokenizer": tokenizer}), root, quiet)
        for one, directory in zip(configs, there, strict=True)
    ]


def shared_tokenizer(configs: Sequence[Data], root: Path, quiet: bool) -> Path:
    """The directory of a bpe that is trained on the training splits of all ``configs``; made if it is not there yet."""
    sources, config = [open_source(one, root) for one in configs], configs[0]
    size, sample = config.vocab_size, config.tokenizer_sample
    texts = [[source.identity, source.split, config.val_fraction, config.test_fraction] for source in sources]
    directory = root / f"tokenizer-{files.hash_of([tokenizer_identity('bpe', size, sample), texts])[:12]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with files.lock(directory / ".lock", wait=True):
            if not (directory / TOKENIZER).is_file():
                splits = [Splits(source, one, quiet=quiet) for source, one in zip(sources, configs, strict=True)]
                tokenizer, _ = train_on_sample(splits, size, sample, quiet)
                files.write_json(directory / CONFIG, {"eos_token": tokenizer.id_to_token(end_of_text(tokenizer))})
                files.write_text(directory / TOKENIZER, tokenizer.to_str(pretty=True))
    except OSError as problem:
        raise BadInput(
            f"cannot write the tokenizer {directory}: {problem.strerror or problem}; check permissions and free space"
        ) from problem
    return directory


def mixture(sources: Sequence[Source], corpora: Sequence[Corpus]) -> Corpus:
    """The corpora of ``sources`` as one. Its fingerprint is that of names and texts, whatever the weights.

    So runs that differ in weights are judged by the same text. Raises BadInput if two tokenizers differ, or two names
    are the same.
    """
    first, named = corpora[0], list[tuple[Source, Corpus]]()
    for source, corpus in zip(sources, corpora, strict=True):
        name = source.name or re.sub("-[0-9a-f]{12}$", "", corpus.directory.resolve().name)
        if name in [other.name for other, _ in named]:
            raise BadInput(f"two of data.sources are called {name}; give each a name, as in {{path: a, name: other}}")
        if corpus.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
            raise BadInput(
                f"{first.directory} and {corpus.directory}, of data.sources, have different tokenizers; prepare one "
                f"of them again from its text, with data.tokenizer={first.directory}"
            )
        named.append((source.model_copy(update={"name": name}), corpus))
    fingerprint = files.hash_of([[source.name, corpus.fingerprint] for source, corpus in named])[:16]
    return replace(first, fingerprint=fingerprint, sources=tuple(named))
