"""Say whether a run underfits or overfits, why, and what to try next; or list every regularizer.

python -m scripts.diagnose runs/my-run
python -m scripts.diagnose their_log.csv --picture curves.png
python -m scripts.diagnose --list
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

from command_line import parse
from config import BadInput, Regularizers
from program import FINISHED, run


def main(arguments: list[str]) -> int:
    """Print the diagnosis or the table; draw the curves if asked to. Does not import torch."""
    parser = argparse.ArgumentParser("python -m scripts.diagnose", description=(__doc__ or "").split("\n")[0])
    what = "a run directory, a metrics.jsonl, or a CSV or JSONL with columns such as step, train_loss, val_loss"
    parser.add_argument("curves", nargs="?", metavar="RUN_OR_FILE", help=what)
    parser.add_argument("--picture", metavar="OUT.png", help="draw the curves, with the verdict below")
    parser.add_argument("--list", action="store_true", help="every regularizer: kind, off value, typical value, doc")
    options = parser.parse_args(arguments)
    if options.list:
        print(knobs_table(shutil.get_terminal_size((120, 40)).columns))
        return FINISHED
    if options.curves is None:
        raise BadInput("give a run directory or a file with curves, or --list")

    from evaluation.curves import read_curves
    from evaluation.diagnosis import diagnose

    path = Path(options.curves)
    records = read_curves(path)
    file = (path if path.is_dir() else path.parent) / "config.yaml"
    ours = file.is_file() and (path.is_dir() or path.name == "metrics.jsonl")
    diagnosis = diagnose(records, parse([str(file)]) if ours else None)
    print(diagnosis.text())
    if options.picture:
        import pictures

        picture = Path(options.picture)
        if not picture.parent.is_dir():
            raise BadInput(f"there is no directory {picture.parent} for the picture; make it or name another")
        pictures.curves(records, picture, path.name, diagnosis.headline)
        print(f"curves            {picture}")
    return FINISHED


def knobs_table(width: int) -> str:
    """Every knob of the regularizers section, in the order of config.py, its doc wrapped to ``width`` characters."""
    width = max(60, min(width, 140))
    rows, docs = [("knob", "kind", "off", "typical")], [""]
    for name, knob in Regularizers.model_fields.items():
        extra: Any = knob.json_schema_extra
        off, typical = (json.dumps(extra[key]).strip('"') for key in ("off", "typical"))
        rows.append((name, extra["kind"], off, typical))
        docs.append(" ".join((knob.description or "").split()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row, doc in zip(rows, docs, strict=True):
        lines.append("  ".join(map(str.ljust, row, widths)).rstrip())
        lines += textwrap.wrap(doc, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
