"""Pieces: bounded, nothing lost, cut by the text alone."""

from __future__ import annotations

import random

from data.pieces import Piece, cut, whole


def test_pieces_are_bounded_and_lose_nothing() -> None:
    """Also of words, blanks and newlines without a place to cut; the flags tell where documents begin and end."""
    texts = ["one two " * 9000, "x" * 30_000, " " * 20_001, "\n" * 7000, "a\n" * 5000, "é", "", "last"]
    pieces = list(cut(((text, True) for text in texts), 1000))
    assert list(whole(pieces)) == texts
    assert all(len(piece.text) <= 1000 for piece in pieces)
    assert sum(piece.first for piece in pieces) == sum(piece.last for piece in pieces) == len(texts)
    assert [piece.first for piece in pieces[1:]] == [piece.last for piece in pieces[:-1]]
    assert [piece for piece in pieces if not piece.text] == [Piece("")]
    assert len(pieces) <= 2 * sum(map(len, texts)) / 1000 + len(texts)


def test_pieces_end_where_no_token_reaches_across() -> None:
    texts = [piece.text for piece in cut([("one two\nthree\n\nfour", True)], 8)]
    assert texts == ["one two\n", "three", "\n\nfour"]


def test_pieces_do_not_depend_on_the_fragments() -> None:
    chance = random.Random(0)
    text = "".join(chance.choice(["the", "x", "Übung", " ", "\n", "\n\n", "--"]) for _ in range(3000))
    expected = list(cut([(text, True)], 50))
    for size in (1, 7, 49, 50, 51, 1000):
        parts = [text[at : at + size] for at in range(0, len(text), size)]
        assert list(cut([*((part, False) for part in parts), ("", True)], 50)) == expected
