"""The network itself: who sees whom, what it starts from, what it computes, how large it is."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from conftest import WITH_PARAMETERS
from torch import Tensor

from config import Model, Regularizers
from model.gpt import GPT, attend, gelu, rotate, rotation_table
from randomness import seed_activations
from regularizers.activations import Dropout

FAMILIES = get_args(Model.model_fields["family"].annotation)
every_family = pytest.mark.parametrize("family", FAMILIES)
VOCABULARY = 97
DROPOUT = Regularizers(embedding_dropout=0.2, attention_dropout=0.3, residual_dropout=0.2, mlp_dropout=0.2)


def shape(family: str, **changes: Any) -> Model:
    return Model(family=family, **{"n_layers": 2, "d_model": 24, "n_heads": 4, "context_length": 16, **changes})


def random_model(config: Model, rates: Regularizers | None = None) -> GPT:
    """A model in evaluation mode whose every parameter, norms and biases too, is far from its initial value."""
    model = GPT(config, VOCABULARY, rates).initialize(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def random_tokens(batch: int = 2, time: int = 16) -> Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(2))


def run(model: GPT, tokens: Tensor, **where: Tensor) -> Tensor:
    """Hidden states, with the same dropout masks at each call."""
    torch.manual_seed(3)
    with torch.no_grad():
        return model(tokens, **where)


# ---------------------------------------------------------------------------------------------- law 6

# Rows of 16 tokens, three documents in each.
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4, [0] * 1 + [1] * 13 + [2] * 2])
POSITIONS = torch.tensor([[*range(5), *range(7), *range(4)], [*range(1), *range(13), *range(2)]])
ISOLATED = {"positions_BT": POSITIONS, "documents_BT": DOCUMENTS}


@every_family
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "with dropout"])
@pytest.mark.parametrize("isolated", [False, True], ids=["one stream", "isolated"])
def test_no_token_sees_the_future_or_another_document(family: str, training: bool, isolated: bool) -> None:
    """Another token at place t changes the hidden states from t to the end of its document, and no others."""
    model = random_model(shape(family), DROPOUT).train(training)
    where = ISOLATED if isolated else {}
    tokens = random_tokens()
    before = run(model, tokens, **where)
    for t in range(16):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCABULARY
        differs = (run(model, changed, **where) - before).abs().amax(-1)  # (batch, time)
        sees = torch.arange(16).expand(2, -1) >= t
        if isolated:
            sees = sees & (DOCUMENTS[:, t : t + 1] == DOCUMENTS)
        assert bool((differs[~sees] <= 1e-6).all())
        if not training:  # dropout may hide a change
            assert bool((differs[sees] > 1e-4).all())


@every_family
def test_packed_documents_that_are_isolated_are_as_each_alone(family: str) -> None:
    model, tokens = random_model(shape(family)), random_tokens()
    packed = run(model, tokens, **ISOLATED)
    for row in range(2):
        for document in range(3):
            inside = DOCUMENTS[row] == document
            alone = run(model, tokens[row : row + 1, inside])
            torch.testing.assert_close(packed[row, inside], alone[0], rtol=1e-5, atol=1e-5)


@every_family
def test_one_document_in_isolation_is_one_stream(family: str) -> None:
    model, tokens = random_model(shape(family)), random_tokens()
    positions = torch.arange(16).expand(2, -1)
    isolated = run(model, tokens, positions_BT=positions, documents_BT=torch.zeros(2, 16, dtype=torch.int64))
    torch.testing.assert_close(isolated, run(model, tokens), rtol=1e-5, atol=1e-5)


@every_family
def test_a_window_longer_than_the_context_is_refused(family: str) -> None:
    model = random_model(shape(family))
    with pytest.raises(ValueError, match="17 tokens exceed the model's context of 16"):
        run(model, random_tokens(1, 17))


# ---------------------------------------------------------------------------------------------- initialisation


@every_family
@pytest.mark.parametrize("tied", [True, False])
def test_initial_values_are_those_of_the_table(family: str, tied: bool) -> None:
    model = GPT(shape(family, d_model=64, n_layers=8, tie_embeddings=tied), 512)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.initialize(0)
    drawn = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().double()
        assert bool(values.isfinite().all()), f"{name} was not initialised"
        if name.endswith("norm.weight"):
            assert bool((values == 1).all()), name
        elif name.endswith("bias"):
            assert bool((values == 0).all()), name
        else:
            # out of a branch: 0.02 / sqrt(2 * 8) = 0.005
            expected = 0.005 if ".output." in name else 0.02
            count = values.numel()
            drawn += count
            assert abs(values.mean()) < 5 * expected / count**0.5, name
            assert abs(values.std() / expected - 1) < 5 / (2 * count) ** 0.5, name
            assert values.abs().max() > 3 * expected, f"{name} is not normal: no tails"
    assert drawn > 0.9 * model.count_parameters()


def test_what_regularizers_train_begins_as_said() -> None:
    """Vectors are drawn like embeddings, the matrix is the identity."""
    knobs = Regularizers.model_validate(WITH_PARAMETERS)
    auxiliary = GPT(shape("llama", d_model=512, n_heads=2), 31, knobs).initialize(0).auxiliary
    assert {name: tuple(values.shape) for name, values in auxiliary.items()} == {
        "direction": (512,),
        "offset": (2, 512),
        "mask": (512,),
        "after_next": (512, 512),
    }
    assert torch.equal(auxiliary.pop("after_next"), torch.eye(512))
    for name, values in auxiliary.items():
        assert values.std().item() == pytest.approx(0.02, rel=0.2), name
    assert not len(GPT(shape("llama"), 31).auxiliary)


def test_each_parameter_is_drawn_by_itself_and_the_seed_decides() -> None:
    first, again, other = (dict(GPT(shape("llama"), 300).initialize(s).named_parameters()) for s in (0, 0, 1))
    matrices = [name for name in first if first[name].ndim == 2]
    for name in matrices:
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]), name
    beginnings = {tuple(first[name].flatten()[:8].tolist()) for name in matrices}
    assert len(beginnings) == len(matrices)
    deeper = dict(GPT(shape("llama", n_layers=3), 300).initialize(0).named_parameters())
    assert torch.equal(deeper["blocks.1.mlp.input.weight"], first["blocks.1.mlp.input.weight"])


def test_a_parameter_that_no_row_of_the_table_names_is_an_error() -> None:
    model = GPT(shape("llama"), 300)
    model.blocks[0].gain = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.gain matches 0 rows"):
        model.initialize(0)


# ---------------------------------------------------------------------------------------------- attention


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention in float64, written out: one query of one head at a time, head h reads key head h // groups."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    groups = q.shape[1] // k.shape[1]
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            for t in range(q.shape[2]):
                keys, values = k[batch, head // groups, : t + 1], v[batch, head // groups, : t + 1]
                scores = keys @ q[batch, head, t] / math.sqrt(q.shape[3])
                weights = torch.exp(scores - scores.max())
                out[batch, head, t] = (weights / weights.sum()) @ values
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("path", ["fused", "explicit"])
def test_attention_is_its_definition(kv_heads: int, path: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 12, 8, generator=generator) * 2
    k, v = (torch.randn(2, kv_heads, 12, 8, generator=generator) for _ in range(2))
    dropout = Dropout(0.0)
    if path == "explicit":  # dropout so rare that none of these weights falls to it
        dropout = Dropout(1e-9)
        torch.manual_seed(0)
    found = attend(q, k, v, None, dropout)
    torch.testing.assert_close(found.double(), reference_attention(q, k, v), rtol=1e-5, atol=2e-6)


def test_queries_and_keys_are_normalised_in_fp32() -> None:
    """Under autocast too: the norm of the bf16 numbers that come in, to the rounding of fp32."""
    model = random_model(shape("qwen3"))
    attention = model.blocks[1].attention
    seen: list[tuple[torch.nn.RMSNorm, Tensor, Tensor]] = []
    for norm in (attention.query_norm, attention.key_norm):
        norm.register_forward_hook(lambda norm, given, out: seen.append((norm, given[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        run(model, random_tokens())
    assert len(seen) == 2
    for norm, given, out in seen:
        x = given.double()
        expected = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "with dropout"])
def test_grouped_heads_are_full_heads_with_repeated_keys_and_values(family: str, training: bool) -> None:
    grouped = random_model(shape(family, n_kv_heads=2), DROPOUT)
    full = GPT(shape(family), VOCABULARY, DROPOUT)
    state = grouped.state_dict()
    for name in [name for name in state if "qkv" in name]:
        q, k, v = state[name].split([24, 12, 12])
        k, v = (part.view(2, 6, 24).repeat_interleave(2, dim=0).reshape(24, 24) for part in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    tokens = random_tokens()
    expected = run(full.train(training), tokens)
    torch.testing.assert_close(run(grouped.train(training), tokens), expected, rtol=1e-4, atol=1e-5)


def test_dropout_at_zero_or_in_evaluation_returns_the_input_itself() -> None:
    x = torch.randn(3, 4)
    assert Dropout(0.0).train()(x) is x
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.5).train()(x) is not x


@every_family
def test_evaluation_ignores_every_rate(family: str) -> None:
    plain, noisy = random_model(shape(family)), random_model(shape(family), DROPOUT)
    assert torch.equal(run(plain, random_tokens()), run(noisy, random_tokens()))
    assert not torch.equal(run(plain, random_tokens()), run(noisy.train(), random_tokens()))


# ---------------------------------------------------------------------------------------------- rotary positions


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_again_has_the_same_masks_and_gradients(
    family: str, isolated: bool, dtype: torch.dtype
) -> None:
    """Bit for bit, over two micro-batches with every dropout on; and less is kept for the way back."""
    names = ("embedding_dropout", "attention_dropout", "residual_dropout", "mlp_dropout", "stochastic_depth")
    tokens, documents = random_tokens(4), torch.arange(4)[:, None] + torch.arange(16) // 9
    gradients, kept = {}, {}
    for kind in ("none", "attention", "block"):
        model = random_model(shape(family, checkpoint_activations=kind), Regularizers(**dict.fromkeys(names, 0.2)))
        saved: list[int] = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda values, saved=saved: saved.append(values.nbytes) or values, lambda values: values
        )
        for micro_batch in range(2):
            seed_activations(0, 0, micro_batch)
            with keep, torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                hidden = model.train()(tokens, documents_BT=documents if isolated else None)
            (hidden.float() * torch.linspace(-1, 1, hidden.shape[-1])).square().sum().backward()
        gradients[kind] = [parameter.grad for parameter in model.parameters()]
        kept[kind] = sum(saved)
    for kind in ("attention", "block"):
        pairs = zip(gradients["none"], gradients[kind], strict=True)
        assert all(one is other or (one is not None and torch.equal(one, other)) for one, other in pairs), kind
    assert kept["none"] > 1.3 * kept["attention"] > 1.3 * kept["block"]


def test_gelu_is_gpt2s_to_the_rounding_of_bf16() -> None:
    """Against the tanh form in float64, of every bf16 number from -8 to 8: bf16's rounding, and 0.0005."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() <= 8]
    for dtype, unit in ((torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-22)):
        expected = 0.5 * x.double() * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)))
        allowed = unit * expected.abs() + (5e-4 if dtype == torch.bfloat16 else 1e-6)
        assert ((gelu(x.to(dtype)).double() - expected).abs() <= allowed).all()


