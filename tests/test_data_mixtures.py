"""Mixtures: several texts in one run. One source is that text alone; bits survive kills; processes change nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, made_up_text
from test_data_loader import stream
from test_run import numbers, weights

from config import BadInput, Data, Source
from data.loader import Samples, TrainingLoader
from data.mixtures import mixture, open_data, prepare_all
from data.shards import Corpus, Portion
from scripts import prepare_data
from scripts.evaluate import main as evaluate

Train = Callable[..., subprocess.CompletedProcess[str]]
Flags = Callable[..., list[str]]
WEIGHTS = [0.6, 0.3, 0.1]


def loader_of(directory: Path, sizes: list[int], weights: list[float], epochs: list[float | None]) -> TrainingLoader:
    """Of streams of so many tokens; windows of 4, 3 a step."""
    corpus = Corpus(directory, {}, "", 256, 255)
    portions = [
        Portion(corpus, stream(directory, size), str(number), weight, limit)
        for number, (size, weight, limit) in enumerate(zip(sizes, weights, epochs, strict=True))
    ]
    return TrainingLoader(portions, Data(), 0, 4, 3)


def test_a_window_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    """Each source gives what it would give alone, in its own order; who asks, and for what before, is the same."""
    sizes = [90, 45, 200]
    loader = loader_of(tmp_path, sizes, WEIGHTS, [None] * 3)
    alone = [Samples(stream(tmp_path, size), Data(), 0, 4) for size in sizes]
    given = [0, 0, 0]
    for step in range(60):
        whole = loader.batch(step)
        fresh = loader_of(tmp_path, sizes, WEIGHTS, [None] * 3)
        parts = [fresh.batch(step, index, 1) for index in (2, 0, 1)]
        assert torch.equal(whole.tokens_BT[[2, 0, 1]], torch.cat([part.tokens_BT for part in parts]))
        for tokens, sample in zip(whole.tokens_BT, whole.sample_ids_B.tolist(), strict=True):
            source = sample % 3
            own, begin, own_id = alone[source].sample(given[source])
            assert sample == own_id * 3 + source and tokens.tolist() == own.read(begin, begin + 4).tolist()
            given[source] += 1
            if sum(given) % 3 == 0:
                assert given == loader.windows_read(step + 1)
        for count, weight in zip(given, WEIGHTS, strict=True):
            assert abs(count - weight * 3 * (step + 1)) < 1
    assert loader.windows_per_epoch == 21 + 10 + 48 and loader.n_tokens == 335


def test_one_source_is_that_source(tmp_path: Path) -> None:
    mixed = loader_of(tmp_path, [90], [0.3], [None])
    alone = TrainingLoader(stream(tmp_path, 90), Data(), 0, 4, 3)
    for step in (0, 6, 7, 1000):
        ours, theirs = mixed.batch(step), alone.batch(step)
        assert torch.equal(ours.targets_BT, theirs.targets_BT) and (ours.sample_ids_B == theirs.sample_ids_B).all()


def test_epochs_are_kept_to_and_their_end_is_told(tmp_path: Path) -> None:
    """Sources of 10 and 20 windows, the first for one pass, at equal weights: from window 20 on there is the other."""
    loader = loader_of(tmp_path, [45, 85], [1, 1], [1, 2])
    sources = np.concatenate([loader.batch(step).sample_ids_B % 2 for step in range(16)])
    assert sources[:20].tolist() == [0, 1] * 10 and (sources[20:] == 1).all()
    assert loader.batches(range(17), range(1), 3, torch.device("cpu")).current  # 50 windows are 17 steps, cut to 16.7
    with pytest.raises(BadInput, match=r"to have 18 steps, and after 17 all data\.sources are read"):
        loader.batches(range(18), range(1), 3, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- preparation


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Three texts of different words and sizes."""
    files = [tmp_path / f"{name}.txt" for name in ("plays", "code", "letters")]
    for seed, file in enumerate(files):
        file.write_text(made_up_text(8_000 * (seed + 1), seed).replace("cat", "bdk"[seed] + "at" * (seed + 1)))
    return files


def sources_of(texts: list[Path], **more: object) -> list[dict[str, object]]:
    return [{"path": str(text), "weight": weight} | more for text, weight in zip(texts, WEIGHTS, strict=False)]


