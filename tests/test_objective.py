"""The objective against float64 references, torch's own functions and numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from config import Regularizers
from hardware import missing_for_compile
from regularizers import objective as module
from regularizers.objective import Taught, multi_token_terms, objective

N, D, V = 37, 16, 53
ALL = Regularizers(label_smoothing=0.1, z_loss=1e-2, entropy_penalty=0.3)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (N,), generator=generator)


def reference(hidden: Tensor, weight: Tensor, target: Tensor, knobs: Regularizers, n: float) -> dict[str, Tensor]:
    """From the definitions, through log_softmax and an explicit target distribution."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    valid = (target >= 0).to(log_p.dtype)
    one_hot = F.one_hot(target.clamp(min=0), V).to(log_p.dtype)
    smoothed = one_hot * (1 - knobs.label_smoothing) + (1 - one_hot) * knobs.label_smoothing / (V - 1)
    cross = -(smoothed * log_p).sum(-1)
    z = knobs.z_loss * torch.logsumexp(hidden @ weight.T, -1) ** 2
    entropy = torch.distributions.Categorical(logits=log_p).entropy()
    terms = {
        "objective": cross + z - knobs.entropy_penalty * entropy,
        "loss": -(one_hot * log_p).sum(-1),
    }
    terms |= {"z_loss": z} if knobs.z_loss else {}
    terms |= {"entropy": entropy} if knobs.entropy_penalty else {}
    return {name: (value * valid).sum() / n for name, value in terms.items()}


@pytest.mark.parametrize("smoothing,z,beta", list(product((0.0, 0.1), (0.0, 1e-2), (0.0, 0.3))))
@pytest.mark.parametrize("chunk", [64 * V, 2**24])
@pytest.mark.parametrize("multiple", [1, 64])
def test_every_combination_equals_its_float64_reference(
    smoothing: float, z: float, beta: float, chunk: int, multiple: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(module.VOCABULARY_MULTIPLE, "cpu", multiple)  # as on a GPU
    knobs = Regularizers(label_smoothing=smoothing, z_loss=z, entropy_penalty=beta)
    hidden, weight, target = drawn()
    target[5:7] = torch.tensor([-1, 0])
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    expected = reference(*exact, target, knobs, 40.0)
    found = objective(hidden, weight, target, knobs, 40.0)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
    for ours, theirs in zip(
        torch.autograd.grad(found["objective"], [hidden, weight]),
        torch.autograd.grad(expected["objective"], exact),
        strict=True,
    ):
        assert ((ours.double() - theirs).norm() / theirs.norm()).item() <= 1e-5


def test_gradcheck() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -1, 10, 2, 2, 5])
    assert torch.autograd.gradcheck(lambda h, w: objective(h, w, target, ALL, 6.0)["objective"], (hidden, weight))


def test_plain_cross_entropy_is_torchs() -> None:
    hidden, weight, target = drawn()
    expected = F.cross_entropy(hidden @ weight.T, target)
    assert objective(hidden, weight, target, Regularizers(), N)["objective"].item() == pytest.approx(expected.item())