def test_rotation_turns_each_pair_by_its_angle() -> None:
    """Pair (c, c + C/2) at time t is turned by t / theta^(2c/C), as complex numbers in float64 turn."""
    cos, sin = rotation_table(shape("llama", head_dim=8, rope_theta=100.0))
    x = torch.randn(1, 1, 16, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    for t in range(16):
        for c in range(4):
            angle = t / 100.0 ** (2 * c / 8)
            expected = complex(x[0, 0, t, c], x[0, 0, t, c + 4]) * complex(math.cos(angle), math.sin(angle))
            found = complex(turned[0, 0, t, c], turned[0, 0, t, c + 4])
            assert abs(found - expected) < 1e-5


def test_scores_of_rotated_queries_and_keys_depend_on_the_distance_alone() -> None:
    cos, sin = rotation_table(shape("llama", head_dim=16, context_length=64))
    generator = torch.Generator().manual_seed(0)
    q, k = (rotate(torch.randn(1, 1, 1, 16, generator=generator).expand(1, 1, 64, 16), cos, sin)[0, 0] for _ in "qk")
    scores = q @ k.T
    for distance in range(-60, 61, 7):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores[0].std() > 0.1, "but on the distance it depends"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_hidden_states_do_not_change_when_all_positions_are_shifted(family: str) -> None:
    model, tokens = random_model(shape(family)), random_tokens(2, 10)
    at = torch.arange(10).expand(2, -1)
    torch.testing.assert_close(run(model, tokens, positions_BT=at + 6), run(model, tokens), rtol=1e-4, atol=1e-4)
    stretched = run(model, tokens, positions_BT=torch.tensor([0, 2, 3, 5, 6, 7, 8, 9, 11, 13]).expand(2, -1))
    assert (stretched - run(model, tokens)).abs().max() > 1e-3


# ---------------------------------------------------------------------------------------------- sizes and outputs


@pytest.mark.parametrize(
    ("published", "vocab_size", "config"),
    [
        (124_439_808, 50257, {"family": "gpt2", "n_layers": 12, "d_model": 768, "n_heads": 12, "context_length": 1024}),
        (
            1_100_048_384,  # TinyLlama 1.1B
            32000,
            {
                **{"family": "llama", "n_layers": 22, "d_model": 2048, "n_heads": 32, "n_kv_heads": 4, "d_ff": 5632},
                "tie_embeddings": False,
            },
        ),
        (
            596_049_920,  # Qwen3 0.6B
            151936,
            {
                **{"family": "qwen3", "n_layers": 28, "d_model": 1024, "n_heads": 16, "n_kv_heads": 8, "d_ff": 3072},
                "head_dim": 128,
            },
        ),
    ],
    ids=["GPT-2", "TinyLlama", "Qwen3"],
)
def test_known_models_have_their_published_number_of_parameters(
    published: int, vocab_size: int, config: dict[str, Any]
) -> None:
    with torch.device("meta"):
        assert GPT(Model(**config), vocab_size).count_parameters() == published


@every_family
def test_logits_are_the_output_matrix_times_the_hidden_state(family: str) -> None:
    tied = random_model(shape(family))
    untied = random_model(shape(family, tie_embeddings=False))
    assert tied.output_weight is tied.embedding.weight and "output.weight" not in tied.state_dict()
    assert untied.output_weight is not untied.embedding.weight
    for model in (tied, untied):
        hidden = run(model, random_tokens())
        expected = torch.einsum("btd,vd->btv", hidden.double(), model.output_weight.double())
        torch.testing.assert_close(model.logits(hidden).double(), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_a_new_model_is_as_good_as_guessing(family: str) -> None:
    model = GPT(shape(family, d_model=64), VOCABULARY).initialize(0).eval()
    logits = model.logits(run(model, random_tokens(8)))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), random_tokens(8).roll(-1, 1).flatten())
    assert abs(loss.item() - math.log(VOCABULARY)) < 0.1


