"""GPT in three families whose weights load into Hugging Face's architectures of the same name.

    gpt2   LayerNorm, learned positions, GELU (tanh), biases            Radford 2019
    llama  RMSNorm, rotary positions, SwiGLU, grouped heads, no biases  Touvron 2023
    qwen3  llama with RMSNorm on the queries and keys of each head      Qwen 2025

Shape suffixes: B batch, T time, S keys seen (cache + T), D width, F hidden width of the MLP, H query heads,
K key/value heads, C width of a head, V vocabulary. Pre-norm blocks: x + attention(norm(x)), x + mlp(norm(x)).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import Model, Regularizers
from randomness import torch_generator
from regularizers.activations import Dropout, StochasticDepth, depth_rate
from regularizers.inputs import InputChanges

Mask = Any  # what attend takes: a tensor of truth values, a BlockMask, or None
Rotation = tuple[Tensor, Tensor]  # cosines and sines of the positions, each (1, T, C/2) or (B, 1, T, C/2)

# How the parameters begin: every one matches exactly one row, or building fails. Normal is N(0, 0.02²); matrices out of
# a branch are drawn with 0.02 / sqrt(2 n_layers), so that the variance of the residual stream does not grow with depth.
INITIAL = {
    r"(embedding|positions|output)\.weight": "normal",
    r"blocks\.\d+\.(attention\.qkv|mlp\.input)\.weight": "normal",
    r"blocks\.\d+\.(attention|mlp)\.output\.weight": "residual",
    r"(.*\.)?(\w+_)?norm\.weight": "one",
    r".*\.bias": "zero",
    r"auxiliary\.(direction|offset|mask)": "normal",
    r"auxiliary\.after_next": "identity",
}
AUXILIARY = "auxiliary."  # how the names of parameters begin that only regularizers use, and nobody exports


class Cache(dict["Attention", tuple[Tensor, Tensor]]):
    """Keys and values of the tokens already read, for generation: (B, K, S, C) each, for every layer."""

    @property
    def length(self) -> int:
        """Tokens already read."""
        return next((k_BKSC.shape[2] for k_BKSC, _ in self.values()), 0)

    def extend(self, layer: Attention, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values of one layer; returns all of them, (B, K, S, C)."""
        if layer in self:
            k_before, v_before = self[layer]
            k_BKTC, v_BKTC = torch.cat([k_before, k_BKTC], dim=2), torch.cat([v_before, v_BKTC], dim=2)
        self[layer] = (k_BKTC, v_BKTC)
        return k_BKTC, v_BKTC


class Attention(nn.Module):
    """Causal attention with grouped heads, optional rotary positions and query/key norms."""

    def __init__(self, config: Model, dropout: float) -> None:
        super().__init__()
        heads, kv_heads, width = config.n_heads, config.kv_heads, config.head_width
        bias = config.family == "gpt2"
        self.sizes = [heads * width, kv_heads * width, kv_heads * width]
        self.width = width
        self.qkv = nn.Linear(config.d_model, sum(self.sizes), bias=bias)
        self.output = nn.Linear(heads * width, config.d_model, bias=bias)
        self.query_norm = nn.RMSNorm(width, config.norm_eps) if config.family == "qwen3" else None
        self.key_norm = nn.RMSNorm(width, config.norm_eps) if config.family == "qwen3" else None
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        q, k, v = self.qkv(x_BTD).split(self.sizes, dim=-1)
        q_BHTC = rearrange(q, "B T (H C) -> B H T C", C=self.width)
        k_BKTC = rearrange(k, "B T (K C) -> B K T C", C=self.width)
        v_BKTC = rearrange(v, "B T (K C) -> B K T C", C=self.width)
        if self.query_norm is not None and self.key_norm is not None:
            q_BHTC, k_BKTC = self.query_norm(q_BHTC.float()), self.key_norm(k_BKTC.float())
        if rotation is not None:
            q_BHTC, k_BKTC = rotate(q_BHTC, *rotation), rotate(k_BKTC, *rotation)
        # Norms and rotation are done in fp32; under autocast the products go on in the precision of v.
        q_BHTC, k_BKTC = q_BHTC.to(v_BKTC.dtype), k_BKTC.to(v_BKTC.dtype)
        if cache is not None:
            k_BKTC, v_BKTC = cache.extend(self, k_BKTC, v_BKTC)
        y_BHTC = attend(q_BHTC, k_BKTC, v_BKTC, mask, self.dropout)
        out_BTD: Tensor = self.output(rearrange(y_BHTC, "B H T C -> B T (H C)"))
        return out_BTD


