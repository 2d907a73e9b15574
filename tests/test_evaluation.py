"""Evaluation against torch and torchmetrics, a hand-worked calibration, and its independence of the batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from command_line import parse
from config import Config
from data.loader import EvaluationBatches
from data.prepare import prepare
from data.shards import Corpus
from evaluation.evaluate import Sums, evaluate
from evaluation.judge import Judge
from hardware import Hardware
from model.gpt import GPT
from tracking.console import evaluation_line
from training.learner import Learner

ALONE = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Corpus:
    flags = ["--data.corpus=text", f"--data.path={text_file}", "--data.tokenizer=byte", "--data.split=tail"]
    return Corpus.open(prepare(parse(flags).data, tmp_path_factory.mktemp("corpora"), quiet=True))


@pytest.fixture(scope="module")
def model(corpus: Corpus) -> GPT:
    shape = ["--model.n_layers=1", "--model.d_model=16", "--model.n_heads=2", "--model.context_length=16"]
    config = parse([*shape, "--model.tie_embeddings=false"])
    model = GPT(config.model, corpus.vocab_size).initialize(3)
    with torch.no_grad():  # sharp enough for confidences over many bins
        model.output_weight.mul_(50)
    return model


def plain(model: GPT, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Logits and targets of the val split, window by window, without our batches."""
    split = corpus.split("val")
    stream = torch.from_numpy(split.read(0, split.n_tokens))
    logits, targets = [], []
    with torch.no_grad():
        for start in range(0, len(stream) - 1, 16):
            window = stream[start : start + 17]
            logits.append(model.logits(model(window[None, :-1]))[0])
            targets.append(window[1:])
    return torch.cat(logits).double(), torch.cat(targets)


def test_every_metric_against_torch_and_torchmetrics(model: GPT, corpus: Corpus) -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    logits, target = plain(model, corpus)
    split = corpus.split("val")
    assert len(target) == split.n_tokens - 1
    found, calibration = evaluate(model, EvaluationBatches(split, 16, 4), ALONE, corpus.bytes_per_token(split))
    loss, p = F.cross_entropy(logits, target).item(), logits.softmax(-1)
    one_hot = F.one_hot(target, logits.shape[-1])
    expected = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss * len(target) / math.log(2) / split.n_bytes,
        "accuracy": multiclass_accuracy(p, target, num_classes=p.shape[1], average="micro").item(),
        "ece": multiclass_calibration_error(p, target, num_classes=p.shape[1], n_bins=15, norm="l1").item(),
        "brier": ((p - one_hot) ** 2).sum(-1).mean().item(),
        "entropy": torch.distributions.Categorical(logits=logits).entropy().mean().item(),
        "log_z": logits.logsumexp(-1).mean().item(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-5), name
    assert sum(calibration.tokens) == len(target) and sum(tokens > 0 for tokens in calibration.tokens) > 5


def test_calibration_and_brier_by_hand() -> None:
    """Four tokens, two classes. Confidences 0.9, 0.9, 0.6, 0.6; the first, second and third are right.

    Bin of 0.9: accuracy 1, |1 − 0.9| = 0.1. Bin of 0.6: accuracy 0.5, |0.5 − 0.6| = 0.1. ECE = 0.1.
    Brier: right at 0.9: 0.01 + 0.01; right at 0.6: 0.16 + 0.16; wrong at 0.6: 0.36 + 0.36. Mean 0.27.
    """
    from evaluation.evaluate import Calibration

    p = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.6, 0.4], [0.6, 0.4]])
    sums = Sums(ALONE.device)
    sums.add_logits(p.log(), torch.tensor([0, 1, 0, 1]))
    count, _, correct, brier, _, log_z = sums.totals.tolist()
    assert (count, correct) == (4, 3) and log_z == pytest.approx(0, abs=1e-6)
    assert brier / count == pytest.approx(0.27, abs=1e-6)
    filled = [(int(n), c / n, a / n) for n, c, a in sums.bins.T.tolist() if n]
    assert filled == [pytest.approx((2, 0.6, 0.5)), pytest.approx((2, 0.9, 1.0))]
    found = Calibration([2, 2], [0.6, 0.9], [0.5, 1.0])
    assert found.error == pytest.approx(0.1)


