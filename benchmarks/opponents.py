"""What wellposed is timed against: a GPT-2 in plain PyTorch, and Hugging Face's.

``PlainGPT2`` is our own, written from the description of the architecture (Radford 2019) with what PyTorch offers for
each part: pre-norm blocks, learned positions, GELU, an output tied to the embedding, no biases; fused attention;
dropout after the embedding, of the attention weights and of what each branch adds. AdamW decays its matrices only, and
the joint norm of its gradients is clipped at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]  # of tokens_BT and targets_BT


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


class Block(nn.Module):
    """Attention and an MLP, four times as wide within, each reading a norm of the stream and adding to it."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        width = shape.d_model
        self.n_heads, self.dropout = shape.n_heads, nn.Dropout(dropout)
        self.to_heads = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, 3 * width, bias=False))
        self.from_heads = nn.Linear(width, width, bias=False)
        self.widen = nn.Sequential(nn.LayerNorm(width, bias=False), nn.Linear(width, 4 * width, bias=False), nn.GELU())
        self.narrow = nn.Linear(4 * width, width, bias=False)
        for last in (self.from_heads, self.narrow):
            nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * shape.n_layers))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BHTC, k_BHTC, v_BHTC = self.to_heads(x_BTD).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.dropout.p if self.training else 0.0
        heads_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, dropout_p=rate, is_causal=True)
        x_BTD = x_BTD + self.dropout(self.from_heads(heads_BHTC.transpose(1, 2).flatten(2)))
        added_BTD: Tensor = self.dropout(self.narrow(self.widen(x_BTD)))
        return x_BTD + added_BTD


class PlainGPT2(nn.Module):
    """Tokens and targets to the loss."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.positions = nn.Embedding(shape.context, shape.d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(shape, dropout) for _ in range(shape.n_layers)))
        self.norm = nn.LayerNorm(shape.d_model, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and "from_heads" not in name and "narrow" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.dropout(self.embedding(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]])
        logits_BTV = F.linear(self.norm(self.blocks(x_BTD)), self.embedding.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def plain_adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as small models of characters are trained with it: matrices decay, vectors do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))


def stepper(loss_of: Loss, optimizer: torch.optim.Optimizer, bf16: bool) -> Callable[[Tensor, Tensor], None]:
    """A step as these programs take it: forward, backward, clip at 1, AdamW."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(tokens_BT: Tensor, targets_BT: Tensor) -> None:
        with torch.autocast(tokens_BT.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(tokens_BT, targets_BT)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(shape: Shape, dropout: float, device: torch.device) -> tuple[Loss, nn.Module]:
    """GPT2LMHeadModel of transformers (extra: bench) as it comes, with its fused attention, and its loss.

    The loss is that on targets that are shifted already, as their Trainer's shift would have it.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.context, n_embd=shape.d_model, n_layer=shape.n_layers,
        n_head=shape.n_heads, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    model.to(device)
    return lambda tokens_BT, targets_BT: model(tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss, model
