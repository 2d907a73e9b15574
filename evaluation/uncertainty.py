"""How uncertain a model is, measured by leaving its dropout on (MC-dropout, Gal & Ghahramani 2016).

Each of S samples is the same network under another dropout mask. The prediction is the mean of their probabilities
(never of their logits), and its entropy splits into two parts:

    predictive entropy    H(mean p)              all uncertainty
    expected entropy      mean H(p)              of the text: every sample finds several tokens possible
    mutual information    H(mean p) - mean H(p)  of the model: the samples disagree; >= 0 as entropy is concave

Shape suffixes: N tokens, R tokens of one chunk, S samples, B sequences, T time, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from config import BadInput, Data
from data.loader import EvaluationBatches
from data.shards import Corpus, Shard, Split
from evaluation.evaluate import hidden_states, in_chunks
from hardware import Hardware
from model.gpt import GPT
from randomness import seed_activations, seed_for
from regularizers.activations import STOCHASTIC

HIDDEN_ELEMENTS = 2**26  # of the hidden states of all samples held at once


@dataclass(frozen=True)
class Uncertainty:
    """MC-dropout of N tokens, NumPy float64; see ``mc_dropout``."""

    nll_N: np.ndarray
    target_std_N: np.ndarray
    predictive_entropy_N: np.ndarray
    expected_entropy_N: np.ndarray
    mutual_information_N: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """The means over the tokens by their metric names, such as ``mc/nll``."""
        return {f"mc/{name.removesuffix('_N')}": float(values.mean()) for name, values in vars(self).items()}


def stochastic_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that act randomly in training mode, at their rates; raises BadInput if it has none."""
    modules: list[nn.Module] = [module for module in model.modules() if isinstance(module, STOCHASTIC) and module.p > 0]
    if not modules:
        raise BadInput(
            "MC-dropout needs a model that was trained with dropout, and this one has none (all dropouts and "
            "stochastic_depth are 0); train one with --regularizers.residual_dropout=0.1"
        )
    return modules


