"""Tokenizers: text comes back as it went in, in pieces or whole, and text is never taken for a command."""

from __future__ import annotations

import json
import random
from itertools import chain
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from config import BadInput, Data
from data import encoding
from data.encoding import Encoder, cuts_cleanly, encode_documents, fast_way, without_prefix
from data.pieces import Piece, cut
from data.sources import open_source
from data.tokenizers import (
    byte_tokenizer,
    end_of_text,
    load_tokenizer,
    plain,
    tokenizer_identity,
    train_bpe,
    vocabulary_size,
)

STRANGE = [
    "plain",
    " leading space and trailing \n\n",
    "<|endoftext|> is text here<|endoftext|>",
    "naïve façade 日本語 🙂🏽 e\u0301 \u2028 \x00 \x0c\t  \ufffd \ufeff",
    "it's   42,000!!\n\n\n\tx = {'a': [1, 2]}\n",
    "\n",
    "",
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    return list(open_source(Data(max_documents=60)).documents())


@pytest.fixture(scope="module")
def bpe(library: list[str]) -> Tokenizer:
    return train_bpe(library, 1000)


def sentencepiece_like(documents: list[str]) -> Tokenizer:
    """As Llama 2 has it: a space before the text, spaces as ▁, an end-of-text of another name."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "</s>"]))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def test_byte_ids_are_the_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert (vocabulary_size(tokenizer), end_of_text(tokenizer)) == (257, 256)
    for text, ids in zip(STRANGE, encode_documents(tokenizer, STRANGE), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text
    assert tokenizer.decode([65, 256], skip_special_tokens=False) == "A<|endoftext|>"


def test_bpe_round_trip_and_size(bpe: Tokenizer) -> None:
    assert (vocabulary_size(bpe), end_of_text(bpe)) == (1000, 0)
    for text, ids in zip(STRANGE, encode_documents(bpe, STRANGE), strict=True):
        assert bpe.decode(ids.tolist(), skip_special_tokens=False) == text
        assert 0 not in ids  # text never becomes the end-of-text token
    assert len(next(iter(encode_documents(bpe, ["import sys\n"])))) < 8


def test_bpe_is_deterministic_and_small_texts_give_fewer_entries(library: list[str], bpe: Tokenizer) -> None:
    assert train_bpe(library, 1000).to_str() == bpe.to_str()
    assert vocabulary_size(train_bpe(["abab"], 1000)) < 300


def test_settings_survive_the_file(bpe: Tokenizer, tmp_path: Path) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    for knob in (tmp_path, tmp_path / "tokenizer.json"):
        again, _ = load_tokenizer(str(knob))
        for text in STRANGE:
            assert next(encode_documents(again, [text])).tolist() == next(encode_documents(bpe, [text])).tolist()


def prose(words: int, separators: list[str]) -> str:
    chance = random.Random(0)
    vocabulary = ["the", "it's", "1234", "x.y", "(a)", "Übung", "日本", "--", "we'll", "I"]
    return "".join(chance.choice(vocabulary) + chance.choice(separators) for _ in range(words))


@pytest.mark.parametrize(
    "separators", [[" ", "\n"], [" ", "\n\n", "  "], ["\n    ", "\n\n", "\n\t"], [" "], [" ", " \n", "\n \n", "\n\n\n"]]
)
def test_tokens_in_pieces_equal_tokens_in_one_piece(
    library: list[str], bpe: Tokenizer, separators: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "LIBRARY_PIECE", 3000)
    text = prose(30_000, separators)
    for tokenizer in (bpe, plain(sentencepiece_like(library[:5]), 1)):
        pieces = list(cut([(text, True)], 10_000))
        assert len(pieces) > 5
        ids = [ids.tolist() for _, ids in Encoder(tokenizer).stream((piece, None) for piece in pieces)]
        assert list(chain(*ids)) == tokenizer.encode(text, add_special_tokens=False).ids


def test_code_in_pieces_equals_code_in_one_piece(library: list[str], bpe: Tokenizer) -> None:
    text = "".join(library)
    (ids,) = encode_documents(bpe, [text])
    assert ids.tolist() == bpe.encode(text, add_special_tokens=False).ids


def hard_text() -> list[str]:
    """Documents on which two tokenizers might differ."""
    chance = random.Random(0)

    def mixed(words: list[str], count: int) -> list[str]:
        return ["".join(chance.choices(words, k=1000)) for _ in range(count)]

    scripts = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE00)]
    scripts += [(0x1100, 0x1200), (0x1F00, 0x2070), (0x3040, 0x3100), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4)]
    scripts += [(0xFE00, 0xFFFE), (0x1D400, 0x1D800), (0x1F300, 0x1FA00), (0x20000, 0x20100), (0xE0000, 0xE0080)]
    alphabets = [[chr(code) for code in range(*script)] for script in scripts]
    blanks = [*" \t\n\r\x0b\x0c\x85\xa0\u2028\u3000\u200b\0x!", "\r\n", "  "]
    words = ["it's", "IT'S", "'re", "'", "''", "don't", "1234", "½", "x_y", "__", "...", "<|endoftext|>", "́", "🙂🏽"]
    long = ["x" * 9000, "ab" * 9000, *mixed(list("abcd"), 3), " " * 9000, "^" * 9000, "\n" * 9000, "a\n" * 900]
    long += [" \n" * 900, "<|endoftext|>" * 900, "\u0301" * 900, "日" * 900, "\0" * 900]
    texts = [*STRANGE, *mixed([*chain(*alphabets)], 20), *chain(*(mixed(alphabet, 1) for alphabet in alphabets))]
    return [
        *texts,
        *mixed(blanks, 20),
        *mixed([*words, *blanks], 20),
        *(text + end for text in long for end in ("", " ", "a")),
    ]


def by_the_library(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def test_the_fast_way_gives_the_ids_of_the_library(library: list[str], bpe: Tokenizer) -> None:
    """On text of many scripts, blanks of all kinds, words without end, and the end-of-text token spelled out."""
    texts = [*hard_text(), *library[:20]]
    trained = train_bpe(texts, 2000)  # has merges across all kinds of characters
    for tokenizer in (bpe, trained, byte_tokenizer()):
        fast = fast_way(tokenizer)
        assert fast is not None
        for text, ids in zip(texts, by_the_library(tokenizer, texts), strict=True):
            assert fast(text).tolist() == ids


def test_the_fast_way_takes_every_character_for_the_same_kind() -> None:
    """For each character of Unicode: whether it goes on with a letter, a number, a mark, and with white space.

    Merges of "a", "1", "!" or " " with the first byte of any character show where the text was broken.
    """
    byte = [token for token, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])]
    merges = [(byte[before], byte[first]) for before in b"a1! " for first in range(0x80, 0xF5)]
    vocab = {token: number for number, token in enumerate([*byte, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = fast_way(plain(tokenizer, 256))
    assert fast is not None
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x40000, 7), *range(0xE0000, 0xE0200)]
    runs = [[chr(code) for code in codes[start : start + 1000]] for start in range(0, len(codes), 1000)]
    texts = ["".join(f"a{one}1{one}!{one} {one}" for one in run) for run in runs]
    for run, text, ids in zip(runs, texts, by_the_library(tokenizer, texts), strict=True):
        assert fast(text).tolist() == ids, f"among {run[0]!r} to {run[-1]!r} one is of another kind"


def test_whatever_is_not_certain_is_left_to_the_library(library: list[str], bpe: Tokenizer) -> None:
    """Each of these would make a difference; the ids are the library's own all the same."""

    def changed(**parts: object) -> Tokenizer:
        state = json.loads(bpe.to_str()) | parts
        return plain(Tokenizer.from_str(json.dumps(state)), state["added_tokens"][0]["id"])

    state = json.loads(bpe.to_str())
    space = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    word = {**state["added_tokens"][0], "id": 1000, "content": "import", "special": False}
    backwards = {**state["model"], "merges": state["model"]["merges"][::-1]}  # then most tokens are never made
    merges = [("q", "j"), ("z", "q"), ("zq", "j")]  # z|qj, so zqj is never made of its own text
    characters = [*byte_tokenizer().get_vocab(), *("".join(pair) for pair in merges)]
    unmade = {**state["model"], "merges": merges, "vocab": {one: number for number, one in enumerate(characters)}}
    end = {**state["added_tokens"][0], "id": unmade["vocab"]["<|endoftext|>"]}
    others = [
        changed(normalizer={"type": "Lowercase"}),
        changed(pre_tokenizer=space),
        changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [digits, state["pre_tokenizer"]]}),
        changed(pre_tokenizer={**state["pre_tokenizer"], "use_regex": False}),
        changed(added_tokens=[*state["added_tokens"], word]),
        changed(model=backwards),
        changed(model=unmade, added_tokens=[end]),
        changed(model={**state["model"], "ignore_merges": True}),
        plain(sentencepiece_like(library[:5]), 1),
    ]
    text = "Import os\n    import sys 42 zqj"
    for tokenizer in others:
        assert fast_way(tokenizer) is None
        assert [ids.tolist() for ids in encode_documents(tokenizer, [text])] == by_the_library(tokenizer, [text])
    permuted = dict(zip(state["model"]["vocab"], reversed(state["model"]["vocab"].values()), strict=True))
    renamed = [{**state["added_tokens"][0], "id": permuted["<|endoftext|>"]}]
    tokenizer = changed(model={**state["model"], "vocab": permuted}, added_tokens=renamed)  # ids in any order will do
    fast = fast_way(tokenizer)
    assert fast is not None and fast(text).tolist() == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_stream_keeps_order_and_labels_on_any_number_of_threads(
    bpe: Tokenizer, library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "BATCH", 9000)
    pieces = [(Piece(text[:3000]), number) for number, text in enumerate(library)]
    encoder = Encoder(bpe)
    expected = list(enumerate(by_the_library(bpe, [piece.text for piece, _ in pieces])))
    for threads in (1, 2, 5):
        encoder.threads = threads
        assert [(number, ids.tolist()) for number, ids in encoder.stream(iter(pieces))] == expected
    assert list(encoder.stream([])) == []


