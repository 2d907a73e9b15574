"""What wellposed is timed against: a plain PyTorch GPT-2, and Hugging Face's.

``PlainGPT2`` is a direct transcription of the GPT-2 that people write and copy (nanoGPT, MIT, Karpathy 2022): fused
attention, F.dropout everywhere, cross-entropy over all logits, AdamW, clipped gradients, without biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a network and of a step's batch."""

    n_layers: int
    d_model: int
    n_heads: int
    context: int
    batch: int
    vocab_size: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.context * self.batch


class PlainAttention(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model, bias=False)
        self.output = nn.Linear(shape.d_model, shape.d_model, bias=False)
        self.heads, self.dropout = shape.n_heads, dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(x_BTD).split(D, dim=2))
        dropout = self.dropout if self.training else 0.0
        y_BHTC = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.dropout(self.output(y_BHTC.transpose(1, 2).reshape(B, T, D)), self.dropout, self.training)


class PlainBlock(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.d_model, bias=False)
        self.attention = PlainAttention(shape, dropout)
        self.mlp_norm = nn.LayerNorm(shape.d_model, bias=False)
        self.input = nn.Linear(shape.d_model, 4 * shape.d_model, bias=False)
        self.output = nn.Linear(4 * shape.d_model, shape.d_model, bias=False)
        self.dropout = dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        hidden_BTF = F.gelu(self.input(self.mlp_norm(x_BTD)))
        return x_BTD + F.dropout(self.output(hidden_BTF), self.dropout, self.training)


class PlainGPT2(nn.Module):
    """Tokens and targets to the loss."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.context, shape.d_model)
        self.blocks = nn.ModuleList([PlainBlock(shape, dropout) for _ in range(shape.n_layers)])
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        self.dropout = dropout
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                last = "output" in name
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * shape.n_layers) if last else 1))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        x_BTD = F.dropout(x_BTD, self.dropout, self.training)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV = F.linear(self.norm(x_BTD), self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def plain_adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.AdamW:
    """nanoGPT's: matrices decay, vectors do not, betas of its character recipe."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))


def stepper(
    loss_of: Callable[[Tensor, Tensor], Tensor], model: nn.Module, bf16: bool
) -> Callable[[Tensor, Tensor], None]:
    """A step as these programs take it: forward, backward, clip at 1, AdamW."""
    optimizer = plain_adamw(model)

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> None:
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(shape: Shape, dropout: float) -> nn.Module:
    """GPT2LMHeadModel of transformers (extra: bench) as it comes, with its fused attention."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.d_model, n_layer=shape.n_layers,
        n_head=shape.n_heads, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)
