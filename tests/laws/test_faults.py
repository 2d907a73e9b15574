"""Each numbered case of tests/faults/README.md is shown by a test, or the table says why it cannot be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

NUMBERS = range(1, 37)
README = ROOT / "tests/faults/README.md"


def marked(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Each test with each number that its ``@pytest.mark.fault`` names."""
    for node in ast.walk(tree):
        for decorator in getattr(node, "decorator_list", []):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault":
                for argument in decorator.args:
                    yield node.name, ast.literal_eval(argument)  # type: ignore[attr-defined]


SHOWN: dict[int, set[str]] = {}
for path in (ROOT / "tests").rglob("test_*.py"):
    for test, number in marked(ast.parse(path.read_text())):
        SHOWN.setdefault(number, set()).add(f"{path.relative_to(ROOT / 'tests')}::{test}")


def rows() -> dict[int, list[str]]:
    """The table's cells by number."""
    lines = [line for line in README.read_text().splitlines() if re.match(r"\| *\d+ *\|", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {int(row[0]): row for row in cells}


def test_the_table_has_each_case_once() -> None:
    assert list(rows()) == list(NUMBERS) and all(len(row) == 4 and all(row) for row in rows().values())


@pytest.mark.parametrize("number", NUMBERS)
def test_each_case_is_shown(number: int) -> None:
    assert number in SHOWN, f"no test carries @pytest.mark.fault({number}), and the table gives no reason"


@pytest.mark.parametrize("number", NUMBERS)
def test_the_table_names_tests_that_show_the_case(number: int) -> None:
    """A test is named as `file.py::test` below tests/, or a file alone as `file.py`."""
    named = re.findall(r"`((?:\w+/)*\w+\.py(?:::\w+)?)`", rows()[number][3])
    assert named
    for name in named:
        assert any(test == name or test.startswith(f"{name}::") for test in SHOWN.get(number, ())), name


def test_no_other_number_is_marked() -> None:
    assert set(SHOWN) <= set(NUMBERS)
    assert Path(README).is_file()