def test_a_bpe_is_trained_on_all_sources_together(texts: list[Path], tmp_path: Path) -> None:
    data = Data(sources=sources_of(texts), vocab_size=300)  # type: ignore[arg-type]
    corpora = tmp_path / "corpora"
    corpus = open_data(data, corpora, quiet=True)
    assert [source.name for source, _ in corpus.sources] == ["plays", "code", "letters"]
    shas = {one.manifest["tokenizer"]["sha256"] for _, one in corpus.sources}
    assert len(shas) == 1 and corpus.vocab_size == len(corpus.tokenizer().get_vocab())
    vocabulary = corpus.tokenizer().get_vocab()
    assert {"Ġbat", "Ġdatat"} <= set(vocabulary), "words that only the first and the second text have"
    before = {path: path.stat().st_mtime_ns for path in corpora.rglob("*.safetensors")}
    assert open_data(data, corpora, quiet=True).fingerprint == corpus.fingerprint
    other = data.model_copy(update={"sources": [Source(path=str(text)) for text in texts]})
    assert open_data(other, corpora, quiet=True).fingerprint == corpus.fingerprint, "weights change no text"
    assert {path: path.stat().st_mtime_ns for path in corpora.rglob("*.safetensors")} == before

    # ------------------------------------------------------------ a prepared corpus says which tokenizer it is
    (more := tmp_path / "more.txt").write_text(made_up_text(9_000, 9))
    there = corpus.sources[1][1].directory
    mixed = Data(sources=[Source(path=str(more)), Source(path=str(there))])
    found = [Corpus.open(directory) for directory in prepare_all(mixed, corpora, quiet=True)]
    assert found[1].directory == there and {one.manifest["tokenizer"]["sha256"] for one in found} == shas


def test_what_does_not_go_together_is_refused(texts: list[Path], tmp_path: Path) -> None:
    byte = [Corpus.open(path) for path in prepare_all(Data(path=str(texts[0]), tokenizer="byte"), tmp_path, True)]
    bpe = [Corpus.open(path) for path in prepare_all(Data(path=str(texts[1]), vocab_size=300), tmp_path, True)]
    named = [Source(path="a"), Source(path="b")]
    with pytest.raises(BadInput, match=r"have different tokenizers; prepare one .*data\.tokenizer="):
        mixture(named, [*byte, *bpe])
    with pytest.raises(BadInput, match=r"two of data\.sources are called plays; give each a name"):
        mixture(named, [*byte, *byte])
    mixed = mixture([Source(path="a"), Source(path="b", name="again")], [*byte, *byte])
    with pytest.raises(BadInput, match=r"mixture \(plays, again\)"):
        mixed.split("val")
    for knobs in ({"path": "x"}, {"corpus": "text", "path": "x"}, {"corpus": "stdlib"}):
        with pytest.raises(ValueError, match=r"data\.sources takes the place of data\.path"):
            Data(sources=[Source(path="a")], **knobs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"share of 9\.9.*e-05 of all windows is below 0\.0001"):
        Data(sources=[Source(path="a"), Source(path="b", weight=0.00009902)])


