"""Held-out text that is given apart, and documents of train that it has, too: counted, or taken out."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from test_data_prepare import documents_of, text_config

from config import BadInput, Data
from data.copies import Copies
from data.prepare import prepare, split_of
from data.shards import Corpus

WORDS = [f"word{number}" for number in range(200)]


def rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def made(config: Data, directory: Path) -> tuple[Corpus, dict[str, list[str]]]:
    corpus = Corpus.open(prepare(config, directory / "corpora", quiet=True))
    return corpus, {name: documents_of(corpus, name) for name in corpus.manifest["splits"]}


def test_the_text_to_validate_on_may_be_given_apart(tmp_path: Path) -> None:
    """No share of the other text is held out for it then, but the test's."""
    texts, held_out = [f"text {number}" for number in range(200)], ["held", "out"]
    path, val = rows(tmp_path / "a.jsonl", texts), rows(tmp_path / "b.jsonl", held_out)
    corpus, found = made(text_config(path, val_path=str(val), test_fraction=0.2), tmp_path)
    assert found["val"] == held_out and sorted(found["train"] + found["test"]) == sorted(texts)
    assert 15 < len(found["test"]) < 65  # five standard deviations
    assert corpus.manifest["describe"] == f"{path} (1 file); validation on {val} (1 file)"
    rows(val, ["other"])
    assert made(text_config(path, val_path=str(val), test_fraction=0.2), tmp_path)[1]["val"] == ["other"]
    (tmp_path / "c.txt").write_text("0123456789")
    (tmp_path / "d.txt").write_text("held out")
    _, found = made(text_config(tmp_path / "c.txt", val_path=str(tmp_path / "d.txt"), test_fraction=0.2), tmp_path)
    assert found == {"train": ["01234567"], "val": ["held out"], "test": ["89"]}


def test_a_dataset_s_own_validation_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"text": [name, name + "2"]}) for name in ("train", "validation")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    config = Data(path=str(tmp_path / "saved"), val_split="validation", test_fraction=0, tokenizer="byte")
    assert made(config, tmp_path)[1] == {"train": ["train", "train2"], "val": ["validation", "validation2"]}


def test_white_space_around_a_document_does_not_choose_its_split(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(300)]
    assert all(split_of(text, 0.3, 0.3) == split_of(f"\n {text}\n", 0.3, 0.3) for text in texts)
    corpus, found = made(text_config(rows(tmp_path / "a.jsonl", [*texts, *(text + "\n" for text in texts)])), tmp_path)
    assert not {text.strip() for text in found["val"]} & {text.strip() for text in found["train"]}
    assert {name: split["copies"] for name, split in corpus.manifest["splits"].items()} == dict.fromkeys(
        ("train", "val", "test"), 0
    )


def test_copies_are_counted_and_dropped_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of the three held-out documents stand in train, one of them twice and with white space around it."""
    path = rows(tmp_path / "a.jsonl", ["one", "two", " one\n", "three", "one"])
    val = rows(tmp_path / "b.jsonl", ["one", "three", "four"])
    config = text_config(path, val_path=str(val), test_fraction=0)
    corpus, found = made(config, tmp_path)
    assert corpus.manifest["splits"]["val"]["copies"] == 2 and len(found["train"]) == 5
    prepare(config, tmp_path / "again")
    assert "; 2 of the documents are in train, too (data.copies=drop" in capsys.readouterr().out
    corpus, found = made(config.model_copy(update={"copies": "drop"}), tmp_path)
    assert found == {"train": ["two"], "val": ["one", "three", "four"]}
    assert corpus.manifest["splits"]["val"]["copies"] == 0
    assert "4 documents of train left out that a held-out split has" in corpus.manifest["replaced"]


def test_files_that_are_all_the_same_are_told_of(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text("the same text in each file")
    corpus, _ = made(text_config(tmp_path / "*.txt", val_fraction=0.1, test_fraction=0.05), tmp_path)
    assert corpus.manifest["splits"]["val"]["copies"] == 2


def test_near_copies_share_nearly_all_sequences_of_five_words(tmp_path: Path) -> None:
    """Of 196 sequences one changed word changes 5: Jaccard 191/201 = 0.95; with 20 changed words apart 96/296 = 0.3."""
    text = " ".join(WORDS)
    near, far = list(WORDS), list(WORDS)
    near[100] = "other"
    far[::10] = ["other"] * 20
    held_out = Copies([text, "a b"], near=True)
    assert text in held_out and f" {text}\n" in held_out and " ".join(near) in held_out
    assert " ".join(far) not in held_out and " ".join(reversed(WORDS)) not in held_out
    assert " ".join(near) not in Copies([text], near=False)
    path, val = rows(tmp_path / "a.jsonl", [" ".join(near), " ".join(far)]), rows(tmp_path / "b.jsonl", [text])
    _, found = made(text_config(path, val_path=str(val), test_fraction=0, copies="drop_near"), tmp_path)
    assert found == {"train": [" ".join(far)], "val": [text]}


def test_near_copies_without_their_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(BadInput, match="needs datasketch: pip install"):
        Copies([], near=True)


def test_short_documents_are_left_out(tmp_path: Path) -> None:
    path, val = rows(tmp_path / "a.jsonl", ["1234", " 12 ", "12345"]), rows(tmp_path / "b.jsonl", ["12", "123"])
    corpus, found = made(text_config(path, val_path=str(val), test_fraction=0, min_characters=3), tmp_path)
    assert found == {"train": ["1234", "12345"], "val": ["123"]}
    assert "2 documents left out that are too short" in corpus.manifest["replaced"]