def test_smoothing_is_torchs_through_the_conversion() -> None:
    """Ours puts ε/(K−1) on the others, torch ε/K on all: ε_torch = ε·K/(K−1)."""
    hidden, weight, target = drawn(torch.float64)
    expected = F.cross_entropy(hidden @ weight.T, target, label_smoothing=0.1 * V / (V - 1))
    found = objective(hidden, weight, target, Regularizers(label_smoothing=0.1), N)["objective"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_numbers_of_the_literature() -> None:
    """At uniform logits over GPT-2's vocabulary: cross-entropy ln V = 10.825, z-loss of 1e-4 0.0117, entropy ln V."""
    hidden, weight = torch.zeros(2, 4), torch.zeros(50257, 4)
    target = torch.tensor([3, 50256])
    found = objective(hidden, weight, target, Regularizers(z_loss=1e-4, entropy_penalty=0.5), 2)
    assert found["loss"].item() == pytest.approx(10.8249, abs=1e-4)
    assert found["z_loss"].item() == pytest.approx(0.0117, abs=1e-4)
    assert found["entropy"].item() == pytest.approx(10.8249, abs=1e-4)
    assert found["objective"].item() == pytest.approx(10.8249 + 0.0117 - 0.5 * 10.8249, abs=1e-3)


def test_floor_of_label_smoothing() -> None:
    """The smallest smoothed loss at ε = 0.1, K = 50257 is 1.408 nats: the entropy of the smoothed target."""
    epsilon, k = 0.1, 50257
    best = torch.full((1, k), math.log(epsilon / (k - 1)))
    best[0, 7] = math.log(1 - epsilon)
    found = objective(torch.ones(1, 1), best.T.contiguous(), torch.tensor([7]), Regularizers(label_smoothing=0.1), 1)
    assert found["objective"].item() == pytest.approx(1.408, abs=1e-3)


def test_micro_batches_sum_to_the_step() -> None:
    """Divided by the step's count of targets, parts add up to the whole even when they are of unequal size."""
    hidden, weight, target = drawn(torch.float64)
    target[:9] = -1
    n = float((target >= 0).sum())
    whole = objective(hidden, weight, target, ALL, n)["objective"]
    parts = [
        objective(hidden[part], weight, target[part], ALL, n)["objective"] for part in (slice(0, 11), slice(11, N))
    ]
    assert (parts[0] + parts[1]).item() == pytest.approx(whole.item(), rel=1e-12)


def test_bf16_products_stay_near() -> None:
    hidden, weight, target = drawn()
    exact = objective(hidden, weight, target, ALL, N)["objective"]
    found = objective(hidden.bfloat16(), weight, target, ALL, N)["objective"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=2e-2)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


def test_the_token_after_next_is_that_of_a_plain_model_with_two_heads() -> None:
    """Two heads on one trunk, the second through a matrix of its own: the sum of their losses and all gradients.

    Of the second row the last target, and so two of the second head's, are missing.
    """
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 6, D, generator=generator, dtype=torch.float64, requires_grad=True)
    vectors = torch.nn.ParameterDict({"after_next": torch.randn(D, D, generator=generator, dtype=torch.float64)})
    matrix = vectors["after_next"]
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(V, (2, 6), generator=generator)
    targets[1, 5] = -1
    knobs = Regularizers(multi_token_weight=0.3, z_loss=0.1)
    first = objective(hidden.flatten(0, 1), weight, targets.flatten(), Regularizers(), 11)
    second = multi_token_terms(hidden, vectors, weight, targets, knobs, 9)
    head = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-1)
    further = F.cross_entropy(
        (hidden @ matrix.T @ weight.T)[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-1
    )
    assert second["multi_token_loss"].item() == pytest.approx(further.item(), rel=1e-12)
    ours, theirs = first["objective"] + second["objective"], head + 0.3 * further
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    everything = [hidden, matrix, weight]
    for one, other in zip(torch.autograd.grad(ours, everything), torch.autograd.grad(theirs, everything), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert multi_token_terms(hidden, torch.nn.ParameterDict(), weight, targets, Regularizers(), 9) == {}


def test_large_logits_stay_finite() -> None:
    hidden, weight, target = drawn()
    found = objective(hidden.detach() * 1e4, weight, target, ALL, N)
    assert all(bool(value.isfinite()) for value in found.values())


def teachers(count: int, dtype: torch.dtype = torch.float64, tokens: int = N) -> list[Taught]:
    """Of different widths; their shares differ from token to token."""
    generator = torch.Generator().manual_seed(7)
    shares = torch.rand(count, tokens, generator=generator, dtype=torch.float64) + 0.1
    shares /= shares.sum(0)
    draw = {"generator": generator, "dtype": torch.float64}
    return [
        Taught(torch.randn(tokens, 5 + k, **draw).to(dtype), torch.randn(V, 5 + k, **draw).to(dtype), shares[k])  # type: ignore[call-overload]
        for k in range(count)
    ]


def mean_of(taught: list[Taught], temperature: float) -> Tensor:
    """The mean over teachers of softmax(z / T), all at once."""
    return torch.stack(
        [one.share_N[:, None] * (one.hidden_ND @ one.weight_VD.T / temperature).softmax(-1) for one in taught]
    ).sum(0)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("knobs", [Regularizers(), ALL], ids=["alone", "all"])
@pytest.mark.parametrize("chunk", [64, 2**24 // V])
def test_distillation_is_the_plain_form_with_torchs_kl_div(
    count: int, temperature: float, knobs: Regularizers, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(1−α) of the cross-entropy, smoothed or not, and α·T² of the divergence; the other terms count whole."""
    tokens, n, alpha = 3 * N, 100.0, 0.3
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk * V)
    monkeypatch.setitem(module.VOCABULARY_MULTIPLE, "cpu", 64)
    hidden, weight, target = drawn(torch.float64)
    hidden, target = torch.cat([hidden, hidden.flip(0), 2 * hidden]).detach().requires_grad_(), target.repeat(3)
    target[5:7] = torch.tensor([-1, 0])
    taught = teachers(count, tokens=tokens)
    distilled = {"distillation_weight": alpha, "distillation_temperature": temperature}
    found = objective(hidden, weight, target, knobs.model_copy(update=distilled), n, taught=taught)
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    kept = target >= 0
    divergence = F.kl_div(log_p[kept], mean_of(taught, temperature)[kept], reduction="sum") / n
    hard = reference(hidden, weight, target, Regularizers(label_smoothing=knobs.label_smoothing), n)
    others = reference(hidden, weight, target, knobs, n)
    expected = others["objective"] - alpha * hard["objective"] + alpha * temperature**2 * divergence
    assert found["distillation_loss"].item() == pytest.approx(divergence.item(), rel=1e-12)
    assert found["loss"].item() == pytest.approx(hard["loss"].item(), rel=1e-12)
    assert found["objective"].item() == pytest.approx(expected.item(), rel=1e-12)
    both = [torch.autograd.grad(value, [hidden, weight]) for value in (found["objective"], expected)]
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_distillation() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 3, -1, 10, 2, 2, 5])
    knobs = ALL.model_copy(update={"distillation_weight": 0.4, "distillation_temperature": 2.0})
    taught = teachers(2, tokens=7)
    assert torch.autograd.gradcheck(
        lambda h, w: objective(h, w, target, knobs, 6.0, taught=taught)["objective"], (hidden, weight)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_with_its_teachers_weights_has_nothing_to_learn(dtype: torch.dtype) -> None:
    """At T = 1 and α = 1; the logits are as large as ±60, and most probabilities vanish."""
    hidden, weight, target = drawn()
    hidden = (4 * hidden).detach().to(dtype).requires_grad_()
    taught = [Taught(hidden.detach(), weight.detach(), torch.ones(N))]
    found = objective(hidden, weight, target, Regularizers(distillation_weight=1), N, taught=taught)
    assert found["objective"] == found["distillation_loss"] and abs(found["objective"].item()) < 1e-6
    assert found["loss"] > 1
    (gradient,) = torch.autograd.grad(found["objective"], hidden)
    (plain,) = torch.autograd.grad(objective(hidden, weight, target, Regularizers(), N)["objective"], hidden)
    assert gradient.norm() < 1e-5 * plain.norm()


def test_teachers_that_are_sure_of_different_tokens_leave_no_infinity() -> None:
    """Their mean is 1/2 on each of two; a student who is as unsure between them is ln 1 away, one of all V ln V/2."""
    taught = [Taught(torch.ones(1, 1), torch.eye(V)[:, [token]] * 1e4, torch.full((1,), 0.5)) for token in (0, 1)]
    knobs = Regularizers(distillation_weight=1)
    for best, expected in (([0, 1], 0.0), (range(V), math.log(V / 2))):
        student = torch.full((V, 1), -1e4)
        student[list(best)] = 3.0
        found = objective(torch.ones(1, 1), student, torch.tensor([7]), knobs, 1, taught=taught)
        assert found["distillation_loss"].item() == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """The objective's terms and gradients with mixup, two teachers, padding, and a second chunk that is not full."""
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 64 * V)
    monkeypatch.setitem(module.VOCABULARY_MULTIPLE, "cpu", 64)

    def formed(strength: float, dtype: torch.dtype, compiled: bool) -> list[Tensor]:
        hidden, weight, target = drawn()
        hidden = torch.cat([hidden, hidden.flip(0), 2 * hidden])[:-2].to(dtype).detach().requires_grad_()
        target = target.repeat(3)[:-2]
        target[5:7] = torch.tensor([-1, 0])
        mixed = target.roll(1), torch.linspace(0, 1, len(target))
        off = {name: strength * getattr(ALL, name) for name in ("label_smoothing", "z_loss", "entropy_penalty")}
        knobs = Regularizers(**off, distillation_weight=0.3 * strength, distillation_temperature=1 + strength)
        taught = [
            Taught(one.hidden_ND.to(dtype), one.weight_VD, one.share_N.float())
            for one in teachers(2, torch.float32, len(target))
        ]
        terms = objective(hidden, weight, target, knobs, 90.0, mixed, taught=taught, compiled=compiled)
        return [*terms.values(), *torch.autograd.grad(terms["objective"], [hidden, weight])]

    return formed


def test_what_is_compiled_fits_every_chunk_and_every_value(
    everything: Callable[..., list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks of three steps under other values: each of four functions is traced once."""
    counter = CompileCounter()
    monkeypatch.setattr(module, "_compiled", lambda step: torch.compile(step, backend=counter, dynamic=False))
    torch._dynamo.reset()
    for strength in (1.0, 0.5, 0.7):
        for found, expected in zip(*(everything(strength, torch.float32, how) for how in (True, False)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 4


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_compiled_it_is_the_same(dtype: torch.dtype, everything: Callable[..., list[Tensor]]) -> None:
    if missing_for_compile():
        pytest.skip("torch.compile needs a C++ compiler here")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, expected in zip(*(everything(1.0, dtype, how) for how in (True, False)), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(("count", "most"), [(0, 40e6), (2, 80e6)])
def test_memory_is_that_of_a_chunk(count: int, most: float) -> None:
    """The logits of all tokens never exist: with 2,048 tokens and 20,000 entries they alone would be 164 MB.

    Nor do those of two teachers: 23 MB were seen without them, 37 or 56 MB with them, as the memory happens to be cut.
    """
    import subprocess
    import sys

    # Not getrusage, whose maximum a process takes over from the one that started it.
    code = f"""
import torch
from benchmarks.losses import memory
from config import Regularizers
from regularizers import objective as module
module.CHUNK_ELEMENTS["cpu"] = 64 * 20000
torch.set_num_threads(1)
hidden, weight = torch.randn(2048, 64, requires_grad=True), torch.randn(20000, 64, requires_grad=True)
target = torch.randint(0, 20000, (2048,))
knobs = Regularizers(label_smoothing=0.1, z_loss=1e-4, entropy_penalty=0.1)
knobs = knobs.model_copy(update=dict(distillation_weight=0.5, distillation_temperature=2.0))
def backward(tokens):
    taught = [module.Taught(hidden.detach()[:tokens], weight.detach(), torch.full((tokens,), 0.5))] * {count}
    module.objective(hidden[:tokens], weight, target[:tokens], knobs, tokens, taught=taught)["objective"].backward()
backward(64)
before = memory("VmRSS")
backward(2048)
print(memory("VmHWM") - before)
"""
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 1e6 < grown < most