def test_prepare_data_prepares_each(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flag = f"--data.sources={json.dumps(sources_of(texts))}"
    prepare_data.main([flag, "--data.tokenizer=byte"])
    assert capsys.readouterr().out.count("hash of its contents") == 3
    with pytest.raises(BadInput, match=r"prepare one corpus; give data\.path, source by source"):
        prepare_data.main([flag, "--shard=0/2"])


# ---------------------------------------------------------------------------------------------- runs


@pytest.fixture
def mixed(tiny: Flags, texts: list[Path]) -> Flags:
    """Flags of a tiny run on the three texts."""

    def flags(**knobs: object) -> list[str]:
        words = tiny(**{"data__sources": json.dumps(sources_of(texts)), "regularizers__residual_dropout": 0.1, **knobs})
        return [word for word in words if not word.startswith(("--data.path", "--data.corpus"))]

    return flags


def test_a_run_reports_each_source_and_all(
    mixed: Flags, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = train(mixed())
    assert ended.returncode == 0, ended.stderr
    assert "source     plays: 60.42% of the windows, 0.52 passes" in ended.stdout  # 116 of 192; its text has 225
    run = tmp_path / "runs/tiny"
    summary = json.loads((run / "summary.json").read_text())
    assert [entry["name"] for entry in summary["sources"]] == ["plays", "code", "letters"]
    last = numbers(run)[-1]
    targets = [
        json.loads((tmp_path / entry["corpus_directory"] / "manifest.json").read_text())["splits"]["val"]["tokens"] - 1
        for entry in summary["sources"]
    ]
    for name in ("loss", "accuracy", "entropy", "log_z", "brier"):  # every target counts alike
        parts = [last[f"val/{source}/{name}"] for source in ("plays", "code", "letters")]
        assert (
            last[f"val/{name}"] == pytest.approx(np.average(parts, weights=targets), rel=1e-9) and len(set(parts)) == 3
        )
    assert last["val/bits_per_byte"] == pytest.approx(last["val/loss"] / np.log(2), rel=1e-9)
    assert {f"test/{source}/loss" for source in ("plays", "code", "letters")} | {"test/loss"} <= summary.keys()
    monkeypatch.chdir(tmp_path)
    assert evaluate([str(run)]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["test"]["model"]["loss"] == pytest.approx(summary["test/loss"], rel=1e-6)
    assert found["test"]["model"]["code/loss"] == pytest.approx(summary["test/code/loss"], rel=1e-6)
    with pytest.raises(BadInput, match="cannot be had for a mixture"):
        evaluate([str(run), "--mc_samples=2"])
    (entry := json.loads(mixed()[-2].partition("=")[2]))[0]["weight"] = 0.7
    other = {"data__sources": json.dumps(entry), "training__max_steps": 30}
    changed = train(mixed(**other))
    assert changed.returncode == 2 and "data.sources: the run has [{" in changed.stderr
    branch = train(mixed(run__branch_from=run, run__name="branch", **other))
    assert branch.returncode == 2 and "use --data.sources=[{" in branch.stderr


def test_of_one_source_it_is_the_run_on_that_text_bit_for_bit(
    tiny: Flags, mixed: Flags, texts: list[Path], train: Train, tmp_path: Path
) -> None:
    for knobs in ({"data__tokenizer": "byte"}, {"data__tokenizer": "bpe", "data__vocab_size": 300}):
        kind = knobs["data__tokenizer"]
        one = mixed(run__name=f"one-{kind}", data__sources=json.dumps(sources_of(texts[:1])), **knobs)
        alone = tiny(run__name=f"alone-{kind}", data__path=texts[0], regularizers__residual_dropout=0.1, **knobs)
        assert not any(train(flags).returncode for flags in (one, alone))
        ours, theirs = (tmp_path / f"runs/{name}-{kind}" for name in ("one", "alone"))
        assert weights(ours) == weights(theirs)
        plain = [{key: value for key, value in record.items() if "/plays/" not in key} for record in numbers(ours)]
        assert plain == numbers(theirs) and numbers(ours) != plain
        assert numbers(ours)[-1]["val/plays/loss"] == numbers(ours)[-1]["val/loss"]


def test_killed_and_gone_on_with_it_ends_the_same(mixed: Flags, train: Train, tmp_path: Path) -> None:
    assert train(mixed(run__name="whole", checkpoint__every=4)).returncode == 0
    killed = train(mixed(checkpoint__every=4), WELLPOSED_FAULT="save-begin:0:20:kill")
    assert killed.returncode == -9
    assert train(mixed(checkpoint__every=4)).returncode == 0
    whole, again = tmp_path / "runs/whole", tmp_path / "runs/tiny"
    assert weights(whole) == weights(again) and numbers(whole) == numbers(again)
    samples = [json.loads((run / "summary.json").read_text())["samples"] for run in (whole, again)]
    assert samples[0] == samples[1]


def test_on_two_processes_it_is_the_same_run(mixed: Flags, train: Train, tmp_path: Path) -> None:
    knobs = {"training__micro_batch_size": 2, "tracking__log_every": 1, "training__max_steps": 12}
    assert train(mixed(run__name="on1", **knobs)).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [str(ROOT / "train.py"), *mixed(run__name="on2", **knobs)]
    ended = subprocess.run([*command, *flags], cwd=tmp_path, env=os.environ, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    one, two = tmp_path / "runs/on1", tmp_path / "runs/on2"
    samples = [json.loads((run / "summary.json").read_text())["samples"] for run in (one, two)]
    assert samples[0] == samples[1]
    names = [f"{name}" for name in numbers(one)[-1] if name.endswith("loss")]
    assert {f"val/{source}/loss" for source in ("plays", "code", "letters")} <= set(names)
    for (ours, theirs), name in product(zip(numbers(one), numbers(two), strict=True), names):
        if name in ours:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)
