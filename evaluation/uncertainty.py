"""What a model does not know, told by letting its dropout go on (Gal & Ghahramani 2016, MC-dropout).

Each of S samples is the same network under another dropout mask. The prediction is the mean of their probabilities
(never of their logits), and its entropy splits into two parts:

    predictive entropy    H(mean p)              all uncertainty
    expected entropy      mean H(p)              of the text: every sample finds several tokens possible
    mutual information    H(mean p) - mean H(p)  of the model: the samples disagree; >= 0 as entropy is concave

Shape suffixes: N tokens, R tokens of one chunk, S samples, B sequences, T time, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from config import BadInput, Data
from data.loader import Batch, EvaluationBatches
from data.shards import Corpus, Shard, Split
from hardware import Hardware
from model.gpt import GPT
from randomness import seed_activations, seed_for
from regularizers.activations import Dropout, StochasticDepth

STOCHASTIC = (Dropout, StochasticDepth)  # the modules that draw random numbers in training mode
CHUNK_NUMBERS = 2**24  # logits held at once
HIDDEN_NUMBERS = 2**26  # hidden states of all samples held at once


@dataclass(frozen=True)
class Uncertainty:
    """MC-dropout of N tokens: means by their metric names, and the NumPy float64 arrays they are the means of."""

    metrics: dict[str, float]
    nll_N: np.ndarray
    target_std_N: np.ndarray
    predictive_entropy_N: np.ndarray
    expected_entropy_N: np.ndarray
    mutual_information_N: np.ndarray


def stochastic_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` that act randomly in training mode, at their rates."""
    return [module for module in model.modules() if isinstance(module, STOCHASTIC) and module.p > 0]


def check_stochastic(model: nn.Module) -> None:
    """Raises BadInput when the model has no dropout to sample from."""
    if not stochastic_modules(model):
        raise BadInput(
            "MC-dropout needs a model that was trained with dropout, and this one has none (all dropouts and "
            "stochastic_depth are 0); train one with --regularizers.residual_dropout=0.1"
        )