def test_documents_keep_their_order_and_borders(bpe: Tokenizer) -> None:
    documents = [prose(n, [" ", "\n"]) for n in (0, 1, 50_000, 3, 0, 300_000, 2)]
    arrays = list(encode_documents(bpe, iter(documents)))
    assert [bpe.decode(ids.tolist(), skip_special_tokens=False) for ids in arrays] == documents
    assert list(encode_documents(bpe, [])) == []


def test_holes_in_the_ids_count() -> None:
    """Ids 0, 1 and 9 need a table of ten rows."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 9, "</s>": 1}, unk_token="a"))
    assert vocabulary_size(tokenizer) == 10


def test_a_foreign_tokenizer(library: list[str], tmp_path: Path) -> None:
    tokenizer = sentencepiece_like(library[:5])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded, end = load_tokenizer(str(tmp_path))
    assert end == 1
    assert cuts_cleanly(loaded, without_prefix(loaded)) and not cuts_cleanly(loaded, loaded)
    ids = next(encode_documents(loaded, ["import os and </s> more"])).tolist()
    assert len(ids) > 4 and 1 not in ids  # neither cut, nor padded, nor ended by the post-processor
    assert loaded.decode(ids, skip_special_tokens=False).startswith("import os and ")


def test_an_ordinary_end_of_text_becomes_special(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "tokenizer.json"
    assert '"special": true' in file.read_text()
    file.write_text(file.read_text().replace('"special": true', '"special": false'))
    text = "a<|endoftext|>"
    assert next(encode_documents(load_tokenizer(str(file))[0], [text])).tolist() == list(text.encode())


@pytest.mark.parametrize("named", ["<|bos|>", {"content": "<|bos|>", "lstrip": False}])
def test_end_of_text_is_what_the_tokenizer_s_own_files_name(tmp_path: Path, named: object) -> None:
    """Not a token that we know, though there is one, which pads."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<|endoftext|>": 1, "<|bos|>": 2}, merges=[]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path))[1] == 1
    config = tmp_path / "tokenizer_config.json"
    before = tokenizer_identity(str(tmp_path), 300)
    config.write_text(json.dumps({"eos_token": named, "pad_token": "<|endoftext|>"}))
    loaded, end = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert end == 2 and next(encode_documents(loaded, ["a<|bos|>"])).tolist()[0] == 0
    assert tokenizer_identity(str(tmp_path), 300) == before | {"end_of_text": "<|bos|>"}
    config.write_text(json.dumps({"eos_token": "<|eos|>"}))
    with pytest.raises(BadInput, match=r"no token '<\|eos\|>', which its tokenizer_config.json calls eos_token"):
        load_tokenizer(str(tmp_path))
    for damaged in ("{", "[1]"):
        config.write_text(damaged)
        with pytest.raises(BadInput, match=r"tokenizer_config\.json cannot be read as a JSON object"):
            load_tokenizer(str(tmp_path))