@every_family
def test_gradients_reach_every_parameter(family: str) -> None:
    model = random_model(shape(family, tie_embeddings=False)).train()
    model.logits(model(random_tokens())).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


# ---------------------------------------------------------------------------------------------- isolated documents


@pytest.mark.parametrize("name", ["gpt2", "llama", "grouped"])
def test_blocks_of_documents_are_the_dense_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """flex_attention gives the hidden states of the dense path, and the gradients, on a context that fills no block."""
    shape = {"gpt2": {"family": "gpt2"}, "llama": {}, "grouped": {"n_kv_heads": 1}}[name]
    sizes = {"n_layers": 2, "d_model": 32, "n_heads": 2, "context_length": 192}
    model = GPT(Model.model_validate(sizes | shape), 61).initialize(0)
    tokens = torch.randint(61, (3, 192), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([[1, 127, 64], [150, 1, 41], [192, 0, 0]])
    documents = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])
    positions = torch.stack([torch.cat([torch.arange(int(length)) for length in row]) for row in lengths])
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # says no to gradients on a CPU
    found = []
    for model.uses_blocks in (False, True):
        model.zero_grad()
        hidden = model(tokens, positions, documents)
        hidden.square().mean().backward()
        found.append([hidden, *(weight.grad for weight in model.parameters())])
    for dense, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, dense, atol=1e-5, rtol=1e-4)
    assert not torch.equal(found[0][0], found[1][0])  # it was another path


