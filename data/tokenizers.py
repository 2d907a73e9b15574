"""Which tokenizer, made or loaded. Every one is a ``tokenizers.Tokenizer``, stored as tokenizer.json.

byte   a token per UTF-8 byte, id = value of the byte; end-of-text is 256
bpe    byte-level BPE with GPT-2's pre-tokenizer, trained on the training split; end-of-text is 0
other  any tokenizer.json, from a file, a directory or the hub; end-of-text is what its files name as eos_token
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from config import BadInput
from files import sha256

END_OF_TEXT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|end▁of▁sentence|>", "[EOS]", "<|im_end|>")
VOCABULARY, MERGES = GPT2_FILES = "vocab.json", "merges.txt"  # what GPT-2's tokenizer was published as
TOKENIZER, CONFIG = TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json"  # the second names the end-of-text

# The visible stand-ins for the bytes 0 to 255 that GPT-2 introduced and the library's ByteLevel uses.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
BYTES_AS_CHARACTERS = [chr(256 + _HIDDEN.index(byte)) if byte in _HIDDEN else chr(byte) for byte in range(256)]

# Use all cores, and say so explicitly: when this is unset, the library warns and turns its threads off after a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def byte_tokenizer() -> Tokenizer:
    """257 entries: each byte under its own value, and end-of-text."""
    vocab = {character: byte for byte, character in enumerate(BYTES_AS_CHARACTERS)}
    tokenizer = Tokenizer(models.BPE(vocab={**vocab, END_OF_TEXT: 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return plain(tokenizer, 256)


def train_bpe(documents: Iterable[str], vocab_size: int, quiet: bool = True) -> Tokenizer:
    """A byte-level BPE of ``vocab_size`` entries (fewer if the text is too short for so many), end-of-text included.

    The same documents give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=not quiet and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return plain(tokenizer, 0)


def load_tokenizer(knob: str) -> tuple[Tokenizer, int]:
    """A tokenizer and the id of its end-of-text token. Raises BadInput.

    ``knob`` is a tokenizer.json, a directory that holds one (or GPT-2's vocab.json and merges.txt), or a name on the
    hub. Which token ends a text is what the tokenizer_config.json beside it says; else one of KNOWN_ENDS.
    """
    file = tokenizer_file(knob)
    try:
        local = file or Path(hub_file(knob, TOKENIZER))
        tokenizer = gpt2_tokenizer(local) if local.name == VOCABULARY else Tokenizer.from_file(str(local))
    except Exception as problem:  # the library raises plain Exception
        reason = " ".join(str(problem).split())
        way_out = "it must be a tokenizer.json of the tokenizers library"
        if not file:
            way_out = "there is no such file here either; check data.tokenizer and the network, or use byte or bpe"
        raise BadInput(f"cannot load the tokenizer {knob!r}: {reason}; {way_out}") from problem
    end = end_of_text(tokenizer, named_end(knob, local if file else None))
    return plain(tokenizer, end), end


def tokenizer_file(knob: str) -> Path | None:
    """The file that data.tokenizer points at; None if it is no local path. Raises BadInput if missing."""
    path = Path(knob).expanduser()
    if path.is_dir():
        is_gpt2 = not (path / TOKENIZER).is_file() and all((path / name).is_file() for name in GPT2_FILES)
        path = path / (VOCABULARY if is_gpt2 else TOKENIZER)
    if path.is_file():
        return path
    if path.suffix == ".json" or knob.startswith((".", "/", "~")):
        raise BadInput(f"there is no tokenizer file {path}; check data.tokenizer, or use byte or bpe")
    near = [] if "/" in knob or "." in knob else difflib.get_close_matches(knob.lower(), ["byte", "bpe"], 1, 0.7)
    if near:
        raise BadInput(f"there is no tokenizer {knob!r}; did you mean data.tokenizer={near[0]}?")
    return None


def gpt2_tokenizer(vocabulary: Path) -> Tokenizer:
    """The byte-level BPE of a vocab.json and the merges.txt beside it, as GPT-2 was published."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(vocabulary.with_name(MERGES))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def named_end(knob: str, file: Path | None) -> str | None:
    """The eos_token of the tokenizer_config.json beside ``file``, or of the hub's ``knob``; None if it names none."""
    if file is not None:
        config = file.with_name(CONFIG)
    else:
        try:
            config = Path(hub_file(knob, CONFIG))
        except Exception:  # many have none
            return None
    if not config.is_file():
        return None
    try:
        named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as problem:
        raise BadInput(f"{config} cannot be read as a JSON object ({problem}); mend it or remove it") from problem
    return named.get("content") if isinstance(named, dict) else named  # older files describe the token in a dict


def hub_file(name: str, file: str) -> str:
    """A file of a name on the hub, or its copy of an earlier day if the hub does not answer.

    The hub is asked once whether there is such a file: a download would ask six times, over 23 seconds.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        get_hf_file_metadata(hf_hub_url(name, file))
    except Exception:
        cached = try_to_load_from_cache(name, file)
        if not isinstance(cached, str):
            raise
        return cached
    return hf_hub_download(name, file)


def tokenizer_identity(knob: str, vocab_size: int, sample: int = 10**9) -> dict[str, Any]:
    """What tells one tokenizer from another before it is made: JSON-able, a part of the corpus's fingerprint."""
    if knob == "byte":
        return {"kind": "byte"}
    if knob == "bpe":
        return {"kind": "bpe", "vocab_size": vocab_size, "sample": sample}
    file = tokenizer_file(knob)
    if file is None:
        return {"kind": "hub", "name": knob}
    try:
        identity: dict[str, Any] = {"kind": "file", "sha256": sha256(file)}
        if file.name == VOCABULARY:
            identity["merges"] = sha256(file.with_name(MERGES))
    except OSError as problem:
        raise BadInput(f"cannot read the tokenizer {file}: {problem.strerror}; check its permissions") from problem
    if named := named_end(knob, file):
        identity["end_of_text"] = named
    return identity


def plain(tokenizer: Tokenizer, end: int) -> Tokenizer:
    """The same tokenizer, set so that text is only text: "<|endoftext|>" inside it is thirteen characters."""
    tokenizer.add_special_tokens([str(tokenizer.id_to_token(end))])  # some files list it as an ordinary token
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_text(tokenizer: Tokenizer, named: str | None = None) -> int:
    """The id of the token that ends a text: the one named, else one that we know. Raises BadInput if it has none."""
    for token in KNOWN_ENDS if named is None else (named,):
        if (found := tokenizer.token_to_id(token)) is not None:
            return int(found)
    if named is not None:
        raise BadInput(f"the tokenizer has no token {named!r}, which its tokenizer_config.json calls eos_token")
    raise BadInput(
        f"the tokenizer has no end-of-text token (looked for {', '.join(KNOWN_ENDS)}); name it as eos_token in a "
        f"tokenizer_config.json beside it, add {END_OF_TEXT} to its added_tokens, or use another one"
    )


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id (ids may have holes)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