def test_as_gpt2_was_published(bpe: Tokenizer, tmp_path: Path) -> None:
    """vocab.json and merges.txt are the tokenizer that a tokenizer.json of the same entries is."""
    bpe.model.save(str(tmp_path))
    loaded, end = load_tokenizer(str(tmp_path))
    assert end == 0
    for text in STRANGE:
        assert next(encode_documents(loaded, [text])).tolist() == next(encode_documents(bpe, [text])).tolist()
    before = tokenizer_identity(str(tmp_path), 300)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert tokenizer_identity(str(tmp_path), 300) != before


def test_tokenizers_that_do_not_serve_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(knob: object) -> str:
        with pytest.raises(BadInput) as caught:
            load_tokenizer(str(knob))
        return str(caught.value)

    assert "no tokenizer file" in refusal(tmp_path)
    assert "no tokenizer file" in refusal(tmp_path / "mine.json")
    (tmp_path / "bad.json").write_text("{}")
    assert "bad.json" in refusal(tmp_path / "bad.json") and "tokenizers library" in refusal(tmp_path / "bad.json")
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "bad.pkl" in refusal(tmp_path / "bad.pkl")
    endless = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    endless.save(str(tmp_path / "endless.json"))
    assert "end-of-text" in refusal(tmp_path / "endless.json")
    assert "network" in refusal("not a/valid/name on any hub")


