"""MC-dropout by hand, its modes, its masks and its memory; AUROC against a count of all pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_line import parse
from config import BadInput
from data.loader import EvaluationBatches
from data.prepare import prepare
from data.shards import Corpus
from evaluation import uncertainty
from evaluation.evaluate import evaluate
from evaluation.uncertainty import Uncertainty, auroc, foreign_split, mc_dropout, measure, only_stochastic_on
from hardware import Hardware
from model.gpt import GPT
from regularizers.activations import Dropout, StochasticDepth

ALONE = Hardware(0, 1, torch.device("cpu"), "fp32", False, 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Corpus:
    flags = ["--data.corpus=text", f"--data.path={text_file}", "--data.tokenizer=byte", "--data.split=tail"]
    return Corpus.open(prepare(parse(flags).data, tmp_path_factory.mktemp("corpora"), quiet=True))


def make_model(*knobs: str) -> GPT:
    """Two blocks, 16 wide, weights large enough that dropout matters; ``knobs`` of the regularizers section."""
    shape = ["--model.n_layers=2", "--model.d_model=16", "--model.n_heads=2", "--model.context_length=16"]
    config = parse([*shape, *(f"--regularizers.{knob}" for knob in knobs)])
    model = GPT(config.model, 257, config.regularizers).initialize(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model.eval()


def batches(corpus: Corpus, tokens: int = 200, size: int = 4) -> EvaluationBatches:
    return EvaluationBatches(corpus.split("val"), 16, size, tokens)


def logits_of(probabilities: list[list[float]]) -> Tensor:
    """Hidden states (1 token a row) that an identity as output matrix turns into these probabilities."""
    return torch.tensor(probabilities).log()


# ---------------------------------------------------------------------------------------------- the numbers


def test_two_samples_by_hand() -> None:
    """One token of two classes; its samples give the target 0.9 and 0.5.

    Mean p = (0.7, 0.3): NLL = -ln 0.7, deviation = 0.2, H(0.7) = 0.6109, mean of H(0.9) and H(0.5) = 0.5091.
    The mean of the logits would give p = 0.75 and the NLL 0.2877.
    """
    hidden_SND = logits_of([[0.9, 0.1], [0.5, 0.5]])[:, None]
    nll, deviation, predictive, expected = torch.cat(measure(hidden_SND, torch.eye(2), torch.tensor([0]))).flatten()
    assert nll.item() == pytest.approx(-math.log(0.7), rel=1e-6)
    assert deviation.item() == pytest.approx(0.2, rel=1e-6)
    assert predictive.item() == pytest.approx(0.6108643, rel=1e-6)
    assert expected.item() == pytest.approx((0.3250830 + 0.6931472) / 2, rel=1e-6)


def plain(model: GPT, corpus: Corpus, samples: int, seed: int) -> dict[str, float]:
    """The same in float64 from all probabilities at once, masks drawn as the docstring says."""
    from randomness import seed_activations, seed_for

    p_SNV, targets = [], []
    with only_stochastic_on(model), torch.no_grad():
        for sample in range(samples):
            rows, first = [], 0
            for batch in map(batches(corpus).batch, range(len(batches(corpus)))):
                seed_activations(seed_for(seed, "mc dropout"), sample, first)
                rows.append(model.logits(model(batch.tokens_BT)).flatten(0, 1).double().softmax(-1))
                first += len(batch.tokens_BT)
                if sample == 0:
                    targets.append(batch.targets_BT.flatten())
            p_SNV.append(torch.cat(rows))
    p, target_N = torch.stack(p_SNV), torch.cat(targets)
    target_SN = p.gather(-1, target_N.expand(samples, -1)[..., None]).squeeze(-1)
    predictive, expected = (torch.special.entr(q).sum(-1).mean().item() for q in (p.mean(0), p))
    return {
        "mc/nll": -target_SN.mean(0).log().mean().item(),
        "mc/target_std": target_SN.std(0, correction=0).mean().item(),
        "mc/predictive_entropy": predictive,
        "mc/expected_entropy": expected,
        "mc/mutual_information": predictive - expected,
    }


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_it_is_the_plain_computation_in_bounded_memory(
    rows: int, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.evaluate.CHUNK_ELEMENTS", rows * 257)
    model = make_model("residual_dropout=0.2", "attention_dropout=0.1", "stochastic_depth=0.3")
    found = mc_dropout(model, batches(corpus), ALONE, 5, 11)
    assert found.metrics == pytest.approx(plain(model, corpus, 5, 11), rel=1e-5, abs=1e-6)
    assert found.metrics["mc/target_std"] > 0.005 and found.metrics["mc/mutual_information"] > 0.01


def test_each_token_has_its_numbers_and_information_is_never_negative(corpus: Corpus) -> None:
    found = mc_dropout(make_model("residual_dropout=0.001"), batches(corpus), ALONE, 3, 0)
    arrays = vars(found)
    for name, values in arrays.items():
        if name != "metrics":
            assert values.shape == (199,) and values.dtype == np.float64
            assert found.metrics[f"mc/{name.removesuffix('_N')}"] == pytest.approx(values.mean())
    assert (found.mutual_information_N >= 0).all()
    difference = found.predictive_entropy_N - found.expected_entropy_N
    assert found.mutual_information_N == pytest.approx(difference, abs=2e-6)


def test_one_sample_informs_of_nothing(corpus: Corpus) -> None:
    found = mc_dropout(make_model("residual_dropout=0.5"), batches(corpus), ALONE, 1, 0)
    assert (found.mutual_information_N == 0).all() and (found.target_std_N == 0).all()
    assert (found.predictive_entropy_N == found.expected_entropy_N).all()


def test_with_hardly_any_dropout_it_is_the_plain_evaluation(corpus: Corpus) -> None:
    model = make_model("residual_dropout=1e-9")
    expected, _ = evaluate(model, batches(corpus), ALONE, 1.0)
    found = mc_dropout(model, batches(corpus), ALONE, 3, 0).metrics
    assert found["mc/nll"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["mc/predictive_entropy"] == pytest.approx(expected["entropy"], rel=1e-5)
    assert found["mc/mutual_information"] == pytest.approx(0, abs=1e-6)


def same(one: Uncertainty, other: Uncertainty) -> bool:
    return all(np.array_equal(vars(one)[name], vars(other)[name]) for name in vars(one) if name != "metrics")


def test_the_seed_says_everything(corpus: Corpus) -> None:
    model = make_model("residual_dropout=0.3")
    one = mc_dropout(model, batches(corpus), ALONE, 3, 5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert same(one, mc_dropout(model, batches(corpus), ALONE, 3, 5))
    assert torch.equal(torch.get_rng_state(), before), "training must not notice"
    assert not same(one, mc_dropout(model, batches(corpus), ALONE, 3, 6))


def test_sequences_share_no_mask_and_samples_neither(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[tuple[int, int]] = []
    monkeypatch.setattr(uncertainty, "seed_activations", lambda seed, *place: seeds.append(place))
    monkeypatch.setattr(uncertainty, "HIDDEN_ELEMENTS", 2 * 3 * 16 * 16)  # two sequences of three samples at a time
    mc_dropout(make_model("residual_dropout=0.3"), batches(corpus), ALONE, 3, 5)
    assert len(set(seeds)) == len(seeds) == 3 * 7  # 12 whole windows in pairs, and the rest
    assert {first for _, first in seeds} == {0, 2, 4, 6, 8, 10, 12}


# ---------------------------------------------------------------------------------------------- the modes


class Probe(nn.BatchNorm1d):
    """A module that would act in training mode, and remembers the mode it was called in."""

    called: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.called = self.training
        return x


def with_probe(model: GPT) -> Probe:
    """The model's last norm followed by a probe; some modules in training mode, some not."""
    probe = Probe(16)
    model.norm = nn.Sequential(model.norm, probe)
    model.train()
    model.blocks[0].eval()
    return probe


