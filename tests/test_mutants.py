"""The list of mutants fits the code: what each changes is there, once, and so are the tests that must notice."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT
from mutants import describe, listed

MUTANTS = listed()


@pytest.mark.parametrize("mutant", MUTANTS, ids=map(describe, MUTANTS))
def test_a_mutant_applies(mutant: dict[str, object]) -> None:
    assert set(mutant) == {"what", "file", "before", "after", "tests"} and mutant["tests"]
    text = (ROOT / str(mutant["file"])).read_text()
    assert text.count(str(mutant["before"])) == 1, "adapt `before` in tests/mutants.yaml to the code"
    assert mutant["before"] != mutant["after"]
    for test in mutant["tests"]:  # type: ignore[attr-defined]
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name.partition('[')[0]}\(", (ROOT / file).read_text(), re.MULTILINE), test


def test_every_mutant_has_a_description_of_its_own() -> None:
    described = [describe(mutant) for mutant in MUTANTS]
    assert len(set(described)) == len(described)
