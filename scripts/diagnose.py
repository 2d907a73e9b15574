"""Say whether a run underfits or overfits, why, and what to try next; or list every regularizer.

python -m scripts.diagnose runs/my-run
python -m scripts.diagnose their_log.csv --picture curves.png
python -m scripts.diagnose --list
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from pathlib import Path

from command_line import parse
from config import BadInput, Config, Regularizers
from program import FINISHED, run


def main(arguments: list[str]) -> int:
    """Print the diagnosis or the table; draw the curves if asked to. Does not import torch."""
    parser = argparse.ArgumentParser("python -m scripts.diagnose", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "curves",
        nargs="?",
        metavar="RUN_OR_FILE",
        help="a run directory, a metrics.jsonl, or a CSV or JSONL with columns such as step, train_loss, val_loss",
    )
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

    records = read_curves(options.curves)
    diagnosis = diagnose(records, config_of(Path(options.curves)))
    print(diagnosis.text())
    if options.picture:
        import pictures

        picture = Path(options.picture)
        if not picture.parent.is_dir():
            raise BadInput(f"there is no directory {picture.parent} for the picture; make it or name another")
        pictures.curves(records, picture, Path(options.curves).name, diagnosis.headline)
        print(f"curves            {picture}")
    return FINISHED


def config_of(path: Path) -> Config | None:
    """The config that lies beside the curves; None for other people's files."""
    file = (path if path.is_dir() else path.parent) / "config.yaml"
    if not file.is_file() or not (path.is_dir() or path.name == "metrics.jsonl"):
        return None
    return parse([str(file)])


def knobs_table(width: int) -> str:
    """Every knob of the regularizers section, in the order of config.py, its doc wrapped to ``width`` characters."""
    width = max(60, min(width, 140))
    rows = [("knob", "kind", "off", "typical")]
    docs = [""]
    for name, field in Regularizers.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), f"{name} declares no kind"
        rows.append((name, str(extra["kind"]), written(extra["off"]), written(extra["typical"])))
        docs.append(" ".join((field.description or "").split()))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row, doc in zip(rows, docs, strict=True):
        lines.append("  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip())
        lines += textwrap.wrap(doc, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def written(value: object) -> str:
    """A value as one would write it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(main)