@contextmanager
def only_stochastic_on(model: nn.Module) -> Iterator[None]:
    """Inside, stochastic modules are in training mode and all others in evaluation mode; then all are as before."""
    before, stochastic = [(module, module.training) for module in model.modules()], stochastic_modules(model)
    model.eval()
    for module in stochastic:
        module.training = True
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.no_grad()
def mc_dropout(
    model: GPT, batches: EvaluationBatches, hardware: Hardware, samples: int, seed: int, title: str = "MC-dropout"
) -> Uncertainty:
    """Uncertainty of every target of ``batches`` from ``samples`` dropout masks a token, in nats.

    ``nll`` is that of the averaged probabilities, ``target_std`` the (population's) standard deviation over the
    samples of the target's probability. Mutual information is clamped at 0 for each token: it is a difference of two
    fp32 entropies and may come out as -1e-7.

    Masks follow from ``seed``, the sample and the number of the first sequence they are drawn for, so the same call
    gives the same numbers. torch's generators and the modes of all modules are left as they were. Memory: the
    hidden states of all samples of a few sequences, and the probabilities of one chunk of tokens, whatever S and V.
    Every process computes all of it. Raises BadInput when the model has no dropout to sample from.
    """
    if samples < 1:
        raise BadInput(f"MC-dropout needs at least one sample, not {samples}")
    own_seed, context = seed_for(seed, "mc dropout"), batches.context_length
    most = max(1, HIDDEN_ELEMENTS // (samples * context * model.config.d_model))
    batches = EvaluationBatches(batches.split, context, min(batches.batch_size, most), None, batches.isolate_documents)
    progress = {"total": batches.n_targets * samples, "unit": "token", "unit_scale": True}
    parts: list[Tensor] = []
    with (
        only_stochastic_on(model),
        torch.random.fork_rng(devices=[hardware.device] if hardware.device.type == "cuda" else []),
        tqdm(desc=title, disable=None, leave=False, **progress) as bar,
    ):
        for index in range(len(batches)):
            batch = batches.batch(index).to(hardware.device)
            hidden_SND = []
            for sample in range(samples):
                seed_activations(own_seed, sample, int(batch.sample_ids_B[0]))
                hidden_SND.append(hidden_states(model, batch, hardware).flatten(0, 1))
                bar.update(batch.targets_BT.numel())
            parts += measure(torch.stack(hidden_SND), model.output_weight, batch.targets_BT.flatten())
    nll_N, std_N, predictive_N, expected_N = torch.cat(parts, dim=1).numpy()
    return Uncertainty(nll_N, std_N, predictive_N, expected_N, np.maximum(predictive_N - expected_N, 0.0))


def measure(hidden_SND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> list[Tensor]:
    """For chunks of the N tokens: NLL, standard deviation, predictive and expected entropy, (4, R) float64 on the CPU.

    One sample's probabilities of one chunk exist at a time, beside their sum.
    """
    weight_VD = weight_VD.to(hidden_SND.dtype)
    parts = []
    for hidden_SRD, target_R in in_chunks(hidden_SND, targets_N, len(weight_VD)):
        mixture = Mixture(target_R)
        for hidden_RD in hidden_SRD:
            mixture.add((hidden_RD @ weight_VD.T).float())
        predictive_R = entropy(mixture.p_RV)
        parts.append(torch.stack([mixture.nll_R, mixture.target_std_R, predictive_R, mixture.expected_entropy_R]))
    return parts


class Mixture:
    """The weighted mean of the probabilities of S predictions of the same R tokens, of which one is held at a time.

    What it gives for each token is (R,) float64 on the CPU, but ``p_RV`` fp32 on the device.
    """

    def __init__(self, target_R: Tensor) -> None:
        self.target_R = target_R
        self._sum_RV = torch.empty(0)
        self._weights: list[float] = []
        self._log_p: list[Tensor] = []  # of the target, (R,) for each prediction
        self._entropies: list[Tensor] = []

    def add(self, logits_RV: Tensor, weight: float = 1.0) -> None:
        """Take in a prediction."""
        log_p_RV = logits_RV.log_softmax(-1)
        self._log_p.append(log_p_RV.gather(-1, self.target_R[:, None]).squeeze(-1).cpu().double())
        p_RV = log_p_RV.exp_()
        self._entropies.append(entropy(p_RV))
        self._sum_RV = self._sum_RV.add_(p_RV, alpha=weight) if self._weights else p_RV.mul_(weight)
        self._weights.append(weight)

    @property
    def p_RV(self) -> Tensor:
        """The mean of the probabilities."""
        return self._sum_RV / sum(self._weights)

    @property
    def nll_R(self) -> Tensor:
        """-log of the target's mean probability, exact also where that is below fp32's smallest number."""
        log_weight_S1 = torch.tensor(self._weights, dtype=torch.float64).log()[:, None]
        log_sum_R = (torch.stack(self._log_p) + log_weight_S1).logsumexp(0)
        return math.log(sum(self._weights)) - log_sum_R

    @property
    def last_nll_R(self) -> Tensor:
        """That of the last prediction alone."""
        return -self._log_p[-1]

    @property
    def target_std_R(self) -> Tensor:
        """The (population's) standard deviation of the target's probability, all predictions counted alike."""
        return torch.stack(self._log_p).exp().std(0, correction=0)

    @property
    def expected_entropy_R(self) -> Tensor:
        """The mean of the predictions' entropies."""
        weighted = [weight * each_R for weight, each_R in zip(self._weights, self._entropies, strict=True)]
        return torch.stack(weighted).sum(0) / sum(self._weights)


def entropy(p_RV: Tensor) -> Tensor:
    """-Σ p log p in nats, (R,) float64 on the CPU. Both entropies are its, so that of one sample they are equal."""
    entropy_R: Tensor = torch.special.entr(p_RV).sum(-1)
    return entropy_R.cpu().double()


# ---------------------------------------------------------------------------------------------- foreign text


def auroc(scores_in: Any, scores_out: Any) -> float:
    """The probability that a foreign score is higher than one of our own, ties counting half (Mann & Whitney 1947).

    1: the scores separate the two perfectly; 0.5: they tell nothing. The same as the area under the ROC curve with
    the foreign ones as positives. Raises ValueError for an empty side or a score that is not a number.
    """
    from scipy.stats import mannwhitneyu

    inside, outside = np.asarray(scores_in, dtype=np.float64).ravel(), np.asarray(scores_out, dtype=np.float64).ravel()
    if not len(inside) or not len(outside) or np.isnan(inside).any() or np.isnan(outside).any():
        raise ValueError("AUROC needs scores on both sides, and none that is not a number")
    return float(mannwhitneyu(outside, inside, method="asymptotic").statistic / len(inside) / len(outside))


def foreign_split(path: str | Path, corpus: Corpus, max_tokens: int) -> Split:
    """Text of other files as a split in memory, with the corpus's tokenizer, at most ``max_tokens`` of it.

    ``path`` is what data.path accepts. Raises BadInput when there is no text.
    """
    from data.encoding import encode_documents
    from data.sources import open_source

    documents: list[str] = []
    room = 16 * max_tokens  # characters: a token is seldom longer than 16; the last line cuts to tokens
    for document in open_source(Data(corpus="text", path=str(path))).documents():
        documents.append(document[:room])
        room -= len(documents[-1])
        if room <= 0:
            break
    parts: list[np.ndarray] = []
    starts = [0]
    for tokens in encode_documents(corpus.tokenizer(), iter(documents)):
        parts.append(np.concatenate(([corpus.end_of_text], tokens)))
        starts.append(starts[-1] + len(parts[-1]))
        if starts[-1] >= max_tokens:
            break
    n_tokens = starts.pop()
    if n_tokens < 2:
        raise BadInput(f"there is no text in {path}; give a file with text that the model has not seen the like of")
    shard = Shard(Path(path), 0, n_tokens, 0, len(starts), np.concatenate(parts), np.array(starts))
    n_bytes = sum(len(document.encode()) for document in documents[: len(parts)])
    split = Split("foreign", (shard,), n_tokens, n_bytes, corpus.vocab_size)
    return split.head(max_tokens)
