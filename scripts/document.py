"""Write the table of all regularizers, as config.py declares them, into docs/regularizers.md.

python -m scripts.document
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from command_line import type_text
from config import BadInput, Regularizers
from program import FINISHED, run

PAGE = Path(__file__).parent.parent / "docs/regularizers.md"
BEGIN, END = "<!-- table: written by python -m scripts.document -->\n", "<!-- end of the table -->\n"


def main(arguments: list[str]) -> int:
    """Write the table; the text around it stays."""
    parser = argparse.ArgumentParser("python -m scripts.document", description=(__doc__ or "").split("\n")[0])
    parser.parse_args(arguments)
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written           {PAGE}")
    return FINISHED


def with_table(page: str) -> str:
    """The page with the table between its two marks made anew. Raises BadInput when a mark is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadInput(f"{PAGE} lacks the marks around its table: {BEGIN.strip()} and {END.strip()}; restore them")
    return before + begin + table() + end + after


def table() -> str:
    """Every knob of the regularizers section as a row of Markdown, in the order of config.py."""
    rows = [["knob", "kind", "off", "typical", "range", "what it does"], ["---"] * 6]
    for name, field in Regularizers.model_fields.items():
        declared: Any = field.json_schema_extra
        values = [*(json.dumps(declared[key]).strip('"') for key in ("off", "typical")), type_text(field)]
        doc = " ".join((field.description or "").split())
        rows.append([f"`{name}`", declared["kind"], *(f"`{value}`" for value in values), doc])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


if __name__ == "__main__":
    run(main)
