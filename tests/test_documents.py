"""What docs/ says of the code is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from config import BadInput, Regularizers
from scripts import document

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
FORMATS = (ROOT / "docs/formats.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(document.PAGES))
def test_the_tables_are_those_of_the_code(name: str) -> None:
    page = (document.DOCS / name).read_text(encoding="utf-8")
    assert document.with_table(name) == page, f"docs/{name} is out of date: python -m scripts.document"


def test_a_page_without_marks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regularizers.md").write_text("# Regularizers\n")
    monkeypatch.setattr(document, "DOCS", tmp_path)
    with pytest.raises(BadInput, match="lacks the marks"):
        document.with_table("regularizers.md")


def documented(header: str) -> set[str]:
    """The names in the first column of all tables of docs/formats.md that begin with this header."""
    tables = re.findall(rf"^{re.escape(header)}.*\n\|-.*\n((?:\|.*\n)+)", FORMATS, re.MULTILINE)
    first_cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    return {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)}


def families(names: set[str]) -> set[str]:
    """The names, with one for all metrics of the averaged weights, and one for all of the test."""
    return {re.sub(r"^(val_average|test)/.*", r"\1/…", name) for name in names}


def test_formats_lists_what_a_run_writes(
    tiny: Callable[..., list[str]],
    train: Callable[..., Any],
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every field of a run in which all optional ones appear is in its table, and every field of a table in the run.

    The example of the page reads that run.
    """
    extras: dict[str, Any] = {name: field.json_schema_extra for name, field in Regularizers.model_fields.items()}
    names = {name: extra["typical"] for name, extra in extras.items() if extra["kind"] in ("objective", "weights")}
    names["ema_decay"] = 0.9
    knobs = {f"regularizers__{name}": value for name, value in names.items()}
    assert train(tiny(**knobs, run__dir="runs", run__teachers=f"[{whole_run}]")).returncode == 0
    run = tmp_path / "runs/tiny"
    summary = json.loads((run / "summary.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = {name for record in records for name in record}
    assert families(metrics) | {"train/spikes", "train/mfu", "train/memory_gb", "val/<source>/…"} == documented(
        "| field | unit |"
    )
    assert families(set(summary)) == documented("| field | type |")
    checkpoint = max(run.glob("checkpoints/step_*"))
    assert set(json.loads((checkpoint / "state.json").read_text())) == documented("| `state.json` |")
    corpus = tmp_path / summary["corpus_directory"]
    manifest = json.loads((corpus / "manifest.json").read_text())
    assert set(manifest) == documented("| `manifest.json` |")

    in_backticks = set(re.findall(r"`([^`\n]+)`", FORMATS))
    val = manifest["splits"]["val"]
    parts = [manifest["source"], manifest["tokenizer"], val, val["shards"][0]]
    parts += [summary["hardware"], summary["versions"], summary["attempt"]]
    files = [path.name for directory in (run, checkpoint) for path in directory.iterdir() if path.is_file()]
    assert {name for part in parts for name in part} | set(files) <= in_backticks

    (example,) = re.findall(r"```python\n(.*?)```", FORMATS, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(example, namespace)
    assert len(namespace["tokens"]) == 10
    assert sum(weight.size for weight in namespace["weights"].values()) == summary["parameters"]


@pytest.mark.parametrize("place", re.findall(r"`(\w+)`\s+\(([\w/]+\.py)\)", ARCHITECTURE), ids=" in ".join)
def test_architecture_names_what_there_is(place: tuple[str, str]) -> None:
    name, path = place
    assert re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_house_stands() -> None:
    house = re.findall(r"^\| `([\w./]+)` \|", ARCHITECTURE, re.MULTILINE)
    assert "train.py" in house and not [name for name in house if not (ROOT / name).exists()]


def test_the_example_of_contributing_fits_the_code() -> None:
    """Its diff can be applied, or taken out again by someone who has applied it."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    commands = [["git", "apply", "--check", *way] for way in ([], ["--reverse"])]
    tried = [subprocess.run(command, input=diff, cwd=ROOT, capture_output=True, text=True) for command in commands]
    assert not all(ended.returncode for ended in tried), tried[0].stderr