def modes(model: nn.Module) -> Iterator[bool]:
    return (module.training for module in model.modules())


def test_only_stochastic_modules_are_on_and_all_come_back(corpus: Corpus) -> None:
    model = make_model("residual_dropout=0.3", "stochastic_depth=0.2")
    probe = with_probe(model)
    before = list(modes(model))
    assert len(set(before)) == 2
    with only_stochastic_on(model):
        on = [module for module in model.modules() if module.training]
        assert len(on) == 3 and all(isinstance(module, (Dropout, StochasticDepth)) and module.p for module in on)
    mc_dropout(model, batches(corpus), ALONE, 2, 0)
    assert probe.called is False
    assert list(modes(model)) == before
    assert torch.equal(probe.running_mean, torch.zeros(16))


def test_modes_come_back_after_an_error(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("residual_dropout=0.3")
    with_probe(model)
    before = list(modes(model))

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(uncertainty, "measure", fail)
    with pytest.raises(MemoryError):
        mc_dropout(model, batches(corpus), ALONE, 2, 0)
    assert list(modes(model)) == before


def test_every_activation_knob_is_sampled(corpus: Corpus) -> None:
    """Walks the config section: a new kind of dropout that MC-dropout does not know fails here."""
    from config import Regularizers

    kinds = {name: field.json_schema_extra for name, field in Regularizers.model_fields.items()}
    for name in (name for name, extra in kinds.items() if extra["kind"] == "activation"):  # type: ignore[index, call-overload]
        found = mc_dropout(make_model(f"{name}=0.3"), batches(corpus, 40), ALONE, 4, 0)
        assert found.metrics["mc/mutual_information"] > 1e-4, name


def test_a_model_without_dropout_is_refused(corpus: Corpus) -> None:
    with pytest.raises(BadInput, match=r"trained with dropout.*residual_dropout=0\.1"):
        mc_dropout(make_model(), batches(corpus), ALONE, 3, 0)
    with pytest.raises(BadInput, match="at least one sample"):
        mc_dropout(make_model("mlp_dropout=0.1"), batches(corpus), ALONE, 0, 0)


# ---------------------------------------------------------------------------------------------- foreign text


def test_auroc_by_hand() -> None:
    assert auroc([1, 2], [3, 4]) == 1
    assert auroc([3, 4], [1, 2]) == 0
    assert auroc([1, 1], [1, 1, 1]) == 0.5
    assert auroc([1, 2, 3], [2, 4]) == (1.5 + 3) / 6


def test_auroc_is_the_share_of_pairs() -> None:
    from scipy.stats import mannwhitneyu

    draw = np.random.default_rng(0)
    for shift in (-2, 0, 1):
        inside, outside = draw.integers(0, 9, 150), draw.integers(0, 9, 70) + shift  # many ties
        pairs = (outside[:, None] > inside).mean() + (outside[:, None] == inside).mean() / 2
        assert auroc(inside, outside) == pytest.approx(pairs)
        assert auroc(inside, outside) == pytest.approx(mannwhitneyu(outside, inside).statistic / 150 / 70)
        assert auroc(outside, inside) == pytest.approx(1 - pairs)


def test_auroc_refuses_what_has_no_rank() -> None:
    for inside, outside in (([], [1]), ([1], []), ([1], [math.nan])):
        with pytest.raises(ValueError, match="AUROC"):
            auroc(inside, outside)


def test_foreign_text_is_read_with_the_corpus_s_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zut")
    (tmp_path / "b.txt").write_text("alors!")
    split = foreign_split(tmp_path / "*.txt", corpus, 100)
    assert split.read(0, split.n_tokens).tolist() == [256, *b"zut", 256, *b"alors!"]
    assert split.starts(0, 11).tolist() == [0, 4] and split.n_bytes == 9
    assert foreign_split(tmp_path / "*.txt", corpus, 6).read(0, 6).tolist() == [256, *b"zut", 256, ord("a")]
    whole = EvaluationBatches(split, 16, 4)
    assert len(whole) == 1 and whole.batch(0).tokens_BT.tolist() == [[256, *b"zut", 256, *b"alors"]]
    with pytest.raises(BadInput, match=r"nothing\.txt"):
        foreign_split(tmp_path / "nothing.txt", corpus, 100)