@contextmanager
def only_stochastic_on(model: nn.Module) -> Iterator[None]:
    """Inside, stochastic modules are in training mode and all others in evaluation mode; then all are as before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in stochastic_modules(model):
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
    """Uncertainty of every target of ``batches`` from ``samples`` dropout masks a token.

    ``metrics`` has ``mc/nll`` (nats per token, of the averaged probabilities), ``mc/target_std`` (standard deviation
    over the samples of the target's probability, the population's, mean over tokens), ``mc/predictive_entropy``,
    ``mc/expected_entropy`` and ``mc/mutual_information`` (nats). Mutual information is clamped at 0 for each token:
    it is a difference of two fp32 entropies and may come out as -1e-7.

    Masks follow from ``seed``, the sample and the number of the first sequence they are drawn for, so the same call
    gives the same numbers. torch's generators and the modes of all modules are left as they were. Memory: the
    hidden states of all samples of a few sequences, and the probabilities of one chunk of tokens, whatever S and V.
    Every process computes all of it.

    Raises BadInput when the model has no dropout to sample from.
    """
    if samples < 1:
        raise BadInput(f"MC-dropout needs at least one sample, not {samples}")
    check_stochastic(model)
    own_seed = seed_for(seed, "mc dropout")
    parts: list[Tensor] = []
    with (
        only_stochastic_on(model),
        torch.random.fork_rng(devices=[hardware.device] if hardware.device.type == "cuda" else []),
        tqdm(total=batches.n_targets * samples, unit="token", unit_scale=True, disable=None, leave=False) as bar,
    ):
        bar.set_description(title)
        first = 0  # sequences so far
        for index in range(len(batches)):
            for batch in portions(batches.batch(index), samples, model.config.d_model):
                batch = batch.to(hardware.device)
                hidden_SND = []
                for sample in range(samples):
                    seed_activations(own_seed, sample, first)
                    with hardware.autocast():
                        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, batch.documents_BT)
                    hidden_SND.append(hidden_BTD.flatten(0, 1).to(hardware.dtype))
                    bar.update(batch.targets_BT.numel())
                first += len(batch.tokens_BT)
                parts += measure(torch.stack(hidden_SND), model.output_weight, batch.targets_BT.flatten())
    nll_N, std_N, predictive_N, expected_N = torch.cat(parts, dim=1).numpy()
    information_N = np.maximum(predictive_N - expected_N, 0.0)
    named = {
        "mc/nll": nll_N,
        "mc/target_std": std_N,
        "mc/predictive_entropy": predictive_N,
        "mc/expected_entropy": expected_N,
        "mc/mutual_information": information_N,
    }
    means = {name: float(values.mean()) for name, values in named.items()}
    return Uncertainty(means, nll_N, std_N, predictive_N, expected_N, information_N)


def portions(batch: Batch, samples: int, width: int) -> Iterator[Batch]:
    """The sequences of a batch in portions whose hidden states of all samples fit into memory."""
    rows = max(1, HIDDEN_NUMBERS // (samples * batch.tokens_BT.shape[1] * width))
    for start in range(0, len(batch.tokens_BT), rows):
        part = slice(start, start + rows)
        positions_BT, documents_BT = (
            None if values is None else values[part] for values in (batch.positions_BT, batch.documents_BT)
        )
        yield Batch(batch.tokens_BT[part], batch.targets_BT[part], positions_BT, documents_BT, batch.sample_ids_B[part])


def measure(hidden_SND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> list[Tensor]:
    """For chunks of the N tokens: NLL, standard deviation, predictive and expected entropy, (4, R) float64 on the CPU.

    One sample's probabilities of one chunk exist at a time, beside their sum.
    """
    weight_VD = weight_VD.to(hidden_SND.dtype)
    samples, parts = len(hidden_SND), []
    rows = max(1, CHUNK_NUMBERS // len(weight_VD))
    for hidden_SRD, target_R in zip(hidden_SND.split(rows, dim=1), targets_N.split(rows), strict=True):
        sum_RV: Tensor | None = None
        entropies, targets = [], []
        for hidden_RD in hidden_SRD:
            log_p_RV = (hidden_RD @ weight_VD.T).float().log_softmax(-1)
            targets.append(log_p_RV.gather(-1, target_R[:, None]).squeeze(-1).cpu().double())
            p_RV = log_p_RV.exp_()
            entropies.append(entropy(p_RV))
            sum_RV = p_RV if sum_RV is None else sum_RV.add_(p_RV)
        assert sum_RV is not None
        log_p_SR = torch.stack(targets)
        nll_R = -(log_p_SR.logsumexp(0) - np.log(samples))
        std_R = log_p_SR.exp().std(0, correction=0)
        parts.append(torch.stack([nll_R, std_R, entropy(sum_RV.div_(samples)), torch.stack(entropies).mean(0)]))
    return parts


def entropy(p_RV: Tensor) -> Tensor:
    """-Σ p log p in nats, (R,) float64 on the CPU. One function for both entropies: one sample informs by exactly 0."""
    return torch.special.entr(p_RV).sum(-1).cpu().double()


# ---------------------------------------------------------------------------------------------- foreign text


def auroc(scores_in: Any, scores_out: Any) -> float:
    """The probability that a foreign score is higher than one of our own, ties counting half (Mann & Whitney 1947).

    1: the scores separate the two perfectly; 0.5: they tell nothing. The same as the area under the ROC curve with
    the foreign ones as positives. Raises ValueError for an empty side or a score that is not a number.
    """
    inside, outside = np.asarray(scores_in, dtype=np.float64).ravel(), np.asarray(scores_out, dtype=np.float64).ravel()
    if not len(inside) or not len(outside):
        raise ValueError("AUROC needs scores on both sides")
    if np.isnan(inside).any() or np.isnan(outside).any():
        raise ValueError("AUROC of scores that are not numbers")
    inside.sort()
    below = np.searchsorted(inside, outside, side="left")
    not_above = np.searchsorted(inside, outside, side="right")
    return float((below + not_above).sum(dtype=np.float64) / 2 / len(inside) / len(outside))


def foreign_split(path: str | Path, corpus: Corpus, max_tokens: int) -> Split:
    """Text of other files as a split in memory, with the corpus's tokenizer, at most ``max_tokens`` of it.

    ``path`` is what data.path accepts. Raises BadInput when there is no text.
    """
    from data.sources import open_source
    from data.tokenizers import encode_documents

    source = open_source(Data(corpus="text", path=str(path)))
    parts: list[np.ndarray] = []
    starts: list[int] = []
    n_tokens, n_bytes = 0, 0

    def texts() -> Iterator[str]:
        nonlocal n_bytes
        characters = 0
        for document in source.documents():
            # A token is seldom longer than 16 characters; what is too much is cut off below.
            document = document[: 16 * max_tokens - characters]
            characters += len(document)
            n_bytes += len(document.encode())
            yield document
            if characters >= 16 * max_tokens:
                return

    for tokens in encode_documents(corpus.tokenizer(), texts()):
        starts.append(n_tokens)
        parts += [np.array([corpus.end_of_text]), tokens]
        n_tokens += 1 + len(tokens)
        if n_tokens >= max_tokens:
            break
    if n_tokens < 2:
        raise BadInput(f"there is no text in {path}; give a file with text that the model has not seen the like of")
    shard = Shard(Path(path), 0, n_tokens, np.concatenate(parts))
    split = Split("foreign", (shard,), n_tokens, n_bytes, np.array(starts, dtype=np.int64), corpus.vocab_size)
    return split.head(max_tokens)
