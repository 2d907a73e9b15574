"""Text from a model: one token after the other, each drawn from the distribution that the model gives.

Keys and values of what was read are kept, so each token costs one step of the network. A full context slides: its
later half is read again and goes on from there, so a token is always drawn from at least half a context. Several
models with weights write together, as an ensemble: a token is drawn from the weighted mean of their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from config import BadInput
from model.gpt import GPT, Cache
from randomness import torch_generator

Models = GPT | list[tuple[GPT, float]]  # one, or several with their weights


class Reader:
    """A model that reads a growing text, each token once, as long as its context has room."""

    def __init__(self, model: GPT) -> None:
        self.model, self.cache = model, Cache()

    def logits(self, tokens_BT: Tensor, unread: int) -> Tensor:
        """What it predicts after ``tokens_BT``, of which it has not read the last ``unread``: (B, V) fp32."""
        context = self.model.config.context_length
        unread = min(unread, context)
        if self.cache.length + unread > context:
            self.cache, unread = Cache(), context // 2
        logits_BV: Tensor = self.model.logits(self.model(tokens_BT[:, -unread:], cache=self.cache)[:, -1])
        return logits_BV.float()


def log_mean(logits: list[Tensor], weights: Sequence[float]) -> Tensor:
    """Logits of the weighted mean of the probabilities that ``logits``, (B, V) each, stand for."""
    if len(logits) == 1:
        return logits[0]
    shares = [math.log(weight / sum(weights)) for weight in weights]
    weighted = [each_BV.log_softmax(-1) + share for each_BV, share in zip(logits, shares, strict=True)]
    return torch.stack(weighted).logsumexp(0)


@torch.inference_mode()
def generate(
    model: Models,
    tokens_BT: Tensor,
    new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | None = None,
) -> Tensor:
    """``tokens_BT`` with ``new_tokens`` more: (B, T + new_tokens), int64, on the model's device.

    It is an inference tensor: clone it before you train on it.

    Args:
        model: used in evaluation mode and put back into the mode it was in. Several must be on one device and have
            one vocabulary.
        tokens_BT: what the text begins with, at least one token; only the last context of it is read, by each model
            that of its own.
        new_tokens: how many are added.
        temperature: the logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are drawn (Fan 2018).
        top_p: only the likeliest tokens that together reach this probability are drawn (Holtzman 2020).
        generator: of the draws, which are made on its device; None: torch's own, on the CPU.
        stop: the id of a token; behind the first one drawn, a row holds only copies of it.

    Raises BadInput for a number out of range, ValueError for tokens of another shape.
    """
    check_sampling(new_tokens, temperature, top_k, top_p)
    if tokens_BT.ndim != 2 or tokens_BT.shape[1] == 0:
        raise ValueError(f"tokens must be (batch, time) with at least one token a row, not {tuple(tokens_BT.shape)}")
    models, weights = zip(*model, strict=True) if isinstance(model, list) else ((model,), (1.0,))
    readers = [Reader(each) for each in models]
    tokens_BT = tokens_BT.to(models[0].embedding.weight.device)
    stopped_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
    unread, before = tokens_BT.shape[1], [each.training for each in models]
    for each in models:
        each.eval()
    try:
        for _ in range(new_tokens):
            logits_BV = log_mean([reader.logits(tokens_BT, unread) for reader in readers], weights)
            next_B = draw(logits_BV, temperature, top_k, top_p, generator)
            if stop is not None:
                next_B = next_B.masked_fill(stopped_B, stop)
                stopped_B |= next_B == stop
            tokens_BT, unread = torch.cat([tokens_BT, next_B[:, None]], dim=1), 1
    finally:
        for each, training in zip(models, before, strict=True):
            each.train(training)
    return tokens_BT


def draw(
    logits_BV: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row, (B,), drawn from softmax(logits / temperature) cut to ``top_k`` and ``top_p``."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # Draws are made on the generator's device, a CPU unless the caller chose another: the hardware of the model
    # does not choose the random numbers.
    scaled_BV = logits_BV.to(generator.device if generator else "cpu") / temperature
    sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = -math.inf
    p_BV = sorted_BV.softmax(-1)
    if top_p is not None:
        before_BV = p_BV.cumsum(-1) - p_BV  # of the likelier tokens; 0 for the first, which is always kept
        p_BV = p_BV.masked_fill(before_BV >= top_p, 0.0)
    # The race of exponentials draws token i with probability p_i, normalised or not, and unlike torch.multinomial
    # it does not raise when a diverged model gives nan: a sample must not end a training run.
    chosen_B1 = (p_BV / torch.empty_like(p_BV).exponential_(generator=generator)).argmax(-1, keepdim=True)
    return order_BV.gather(-1, chosen_B1)[:, 0].to(logits_BV.device)


def sample_text(
    model: Models,
    tokenizer: Tokenizer,
    prompt: str,
    end_of_text: int,
    new_tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    index: int = 0,
) -> str:
    """``prompt`` and what the model (or several) writes after it: ``new_tokens`` tokens, fewer if it ends the text.

    The model reads the prompt as the beginning of a document, after end-of-text. The same seed and ``index`` (to
    have several samples of one seed) give the same draws.
    """
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    tokens_BT = torch.tensor([[end_of_text, *ids]])
    generator = torch_generator(seed, "sample", index)
    new = generate(model, tokens_BT, new_tokens, temperature, top_k, top_p, generator, stop=end_of_text)
    new_ids = new[0, tokens_BT.shape[1] :].tolist()
    if end_of_text in new_ids:
        new_ids = new_ids[: new_ids.index(end_of_text)]
    return str(tokenizer.decode(ids + new_ids, skip_special_tokens=False))


def check_sampling(new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise BadInput for a number with which no text can be drawn."""
    if new_tokens < 0:
        raise BadInput(f"tokens = {new_tokens}: must be at least 0")
    if not 0 <= temperature < math.inf:
        raise BadInput(f"temperature = {temperature}: must be at least 0 (0 takes the likeliest token)")
    if top_k is not None and top_k < 1:
        raise BadInput(f"top_k = {top_k}: must be at least 1; leave it out to draw from all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"top_p = {top_p}: must be above 0 and at most 1; leave it out to draw from all tokens")
