"""Pictures whose words can be read, that show what is in the data, and that leave nothing behind when they fail."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

import pictures
from evaluation.evaluate import Calibration

FALLING = [{"step": step, "train/loss": 5 * 0.98**step, "val/loss": 5 * 0.98**step} for step in range(100)]


def test_a_smoothed_curve_does_not_lag() -> None:
    line = [3.0 - 0.01 * number for number in range(100)]
    assert pictures.smooth(line) == pytest.approx(line)
    for count in (10, 100, 1000):
        curve = [5 * math.exp(-6 * number / count) for number in range(count)]
        assert pictures.smooth(curve) == pytest.approx(curve, abs=0.05)
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(pictures.smooth(noise.tolist())) == pytest.approx(1 / 3, rel=0.2)  # nine values each
    assert pictures.smooth([]) == [] and pictures.smooth([2.0]) == [2.0]


@pytest.mark.parametrize("best", [0, 1, 50, 98, 99])
def test_the_word_of_the_best_loss_is_struck_by_no_axis(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    records = [{"step": step, "train/loss": 6.0, "val/loss": 5 - 0.01 * (step == best)} for step in range(100)]
    pictures.curves(records, Path("curves.png"), "a run")
    figures[0].draw_without_rendering()
    from matplotlib.text import Text

    words = [text.get_window_extent() for text in figures[0].findobj(Text) if text.get_text() == "best 4.9900"]
    assert len(words) == 1
    for panel in figures[0].axes:
        box, word = panel.get_window_extent(), words[0]
        inside = box.x0 < word.x0 and word.x1 < box.x1 and box.y0 < word.y0 and word.y1 < box.y1
        assert inside or not box.overlaps(word)


def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    records = [*FALLING, {"step": 100, "train/loss": math.nan, "val/loss": math.inf}, {"step": 101, "val/loss": None}]
    pictures.curves(records, tmp_path / "curves.png", "a run")
    assert pictures.column(records, "val/loss") == pictures.column(FALLING, "val/loss")


def test_names_are_no_formulas(tmp_path: Path) -> None:
    """A file may be called anything; matplotlib reads what stands between dollar signs as mathematics."""
    name = "$x^{$.txt"
    pictures.curves(FALLING, tmp_path / "1.png", name, f"well fitted: {name}")
    pictures.reliability(Calibration([2, 2], [0.6, 0.9], [0.5, 1.0]), tmp_path / "2.png", name)
    scores = np.linspace(0, 1, 9)
    pictures.uncertainty_histogram({name: (scores, scores)}, tmp_path / "3.png", name, {name: name})
    doses: Any = {"value": 1.0, "difference": 0.1, "seeds": [0.1], "baseline": False}
    pictures.save(pictures.dose_response({name: [doses]}, name), tmp_path / "4.png")
    many = [doses | {"value": 10.0**exponent} for exponent in range(9)]
    assert "mathdefault" not in pictures.svg(pictures.dose_response({name: many}, name))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    class Figure:
        def savefig(self, path: Path, **_: object) -> None:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        pictures.save(Figure(), tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


def test_the_backend_of_a_notebook_does_not_matter(tmp_path: Path) -> None:
    code = "import pictures; from pathlib import Path; pictures.curves([], Path('curves.png'), 'a run')"
    environment = os.environ | {"MPLBACKEND": "of a notebook", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
