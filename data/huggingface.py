"""Documents of a Hugging Face dataset: by name from the hub, or a local directory of jsonl or parquet files.

Code that comes with a dataset is never run; the datasets library (>= 4) has no way to do so any more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import BadInput, Data
from data.sources import Mended, field_of, files_identity


def dataset_identity(config: Data) -> dict[str, Any]:
    """What tells one dataset from another: the knobs, and for a local directory the contents of its files."""
    identity = {"subset": config.subset, "source_split": config.source_split, "text_field": config.text_field}
    directory = Path(str(config.path))
    if not directory.is_dir():
        return {"path": config.path, **identity}
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {**identity, **files_identity(directory, files)}


def read_dataset(config: Data, mended: Mended) -> Iterator[str]:
    """The texts of the dataset's rows, mended. Raises BadInput if it cannot be found or read."""
    import datasets  # type: ignore[import-untyped]

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    what = f"dataset {config.path!r}"
    try:
        rows = datasets.load_dataset(
            str(config.path), config.subset, split=config.source_split, streaming=config.streaming
        )
        if config.text_field in (rows.column_names or []):
            rows = rows.select_columns([config.text_field])
        for number, row in enumerate(rows):
            yield field_of(row, config.text_field, f"{what}, row {number}", mended)
    except BadInput:
        raise
    except Exception as problem:  # the library and its file systems raise what they like
        reason = " ".join(str(problem).split())
        raise BadInput(
            f"cannot read {what} (subset {config.subset}, split {config.source_split}): {type(problem).__name__}: "
            f"{reason}; check data.path, data.subset, data.source_split and the network, "
            "or give a local directory of .jsonl or .parquet files"
        ) from problem
