"""What docs/ says of the code is what the code does."""

from __future__ import annotations

import pytest

from config import BadInput
from scripts import document


def test_the_table_of_regularizers_is_that_of_the_config() -> None:
    page = document.PAGE.read_text(encoding="utf-8")
    assert document.with_table(page) == page, "docs/regularizers.md is out of date: python -m scripts.document"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(BadInput, match="lacks the marks"):
        document.with_table("# Regularizers\n")