@pytest.mark.parametrize(("knob", "meant"), [("bpee", "bpe"), ("BPE", "bpe"), ("bytes", "byte"), ("bte", "byte")])
def test_a_mistyped_name_is_told_at_once(knob: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.tokenizers.hub_file", lambda name: pytest.fail(f"asks the hub for {name}"))
    for use in (load_tokenizer, lambda name: tokenizer_identity(name, 300)):
        with pytest.raises(BadInput, match=f"did you mean data.tokenizer={meant}"):
            use(knob)


def test_the_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that does not answer costs one question, and a copy from an earlier day serves; one that does is asked."""
    asked: list[str] = []

    def unreachable(url: str) -> None:
        asked.append(url)
        raise OSError("no route to the hub")

    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    file = str(tmp_path / "tokenizer.json")
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_: pytest.fail("downloads, which is tried six times")
    )
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for knob in ("gpt2", "someone/bpe"):
        with pytest.raises(BadInput, match=r"no route to the hub.*check data.tokenizer and the network"):
            load_tokenizer(knob)
    assert [url.partition("huggingface.co")[2] for url in asked] == [
        "/gpt2/resolve/main/tokenizer.json",
        "/someone/bpe/resolve/main/tokenizer.json",
    ]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: file)
    assert load_tokenizer("gpt2")[0].get_vocab_size() == 257
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: file)
    assert load_tokenizer("gpt2")[0].get_vocab_size() == 257


def test_identity_of_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_identity("byte", 300) == tokenizer_identity("byte", 400)
    assert tokenizer_identity("bpe", 300) != tokenizer_identity("bpe", 400)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    before = tokenizer_identity(str(tmp_path), 300)
    assert before == tokenizer_identity(str(tmp_path / "tokenizer.json"), 400)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + " ")
    assert tokenizer_identity(str(tmp_path), 300) != before
