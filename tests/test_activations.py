"""Masks: their rate, their independence of each other, their place in the run."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from config import Config, Model, Regularizers
from hardware import Hardware, missing_for_compile
from model.gpt import GPT
from randomness import seed_activations
from regularizers.activations import Dropout, StochasticDepth, depth_rate, keep_bits, mask_rate
from training.learner import Learner


@pytest.mark.parametrize("p", [1e-6, 1e-4, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999, 0.99999])
def test_the_rate_is_near_p_and_the_scale_is_exact(p: float) -> None:
    bits, threshold, q = mask_rate(p)
    assert q == threshold / 2**bits and abs(q - p) <= min(p, 1 - p) / 50 and 0 < q < 1


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_byte_of_a_draw_is_fair(p: float, dtype: torch.dtype) -> None:
    """Position by position modulo 8: the top bit of each random int64 must not be stuck."""
    torch.manual_seed(3)
    kept, q = keep_bits(torch.Size([100_000, 8]), p, dtype, torch.device("cpu"))
    assert kept.itemsize == dtype.itemsize and set(kept.unique().tolist()) == {0, -1}
    dropped = 1 + kept.double().mean(0)
    assert (dropped - q).abs().max().item() < 4.5 * math.sqrt(q * (1 - q) / 100_000)


def masks(seed: int, step: int, micro_batch: int) -> list[torch.Tensor]:
    """What every dropout of a two-block model keeps, with its sites in the order they are met."""
    knobs = Regularizers(residual_dropout=0.2, mlp_dropout=0.2, embedding_dropout=0.2, attention_dropout=0.2)
    model = GPT(Model(n_layers=2, d_model=64, n_heads=2, context_length=64), 7, knobs).initialize(0).train()
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, given, out: seen.append((out != 0).flatten().double()[:8192]))
    seed_activations(seed, step, micro_batch)
    model(torch.zeros(4, 64, dtype=torch.long))
    return [mask for mask in seen if mask.mean() > 0.7]  # attention's are half zero by causality


def test_masks_are_independent_across_layers_steps_and_micro_batches() -> None:
    """Correlations of masks within 4.5 standard errors of 0; the same place gives the same masks."""
    groups = [masks(0, 5, 2), masks(0, 6, 2), masks(0, 5, 3), masks(1, 5, 2)]
    assert len(groups[0]) == 7
    everything = torch.stack([mask for group in groups for mask in group])
    correlations = torch.corrcoef(everything) - torch.eye(len(everything), dtype=torch.float64)
    assert correlations.abs().max().item() < 4.5 / math.sqrt(everything.shape[1])
    assert all(torch.equal(a, b) for a, b in zip(groups[0], masks(0, 5, 2), strict=True))
    # Neighbouring positions of one mask.
    mask = groups[0][0]
    assert abs(torch.corrcoef(torch.stack([mask[:-1], mask[1:]]))[0, 1].item()) < 4.5 / math.sqrt(len(mask))


def test_depth_rates() -> None:
    assert [depth_rate(0.3, layer, 4) for layer in range(4)] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert depth_rate(0.3, 0, 1) == 0.0


def test_stochastic_depth_drops_whole_sequences() -> None:
    torch.manual_seed(0)
    out = StochasticDepth(0.4).train()(torch.ones(2000, 3, 5))
    rows = out.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(1 / 0.6)).all(1)).all()
    assert (rows[:, 0] == 0).double().mean().item() == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / 2000))


def test_attention_and_mlp_branches_draw_separately() -> None:
    model = GPT(Model(n_layers=2, d_model=8, n_heads=2, context_length=4), 7, Regularizers(stochastic_depth=0.5))
    seen: list[torch.Tensor] = []
    depth = model.train().blocks[1].stochastic_depth
    depth.register_forward_hook(lambda module, given, out: seen.append(out.flatten(1).abs().sum(1) > 0))
    torch.manual_seed(0)
    model.initialize(0)(torch.randint(0, 7, (64, 4)))
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_gradient_flows_through_what_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, requires_grad=True)
    out = Dropout(0.3).train()(x)
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())


def test_a_dropout_window_compiles_two_graphs() -> None:
    """Off, on and off again, with an evaluation between, of twelve steps: what acts and what does not, once each."""
    knobs = Regularizers(residual_dropout=0.2, stochastic_depth=0.2, dropout_from=0.25, dropout_until=0.75)
    config = Config(model=Model(n_layers=2, d_model=16, n_heads=2, context_length=8), regularizers=knobs)
    model = GPT(config.model, 7, knobs).initialize(0)
    learner = Learner(model, config, Hardware(0, 1, torch.device("cpu"), "fp32", False, 1), 12, 12)
    counter = CompileCounter()
    torch._dynamo.reset()
    forward = torch.compile(model, backend=counter, dynamic=False)
    acted = []
    for step in range(12):
        learner.follow_schedules(step)
        seed_activations(0, 0, 0)
        hidden = forward(torch.zeros(4, 8, dtype=torch.long))
        model.eval()
        acted.append(not torch.equal(hidden, model(torch.zeros(4, 8, dtype=torch.long))))
        model.train()
    assert acted == [False] * 3 + [True] * 6 + [False] * 3
    assert counter.frame_count == 2


@pytest.mark.slow
def test_compiled_code_draws_the_same_masks() -> None:
    """In fp32 the very numbers of eager mode, there and back; in bf16 to its rounding."""
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    eager = Dropout(0.2).train()
    compiled = torch.compile(eager)
    for dtype, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 2**-8)):
        results = []
        for drop in (eager, compiled):
            x = torch.linspace(-2, 2, 200_000, dtype=dtype).requires_grad_()
            seed_activations(0, 1, 2)
            out = drop(x)
            (out * 3).sum().backward()
            results.append((out.detach(), x.grad))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one == 0, other == 0) and 0.19 < (one == 0).double().mean() < 0.21
            torch.testing.assert_close(one, other, rtol=tolerance, atol=0.0)


def test_a_compiled_network_draws_the_same_masks() -> None:
    """Many draws in one forward, several of the same shape and rate: hidden states and gradients to float rounding."""
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    knobs = Regularizers(
        embedding_dropout=0.2, attention_dropout=0.2, residual_dropout=0.2, mlp_dropout=0.2, stochastic_depth=0.5
    )
    model = GPT(Model(n_layers=2, d_model=32, n_heads=2, context_length=16), 50, knobs).initialize(0).train()
    tokens_BT = torch.randint(0, 50, (8, 16), generator=torch.Generator().manual_seed(1))
    results = []
    for forward in (model, torch.compile(model, dynamic=False)):
        seed_activations(0, 1, 2)
        hidden_BTD = forward(tokens_BT)
        model.zero_grad()
        hidden_BTD.square().sum().backward()
        results.append((hidden_BTD.detach(), model.embedding.weight.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())
