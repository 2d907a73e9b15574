"""A tiny run is trained with dropout and averaged weights, and evaluated as a user would."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config import BadInput
from scripts.evaluate import main
from tracking.load_run import load_corpus, load_model

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]


@pytest.fixture
def run(train: Train, tiny: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the directory where we are, and a foreign text beside it."""
    knobs = {"regularizers.residual_dropout": 0.2, "regularizers.ema_decay": 0.8}
    ended = train(tiny(**knobs))
    assert ended.returncode == 0, ended.stderr
    (tmp_path / "foreign.txt").write_text("Ωμέγα καὶ ἄλφα 0123456789 " * 40)
    monkeypatch.chdir(tmp_path)
    return Path("runs/tiny")


def test_from_end_to_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())

    # ------------------------------------------------------------ val and test, raw and averaged
    assert main([str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["weights"] == "average" and found["checkpoint"] == f"step_{summary['best/step']:08d}"
    assert found["val"]["average"]["loss"] == pytest.approx(summary["best/val/loss"], rel=1e-6)
    assert found["test"]["average"]["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    for results in (*found["val"].values(), *found["test"].values()):  # one document, in which each target is a byte
        assert results["bits_per_byte"] == pytest.approx(results["loss"] / math.log(2), rel=1e-12)
    for split, prefix in (("val", "best/val"), ("test", "test")):
        bits = found[split]["average"]["bits_per_byte"]
        assert summary[f"{prefix}/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    raw = next(line["val/loss"] for line in lines if line["step"] == summary["best/step"] and "val/loss" in line)
    assert found["val"]["model"]["loss"] == pytest.approx(raw, rel=1e-6) and raw != summary["best/val/loss"]
    assert set(found["val"]["model"]) >= {"loss", "perplexity", "bits_per_byte", "accuracy", "ece", "brier", "entropy"}
    told = capsys.readouterr().out
    assert f"{found['test']['average']['ece']:.4f}" in told and "val, averaged" in told
    assert (run / "reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "mc_samples" not in found and not (run / "uncertainty.png").exists()

    # ------------------------------------------------------------ uncertainty, on foreign text too
    assert main([str(run), "--mc_samples", "3", "--ood", "foreign.txt", "--split", "val", "--max_tokens", "300"]) == 0
    first = json.loads((run / "evaluation.json").read_text())
    bits = first["val"]["average"]["bits_per_byte"]
    assert bits == pytest.approx(first["val"]["average"]["loss"] / math.log(2), rel=1e-12)
    assert "test" not in first and first["max_tokens"] == 300 and first["foreign"]["tokens"] == 300
    assert first["foreign"]["mc"]["mc/nll"] > first["val"]["mc"]["mc/nll"], "bytes that training has never seen"
    assert 0 <= first["foreign"]["auroc/mutual_information"] <= 1
    told = capsys.readouterr().out
    assert f"AUROC             {first['foreign']['auroc/predictive_entropy']:.4f} by predictive entropy" in told
    assert (run / "uncertainty.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(run), "--ood", "foreign.txt", "--mc_samples", "3", "--split", "val", "--max_tokens", "300"]) == 0
    assert json.loads((run / "evaluation.json").read_text()) == first

    # ------------------------------------------------------------ the weights that can be asked for
    average, _, _ = load_model(run)
    assert torch.equal(average.embedding.weight, load_model(run, weights="average")[0].embedding.weight)
    assert not torch.equal(average.embedding.weight, load_model(run, weights="model")[0].embedding.weight)

    # ------------------------------------------------------------ mistakes
    for words, message in (
        (["--mc_samples", "0"], "at least 1"),
        (["--max_tokens", "1"], "at least 2"),
        (["--ood", "nowhere.txt"], "nowhere.txt"),
    ):
        with pytest.raises(BadInput, match=message):
            main([str(run), *words])
    other = json.loads((run / "summary.json").read_text()) | {"corpus": "another"}
    (run / "summary.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match="was trained on another"):
        main([str(run)])
    (run / "summary.json").write_text(json.dumps(summary | {"corpus_directory": "corpora/gone"}))
    with pytest.raises(BadInput, match=r"corpora/gone; start in the directory .* scripts\.prepare_data .*config\.yaml"):
        load_corpus(run)


def test_a_run_without_dropout_or_average(
    train: Train, tiny: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = {"training__max_steps": "null", "training__max_epochs": 0.03, "schedule__warmup_steps": 9}
    ended = train(tiny(data__test_fraction=0, **length))
    assert ended.returncode == 0 and "warmup_steps is 9, and the run has 2 steps: it warms up in 1" in ended.stderr
    monkeypatch.chdir(tmp_path)
    assert main(["runs/tiny"]) == 0
    found = json.loads(Path("runs/tiny/evaluation.json").read_text())
    assert found["weights"] == "model" and "test" not in found and set(found["val"]) == {"model"}
    with pytest.raises(BadInput, match="trained with dropout"):
        main(["runs/tiny", "--mc_samples", "2"])
    with pytest.raises(BadInput, match="no test split"):
        main(["runs/tiny", "--split", "test"])
    with pytest.raises(BadInput, match="no averaged weights"):
        load_model("runs/tiny", weights="average")