def attend(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, mask: Mask, dropout: Dropout) -> Tensor:
    """softmax(q·k/√C)·v with dropout of the weights, (B, H, T, C).

    ``mask`` is True where a key is seen, (T, S) or (B, 1, T, S), or flex_attention's BlockMask; None: each token sees
    itself and those before it.

    The fused kernel is used where it is the faster one. On a CPU it is not with dropout, nor in bf16 at contexts of up
    to 512: the weights are formed explicitly then.
    """
    batch, heads, time, width = q_BHTC.shape
    if mask is not None and not isinstance(mask, Tensor):
        flex = flex_attention(q_BHTC.device)
        blockwise_BHTC: Tensor = flex(q_BHTC, k_BKSC, v_BKSC, block_mask=mask, enable_gqa=heads != k_BKSC.shape[1])
        return blockwise_BHTC
    short = q_BHTC.dtype == torch.bfloat16 and 1 < time <= 512
    if q_BHTC.device.type == "cuda" or not (dropout.rate or (q_BHTC.device.type == "cpu" and short)):
        return F.scaled_dot_product_attention(
            q_BHTC, k_BKSC, v_BKSC, mask, dropout.rate, is_causal=mask is None and time > 1,
            enable_gqa=heads != k_BKSC.shape[1],
        )  # fmt: skip
    k_BHSC, v_BHSC = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k_BKSC, v_BKSC))
    if mask is None:
        mask = torch.ones(time, time, dtype=torch.bool, device=q_BHTC.device).tril()
    hidden = torch.zeros(mask.shape, dtype=q_BHTC.dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    hidden = hidden.expand(batch, heads, time, -1).flatten(0, 1) if mask.ndim == 4 else hidden
    scores = torch.baddbmm(hidden, q_BHTC.flatten(0, 1) * width**-0.5, k_BHSC.flatten(0, 1).transpose(1, 2))
    weights_BHTS: Tensor = dropout(scores.view(batch, heads, time, -1).softmax(dim=-1))
    return weights_BHTS.to(v_BHSC.dtype) @ v_BHSC


def flex_attention(device: torch.device) -> Callable[..., Tensor]:
    """torch's flex_attention, compiled on a GPU, where it would form all scores if it were not."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    plain: Callable[..., Tensor] = flex
    return plain if device.type == "cpu" or torch.compiler.is_compiling() else compiled_once(plain)


@lru_cache
def compiled_once(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function, compiled."""
    return torch.compile(function, dynamic=False)


def document_blocks(documents_BT: Tensor) -> Mask:
    """The mask of isolated documents as flex_attention takes it: of blocks, most of which it need not look at."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[batch, query] == documents_BT[batch, key])

    batch, time = documents_BT.shape
    return create_block_mask(seen, batch, None, time, time, device=documents_BT.device)


def rotate(x_BHTC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su 2021) in the rotate-half convention; cos and sin are (T, C/2), or (B or 1, 1, T, C/2)."""
    first, second = x_BHTC.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def gelu(x: Tensor) -> Tensor:
    """GELU in GPT-2's tanh form (Hendrycks 2016).

    In bf16 on a CPU x·Φ(x) itself, which the tanh form approximates to 0.0005: less than bf16 rounds either by, and
    done in a quarter of the time there.
    """
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


class MLP(nn.Module):
    """GELU(tanh) for gpt2, SwiGLU for the others; its input matrix holds gate and value side by side."""

    def __init__(self, config: Model, dropout: float) -> None:
        super().__init__()
        self.gated = config.family != "gpt2"
        self.input = nn.Linear(config.d_model, config.hidden_width * (2 if self.gated else 1), bias=not self.gated)
        self.output = nn.Linear(config.hidden_width, config.d_model, bias=not self.gated)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.gated:
            gate_BTF, value_BTF = self.input(x_BTD).chunk(2, dim=-1)
            hidden_BTF = F.silu(gate_BTF) * value_BTF
        else:
            hidden_BTF = gelu(self.input(x_BTD))
        out_BTD: Tensor = self.output(self.dropout(hidden_BTF))
        return out_BTD


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: Model, rates: Regularizers, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rates.attention_dropout)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config, rates.mlp_dropout)
        self.residual_dropout = Dropout(rates.residual_dropout)
        self.stochastic_depth = StochasticDepth(depth_rate(rates.stochastic_depth, layer, config.n_layers))
        self.recomputed = config.checkpoint_activations

    def forward(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        recomputed = self.recomputed if torch.is_grad_enabled() else "none"
        if recomputed == "block":
            # With the random numbers of the first time, which are put back for it.
            whole_BTD: Tensor = checkpoint(self.branches, x_BTD, rotation, mask, cache, use_reentrant=False)
            return whole_BTD
        return self.branches(x_BTD, rotation, mask, cache, recomputed == "attention")

    def branches(
        self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None, again: bool = False
    ) -> Tensor:
        """What ``forward`` returns; ``again``: the attention branch is computed again on the way back."""
        inputs = x_BTD, rotation, mask, cache
        x_BTD = x_BTD + (checkpoint(self.attended, *inputs, use_reentrant=False) if again else self.attended(*inputs))
        x_BTD = x_BTD + self.stochastic_depth(self.residual_dropout(self.mlp(self.mlp_norm(x_BTD))))
        return x_BTD

    def attended(self, x_BTD: Tensor, rotation: Rotation | None, mask: Mask, cache: Cache | None) -> Tensor:
        """What attention adds."""
        added_BTD: Tensor = self.attention(self.attention_norm(x_BTD), rotation, mask, cache)
        out_BTD: Tensor = self.stochastic_depth(self.residual_dropout(added_BTD))
        return out_BTD


class GPT(nn.Module):
    """Tokens to hidden states; ``logits`` turns hidden states into logits. Never computes a loss.

    Args:
        config: the network's shape.
        vocab_size: V, known from the corpus.
        regularizers: the rates of dropout, and what else they train; None for a model that is not going to train.
    """

    def __init__(self, config: Model, vocab_size: int, regularizers: Regularizers | None = None) -> None:
        super().__init__()
        rates = regularizers or Regularizers()
        self.config, self.vocab_size = config, vocab_size
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context_length, config.d_model) if config.family == "gpt2" else None
        self.embedding_dropout = Dropout(rates.embedding_dropout)
        self.blocks = nn.ModuleList([Block(config, rates, layer) for layer in range(config.n_layers)])
        self.norm = make_norm(config)
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self.auxiliary = auxiliary_parameters(rates, config.d_model)
        # Whether isolated documents are left to flex_attention, which takes no dropout: for compiled code on a GPU.
        self.uses_blocks = False
        self.blocks_possible = not rates.attention_dropout and config.head_width >= 16
        self.cos_TC: Tensor
        self.sin_TC: Tensor
        if config.family != "gpt2":
            cos_TC, sin_TC = rotation_table(config)
            self.register_buffer("cos_TC", cos_TC, persistent=False)
            self.register_buffer("sin_TC", sin_TC, persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
        changes: InputChanges | None = None,
    ) -> Tensor:
        """The final hidden states (B, T, D), after the last norm, in fp32 outside autocast.

        positions_BT counts from the start of each document, and documents_BT numbers the documents of each row, when
        documents are isolated; None: one stream. With a cache, the tokens follow those it holds. ``changes`` are what
        regularizers do to the embeddings of this micro-batch, in training.

        Raises ValueError for more tokens than the context has, those in the cache included.
        """
        past, time = (cache.length if cache else 0), tokens_BT.shape[1]
        if past + time > self.config.context_length:
            raise ValueError(f"{past + time} tokens exceed the model's context of {self.config.context_length}")
        x_BTD: Tensor = self.embedding(tokens_BT)
        if changes is not None:
            x_BTD = changes.apply(x_BTD, self.auxiliary)
        positions = slice(past, past + time) if positions_BT is None else positions_BT
        rotation = None
        if self.positions is not None:
            x_BTD = x_BTD + self.positions.weight[positions]
        else:
            rotation = (self.cos_TC[positions].unsqueeze(-3), self.sin_TC[positions].unsqueeze(-3))
        mask: Mask = None
        if documents_BT is not None and self.uses_blocks and self.blocks_possible:
            mask = document_blocks(documents_BT)
        elif documents_BT is not None:
            same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
            mask = same_BTT.tril()[:, None]
        elif past and time > 1:
            mask = torch.ones(time, past + time, dtype=torch.bool, device=tokens_BT.device).tril(past)
        x_BTD = self.embedding_dropout(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation, mask, cache)
        x_BTD = self.norm(x_BTD)
        return x_BTD

    def compiled(self, in_blocks: bool) -> Callable[..., Tensor]:
        """The forward pass compiled: as one, or each block for itself, the same code for all of them."""
        if not in_blocks:
            return torch.compile(self, dynamic=False)
        # The rate of stochastic depth is each block's own, and evaluation without gradients is compiled apart.
        torch._dynamo.config.recompile_limit = 2 * len(self.blocks) + 8
        for block in self.blocks:
            block.compile(dynamic=False)
        return self

    @property
    def output_weight(self) -> Tensor:
        """The output matrix (V, D): the embedding matrix when tied."""
        return self.embedding.weight if self.output is None else self.output.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V)."""
        return F.linear(hidden, self.output_weight)

    @torch.no_grad()
    def initialize(self, seed: int) -> GPT:
        """Draw all weights as the table INITIAL says, each from a generator of its own; returns the model.

        Raises ValueError for a parameter that the table does not have exactly once.
        """
        for name, parameter in self.named_parameters():
            rules = [rule for pattern, rule in INITIAL.items() if re.fullmatch(pattern, name)]
            if len(rules) != 1:
                raise ValueError(f"the parameter {name} matches {len(rules)} rows of the table of initial values")
            if rules[0] == "identity":
                nn.init.eye_(parameter)
                continue
            if rules[0] in ("one", "zero"):
                parameter.fill_(1.0 if rules[0] == "one" else 0.0)
                continue
            deviation = 0.02 / (math.sqrt(2 * self.config.n_layers) if rules[0] == "residual" else 1.0)
            drawn = torch.randn(parameter.shape, generator=torch_generator(seed, f"initial {name}"))
            parameter.copy_(drawn * deviation)
        return self

    def count_parameters(self) -> int:
        """Trained elements; tied weights count once."""
        return sum(parameter.numel() for parameter in self.parameters())


def auxiliary_parameters(config: Regularizers, width: int) -> nn.ParameterDict:
    """What regularizers train beside the network, which evaluation, generation and export do without."""
    parameters = nn.ParameterDict()
    if config.reversed_fraction:
        parameters["direction"] = nn.Parameter(torch.empty(width))
    if config.target_offset > 1:
        parameters["offset"] = nn.Parameter(torch.empty(config.target_offset - 1, width))
    if config.masked_input_weight:
        parameters["mask"] = nn.Parameter(torch.empty(width))
    if config.multi_token_weight:
        parameters["after_next"] = nn.Parameter(torch.empty(width, width))
    return parameters


def make_norm(config: Model) -> nn.Module:
    """The family's norm over the residual stream."""
    if config.family == "gpt2":
        return nn.LayerNorm(config.d_model, config.norm_eps)
    return nn.RMSNorm(config.d_model, config.norm_eps)


def rotation_table(config: Model) -> tuple[Tensor, Tensor]:
    """Cosines and sines of t · theta^(-2c/C), each (context, C/2), in fp32."""
    exponents = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), 1.0 / config.rope_theta**exponents)
    return angles.cos(), angles.sin()