def test_a_confidence_between_two_bins_belongs_to_the_lower_one(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bins are ((m-1)/M, m/M] (Guo 2017). Of two tokens that share everything each has exactly 1/2 = 2/4."""
    monkeypatch.setattr("evaluation.evaluate.BINS", 4)
    flags = ["--model.family=gpt2", "--model.tie_embeddings=false", "--model.d_model=8", "--model.context_length=16"]
    model = GPT(parse(flags).model, corpus.vocab_size).initialize(0)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.copy_(torch.eye(8)[0])
        model.output_weight.zero_()
        model.output_weight[2:, 0] = -1000.0
    _, calibration = evaluate(model, EvaluationBatches(corpus.split("val"), 16, 4), ALONE, 1.0)
    assert calibration.tokens == [0, corpus.split("val").n_tokens - 1, 0, 0]


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_batch_size_changes_nothing(size: int, model: GPT, corpus: Corpus) -> None:
    one, _ = evaluate(model, EvaluationBatches(corpus.split("val"), 16, 4), ALONE, 1.0)
    other, _ = evaluate(model, EvaluationBatches(corpus.split("val"), 16, size), ALONE, 1.0)
    assert other == pytest.approx(one, rel=1e-6)


def test_mode_and_chunks(model: GPT, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: Callable[[], object] = lambda: EvaluationBatches(corpus.split("val"), 16, 4, 200)  # noqa: E731
    model.train()
    whole, _ = evaluate(model, batches(), ALONE, 1.0)
    assert model.training
    monkeypatch.setattr("evaluation.evaluate.CHUNK_ELEMENTS", 7 * corpus.vocab_size)
    parts, _ = evaluate(model.eval(), batches(), ALONE, 1.0)
    assert not model.training and parts == pytest.approx(whole, rel=1e-6)


def test_every_process_makes_as_many_passes_and_each_token_counts_once(
    model: GPT, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight batches on three processes: three passes each, of which one counts nothing."""
    batches, passes = EvaluationBatches(corpus.split("val"), 16, 10), []
    assert len(batches) == 8
    added: list[Tensor] = []
    monkeypatch.setattr("evaluation.evaluate.total", lambda values, _: added.append(values) or values)
    hook = model.register_forward_hook(lambda *_: passes.append(None))
    for rank in range(3):
        evaluate(model, batches, Hardware(rank, 3, ALONE.device, "fp32", False, 1), 1.0)
        assert len(passes) == 3 * (rank + 1)
    hook.remove()
    shared = sum(added[::2]), sum(added[1::2])
    evaluate(model, batches, ALONE, 1.0)
    for ours, theirs in zip(shared, added[-2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("isolated", [False, True])
def test_a_model_is_compiled_once_for_all_batches(isolated: bool, model: GPT, corpus: Corpus) -> None:
    """62 windows and a rest of 7 tokens, ten at a time; what fills the last batches up is not counted."""
    batches = EvaluationBatches(corpus.split("val"), 16, 10, isolate_documents=isolated)
    expected, calibration = evaluate(model, batches, ALONE, 1.0)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, backend=count)
    hardware = Hardware(0, 1, ALONE.device, "fp32", True, 1)
    found, same = evaluate(model, batches, hardware, 1.0, forward=compiled)
    assert len(graphs) == 1
    assert same.tokens == calibration.tokens and found == pytest.approx(expected, rel=1e-6)


def test_the_output_matrix_is_read_after_the_pass(model: GPT, corpus: Corpus) -> None:
    """Sharded weights are gathered for the pass; here the matrix is another one until then."""
    batches = EvaluationBatches(corpus.split("val"), 16, 4, 200)
    expected, _ = evaluate(model, batches, ALONE, 1.0)
    whole = model.output_weight.data
    hook = model.register_forward_hook(lambda *_: setattr(model.output_weight, "data", whole))
    model.output_weight.data = torch.zeros_like(whole)
    found, _ = evaluate(model, batches, ALONE, 1.0)
    hook.remove()
    assert found == expected


def test_a_run_evaluates_with_the_compiled_model_and_a_batch_size_of_its_own(
    tiny: Callable[..., list[str]], tmp_path: Path
) -> None:
    """1,001 val tokens in windows of 32 are 31 and a rest: of 16 at a time three batches, of 5 eight."""
    for size, passes in ((None, 3), (5, 8)):
        config = parse(tiny(evaluation__batch_size=size or "null", evaluation__sample_tokens=0))
        corpus = Corpus.open(prepare(config.data, tmp_path / "corpora", quiet=True))
        model = GPT(config.model, corpus.vocab_size).initialize(0)
        learner = Learner(model, config, ALONE, 24, 1.0)
        seen: list[bool] = []
        learner.forward = lambda *inputs, model=model, seen=seen: seen.append(model.training) or model(*inputs)
        Judge(corpus, [corpus.split("train")], config)(learner, 1)
        assert seen == [False] * 2 * passes  # val, and for the gap the training text


def test_the_run_says_what_it_will_evaluate() -> None:
    line = evaluation_line(Config(), 500, 500_000_000)
    assert line.endswith(
        "the first 2,000,000 of 500,000,000 val tokens and as many of training, every 500 steps and at the end"
    )
    line = evaluation_line(parse(["--evaluation.max_tokens=null"]), "epoch", 4096)
    assert line.endswith("all 4,096 val tokens and as many of training, each epoch and at the end")


def test_every_process_writes_a_sample(
    tiny: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.evaluate.total", lambda values, _: values)
    config = parse(tiny(training__micro_batch_size=4))
    corpus = Corpus.open(prepare(config.data, tmp_path / "corpora", quiet=True))
    model = GPT(config.model, corpus.vocab_size).initialize(0)
    judge = Judge(corpus, [corpus.split("train")], config)
    samples = []
    for rank in range(2):
        learner = Learner(model, config, Hardware(rank, 2, ALONE.device, "fp32", False, 1), 24, 1.0)
        samples.append(judge(learner, 1).record["sample"])
    assert samples[0] == samples[1]


def test_a_terminal_sees_that_it_is_evaluated(
    model: GPT, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = EvaluationBatches(corpus.split("val"), 16, 4, 200)
    evaluate(model, batches, ALONE, 1.0)
    assert not capsys.readouterr().err, "a log file wants no bars"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    evaluate(model, batches, ALONE, 1.0, "val, averaged")
    assert "val, averaged" in capsys.readouterr().err


def test_uniform_model_is_ln_v(corpus: Corpus, model: GPT) -> None:
    flat = GPT(model.config, corpus.vocab_size).initialize(0)
    with torch.no_grad():
        flat.output_weight.zero_()
    found, _ = evaluate(flat, EvaluationBatches(corpus.split("val"), 16, 4), ALONE, 1.0)
    assert found["loss"] == pytest.approx(math.log(257), rel=1e-6)
    assert found["entropy"] == pytest.approx(math.log(257), rel=1e-6)
    assert found["brier"] == pytest.approx(1 - 1 / 257, rel=1e-5)


def test_bytes_of_a_stretch_are_counted(corpus: Corpus) -> None:
    split = corpus.split("val")
    text = split.read(1, 101)  # behind the end-of-text token: one byte a token
    assert corpus.bytes_per_token(split, 101) == len(text) / 100 == 1
    assert corpus.bytes_per_token(split) == split.n_bytes / (split.n_tokens - 1) == 1


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    """A model that knows nothing of 257 bytes pays log2 257 bits for each target.

    The val split is end-of-text, a, b, end-of-text, c, d: 5 targets and 4 bytes of text. Its first three tokens are
    2 targets and 2 bytes.
    """
    (tmp_path / "a.txt").write_text("x" * 10 + "ab")
    (tmp_path / "b.txt").write_text("cd")
    flags = ["--data.corpus=text", f"--data.path={tmp_path}/*.txt", "--data.tokenizer=byte", "--data.split=tail"]
    flags += ["--data.val_fraction=0.2857", "--data.test_fraction=0", "--model.d_model=8", "--model.n_layers=1"]
    config = parse(flags)
    corpus = Corpus.open(prepare(config.data, tmp_path / "corpora", quiet=True))
    val = corpus.split("val")
    assert val.read(0, 6).tolist() == [256, *b"ab", 256, *b"cd"] and val.n_tokens == 6
    model = GPT(config.model, corpus.vocab_size).initialize(0)
    torch.nn.init.zeros_(model.output_weight)
    for max_tokens, targets, n_bytes in ((None, 5, 4), (3, 2, 2)):
        batches = EvaluationBatches(val, 16, 4, max_tokens)
        found, _ = evaluate(model, batches, ALONE, corpus.bytes_per_token(val, max_tokens))
        assert found["bits_per_byte"] == pytest.approx(targets * math.log2(257) / n_bytes, rel=1e-6)
