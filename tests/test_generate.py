"""Generation: the cache changes nothing, the sampler draws what it says, the text is the model's."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from scipy import stats
from torch import Tensor

from config import BadInput, Model
from data.tokenizers import byte_tokenizer
from model.generate import draw, generate, sample_text
from model.gpt import GPT, Cache

FAMILIES = get_args(Model.model_fields["family"].annotation)
every_family = pytest.mark.parametrize("family", FAMILIES)


def random_model(family: str, vocab_size: int = 61, context: int = 16) -> GPT:
    """A small model with weights large enough that greedy choices differ from step to step."""
    kv_heads = None if family == "gpt2" else 2
    config = Model(family=family, n_layers=2, d_model=24, n_heads=4, n_kv_heads=kv_heads, context_length=context)
    model = GPT(config, vocab_size).initialize(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return model.eval()


def prompt(batch: int, time: int) -> Tensor:
    return torch.randint(61, (batch, time), generator=torch.Generator().manual_seed(batch + time))


def greedy_without_cache(model: GPT, tokens: Tensor, new: int) -> Tensor:
    """The likeliest token, everything read anew for each; a full window of 16 restarts with its last 8."""
    start = max(0, tokens.shape[1] - 16)
    with torch.no_grad():
        for _ in range(new):
            if tokens.shape[1] - start > 16:
                start = tokens.shape[1] - 8
            logits = model.logits(model(tokens[:, start:]))[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    return tokens


@every_family
@pytest.mark.parametrize(("time", "new"), [(1, 15), (5, 11), (5, 60), (16, 20), (30, 20)])
def test_the_cache_gives_what_reading_everything_anew_gives(family: str, time: int, new: int) -> None:
    model, tokens = random_model(family), prompt(3, time)
    found = generate(model, tokens, new, temperature=0)
    assert found.shape == (3, time + new) and found.dtype == torch.int64
    assert torch.equal(found, greedy_without_cache(model, tokens, new))
    assert len(found[:, time:].unique()) > 3, "a model that repeats one token would prove little"


@every_family
def test_hidden_states_do_not_depend_on_how_the_tokens_are_portioned(family: str) -> None:
    model, tokens = random_model(family), prompt(2, 16)
    with torch.no_grad():
        whole = model(tokens)
        cache = Cache()
        parts = [model(part, cache=cache) for part in tokens.split([1, 4, 1, 7, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert cache.length == 16
    with pytest.raises(ValueError, match="17 tokens exceed"):
        model(tokens[:, :1], cache=cache)


@every_family
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    import transformers

    from model.huggingface import config_json, to_huggingface

    model, tokens = random_model(family), prompt(2, 4)
    content = config_json(model.config, 61, 0)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**content))
    theirs.load_state_dict(to_huggingface(model), strict=False)
    theirs.tie_weights()
    expected = theirs.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generate(model, tokens, 12, temperature=0), expected)


def test_the_mode_is_put_back_and_dropout_is_off() -> None:
    model = random_model("llama")
    for block in model.blocks:
        block.residual_dropout.p = 0.9
    expected = generate(model.eval(), prompt(1, 4), 10, temperature=0)
    assert not model.training
    assert torch.equal(generate(model.train(), prompt(1, 4), 10, temperature=0), expected)
    assert model.training
    with pytest.raises(IndexError):
        generate(model, torch.tensor([[1000]]), 1)
    assert model.training, "after an error too"


def test_what_is_generated_can_be_trained_on() -> None:
    model = random_model("llama")
    tokens = generate(model, prompt(1, 4), 5).clone()
    model.logits(model(tokens)).sum().backward()
    assert model.embedding.weight.grad is not None


# ---------------------------------------------------------------------------------------------- the sampler

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.1, -0.4, 1.0])
DRAWS = 20_000


def frequencies(**options: object) -> list[float]:
    """How often each token is drawn in 20,000 draws."""
    chosen = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    tokens = draw(LOGITS.expand(DRAWS, -1), generator=torch.Generator().manual_seed(0), **chosen)  # type: ignore[arg-type]
    return torch.bincount(tokens, minlength=6).tolist()


def agree(counts: list[float], weights: list[float]) -> bool:
    """Whether counts fit the weights: none where a weight is 0, chi-squared p above 1e-4 elsewhere."""
    total = sum(weights)
    pairs = [(count, DRAWS * weight / total) for count, weight in zip(counts, weights, strict=True) if weight]
    impossible = sum(count for count, weight in zip(counts, weights, strict=True) if not weight)
    return impossible == 0 and stats.chisquare(*zip(*pairs, strict=True)).pvalue > 1e-4


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    e = [1.3499, 0.3679, 7.3891, 3.0042, 0.6703, 2.7183]  # exp of the logits
    assert agree(frequencies(), e)
    assert agree(frequencies(temperature=0.5), [x**2 for x in e])
    assert agree(frequencies(temperature=2.0), [x**0.5 for x in e])
    assert not agree(frequencies(temperature=1.1), e), "the test can tell"


def test_top_k_and_top_p_leave_the_likeliest_tokens_in_proportion() -> None:
    # probabilities 0.0871 0.0237 0.4767 0.1938 0.0432 0.1754; from the likeliest 0.477, 0.671, 0.846, 0.933
    assert frequencies(top_k=1)[2] == DRAWS
    assert agree(frequencies(top_k=3), [0, 0, 7.3891, 3.0042, 0, 2.7183])
    assert agree(frequencies(top_k=100), [1.3499, 0.3679, 7.3891, 3.0042, 0.6703, 2.7183])
    assert frequencies(top_p=0.4)[2] == DRAWS
    assert agree(frequencies(top_p=0.5), [0, 0, 7.3891, 3.0042, 0, 0])
    assert agree(frequencies(top_p=0.85), [1.3499, 0, 7.3891, 3.0042, 0, 2.7183])
    assert agree(frequencies(top_p=1.0), [1.3499, 0.3679, 7.3891, 3.0042, 0.6703, 2.7183])
    assert agree(frequencies(top_k=2, top_p=0.9), [0, 0, 7.3891, 3.0042, 0, 0])
    assert frequencies(temperature=0.0)[2] == DRAWS


def test_the_generator_decides_and_each_row_is_drawn_by_itself() -> None:
    model, tokens = random_model("gpt2"), prompt(1, 3).expand(4, -1)
    first = generate(model, tokens, 12, generator=torch.Generator().manual_seed(5))
    again = generate(model, tokens, 12, generator=torch.Generator().manual_seed(5))
    other = generate(model, tokens, 12, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_behind_the_stop_token_a_row_holds_only_it() -> None:
    model, tokens = random_model("llama"), prompt(8, 3)
    free = generate(model, tokens, 40, generator=torch.Generator().manual_seed(0))
    stop = int(free[0, 10])
    stopped = generate(model, tokens, 40, generator=torch.Generator().manual_seed(0), stop=stop)
    for row, expected in zip(stopped[:, 3:].tolist(), free[:, 3:].tolist(), strict=True):
        end = row.index(stop) if stop in row else 40
        assert row[:end] == expected[:end] and set(row[end:]) <= {stop}
    assert (stopped == stop).any()


def test_a_diverged_model_still_gives_some_text() -> None:
    model = random_model("llama", vocab_size=257)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    assert isinstance(sample_text(model, byte_tokenizer(), "a", 256, 5, seed=0), str)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"new_tokens": -1}, "tokens"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        generate(random_model("llama"), prompt(1, 1), **{"new_tokens": 1, **wrong})  # type: ignore[arg-type]


def test_a_sample_begins_with_the_prompt_and_ends_with_the_text() -> None:
    """A model that has the alphabet by heart: each letter is followed by the next, z by end-of-text."""
    model = GPT(Model(family="gpt2", n_layers=1, d_model=257, n_heads=1, context_length=64, tie_embeddings=False), 257)
    assert model.output is not None and model.positions is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1.0)
        model.embedding.weight.copy_(torch.eye(257))
        for letter in b"abcdefghijklmnopqrstuvwxy":
            model.output.weight[letter + 1, letter] = 100.0
        model.output.weight[256, ord("z")] = 100.0
        model.output.weight[ord("a"), 256] = 100.0
    write = {"model": model, "tokenizer": byte_tokenizer(), "end_of_text": 256, "seed": 0}
    assert sample_text(prompt="w", new_tokens=100, **write) == "wxyz"  # type: ignore[arg-type]
    assert sample_text(prompt="é-t", new_tokens=3, **write) == "é-tuvw"  # type: ignore[arg-type]
    assert sample_text(prompt="", new_tokens=100, **write) == "abcdefghijklmnopqrstuvwxyz"  # type: ignore[arg-type]
    assert sample_text(prompt="q", new_tokens=0, **write) == "q"  # type: ignore[arg-type]


def test_seed_and_index_choose_the_sample() -> None:
    model, tokenizer = random_model("llama", vocab_size=257), byte_tokenizer()
    texts = [sample_text(model, tokenizer, "x", 256, 20, seed, index=i) for seed, i in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_no_samples_are_refused() -> None:
    from scripts.generate import main

    for number in ("0", "-1"):
        with pytest.raises(BadInput, match=f"--samples {number}: give at least 1"):
            main(["runs/none", f"--samples={number}"])