def test_with_dropout_of_attention_documents_keep_the_dense_mask() -> None:
    """flex_attention knows no dropout."""
    model = GPT(Model(d_model=32, n_heads=2), 61, Regularizers(attention_dropout=0.1))
    assert not model.blocks_possible and GPT(Model(d_model=32, n_heads=2), 61).blocks_possible


@pytest.mark.slow
def test_blocks_of_documents_are_compiled_into_one_graph() -> None:
    model = GPT(Model(d_model=32, n_heads=2, context_length=64), 61).initialize(0)
    model.uses_blocks = True
    tokens, documents = (
        torch.zeros(2, 64, dtype=torch.long),
        torch.arange(64).div(9, rounding_mode="floor").expand(2, 64),
    )
    with torch.no_grad():
        whole = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")(tokens, tokens, documents)
        torch.testing.assert_close(whole, model(tokens, tokens, documents))


@pytest.mark.parametrize(("rate", "graphs"), [(0.0, 1), (0.2, 3)])
def test_blocks_are_compiled_once_for_all(rate: float, graphs: int) -> None:
    """But for stochastic depth, whose rate is each block's own; and the hidden states are those of the whole model."""
    model = GPT(Model(d_model=32, n_heads=2, n_layers=3), 61, Regularizers(stochastic_depth=rate)).initialize(0)
    tokens, found = torch.arange(40).view(2, 20), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        found.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.manual_seed(0)
    expected = model(tokens)
    with pytest.MonkeyPatch.context() as patch:
        compile_module = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda self, **words: compile_module(self, backend=count, **words))
        forward = model.compiled(in_blocks=True)
    torch.manual_seed(0)
    torch.testing.assert_close(forward(tokens), expected)
    assert len(found) == graphs
