"""Write the tables of all regularizers and of all keys of a study file, as the code declares them, into docs/.

python -m scripts.document
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from command_line import default_text, type_text
from config import BadInput, Regularizers
from program import FINISHED, run
from studies.space import EXAMPLES, keys

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- table: written by python -m scripts.document -->\n", "<!-- end of the table -->\n"


def main(arguments: list[str]) -> int:
    """Write the tables; the text around them stays."""
    parser = argparse.ArgumentParser("python -m scripts.document", description=(__doc__ or "").split("\n")[0])
    parser.parse_args(arguments)
    for name in PAGES:
        (DOCS / name).write_text(with_table(name), encoding="utf-8")
        print(f"written           {DOCS / name}")
    return FINISHED


def with_table(name: str) -> str:
    """The page with the table between its two marks made anew. Raises BadInput when a mark is missing."""
    before, begin, rest = (DOCS / name).read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadInput(f"{DOCS / name} lacks the marks around its table: {BEGIN.strip()}, {END.strip()}; restore them")
    return before + begin + PAGES[name]() + end + after


def study_keys() -> str:
    """Every key of a study file as a row of Markdown, and an example for each search."""
    rows = [["key", "default", "type", "what it says"], ["---"] * 4]
    for name, field in keys().items():
        default = "" if field.is_required() else f"`{default_text(field)}`"
        rows.append([f"`{name}`", default, f"`{type_text(field)}`", " ".join((field.description or "").split())])
    examples = (f"\n{search}:\n\n```yaml\n{example}```\n" for search, example in EXAMPLES.items())
    return markdown(rows) + "".join(examples)


def regularizers() -> str:
    """Every knob of the regularizers section as a row of Markdown, in the order of config.py."""
    rows = [["knob", "kind", "off", "typical", "range", "what it does"], ["---"] * 6]
    for name, field in Regularizers.model_fields.items():
        declared: Any = field.json_schema_extra
        values = [*(json.dumps(declared[key]).strip('"') for key in ("off", "typical")), type_text(field)]
        doc = " ".join((field.description or "").split())
        rows.append([f"`{name}`", declared["kind"], *(f"`{value}`" for value in values), doc])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """A table."""
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


PAGES = {"regularizers.md": regularizers, "studies.md": study_keys}


if __name__ == "__main__":
    run(main)
