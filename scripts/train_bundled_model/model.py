"""Qwen3-MoE for training: transformers' mathematics, arranged for speed at a small size.

Computing all E experts costs less here than sorting tokens by expert: those of a layer are one wide
SwiGLU layer, whose hidden units are multiplied by their expert's routing weight, zero for the
experts that a token did not choose. That is two large GEMMs a layer, with static shapes.

Weights of one kind lie in one parameter with the layer as its first dimension (L), so that the
optimizer works on few large tensors. H hidden_size, I moe_intermediate_size, E num_experts,
k num_experts_per_tok, D head_dim, B sequences of S tokens, N = B * S.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes, under the names of transformers' Qwen3MoeConfig."""

    vocab_size: int = 4096
    hidden_size: int = 256
    moe_intermediate_size: int = 160
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    num_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class Output(NamedTuple):
    """What one forward pass gives."""

    logits: Tensor  # [B, S, vocab_size]
    balance: (
        Tensor  # [] load-balancing loss, the mean over layers; 1 when all experts are used alike
    )
    load: Tensor  # [L, E] the share of choices that each expert got; rows sum to 1


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding. x: [B, heads, S, D]; cos, sin: [S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Qwen3Moe(nn.Module):
    """Token ids [B, S] -> Output.

    In training mode `dropout` falls on the embeddings, on the experts' hidden units and on what
    each block adds to the residual stream.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = c = config
        self.dropout = dropout
        layers, hidden = c.num_hidden_layers, c.hidden_size
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        residual_std = 0.02 / math.sqrt(2 * layers)  # 2 L blocks add to the residual stream

        def normal(*shape: int, std: float = 0.02) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * std)

        def ones(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.ones(shape))

        self.embedding = normal(c.vocab_size, hidden)  # also the output projection
        self.attention_norm = ones(layers, hidden)
        self.q = normal(layers, queries, hidden)
        self.k = normal(layers, keys, hidden)
        self.v = normal(layers, keys, hidden)
        self.o = normal(layers, hidden, queries, std=residual_std)
        self.q_norm = ones(layers, c.head_dim)
        self.k_norm = ones(layers, c.head_dim)
        self.experts_norm = ones(layers, hidden)
        self.router = normal(layers, c.num_experts, hidden)
        inner = c.moe_intermediate_size
        self.gate_up = normal(layers, 2, c.num_experts, inner, hidden)  # [L, gate and up, E, I, H]
        self.down = normal(layers, c.num_experts, inner, hidden, std=residual_std)  # transposed
        self.final_norm = ones(hidden)

        half = torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim
        positions = torch.arange(c.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, c.rope_theta**-half).repeat(1, 2)  # [positions, D]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor) -> Output:
        x = self.drop(F.embedding(tokens, self.embedding))
        balances, loads = [], []
        layers = (
            *(self.attention_norm, self.q, self.k, self.v, self.o, self.q_norm, self.k_norm),
            *(self.experts_norm, self.router, self.gate_up, self.down),
        )
        # unbind, not indexing: its backward writes each gradient once.
        for layer in zip(*(parameter.unbind(0) for parameter in layers), strict=True):
            norm, q, k, v, o, q_norm, k_norm, experts_norm, router, gate_up, down = layer
            y = rms_norm(x, norm, self.config.rms_norm_eps)
            x = x + self.drop(self.attention(y, q, k, v, o, q_norm, k_norm))
            y = rms_norm(x, experts_norm, self.config.rms_norm_eps)
            y, balance, load = self.experts(y, router, gate_up, down)
            x = x + self.drop(y)
            balances.append(balance)
            loads.append(load)
        x = rms_norm(x, self.final_norm, self.config.rms_norm_eps)
        logits = F.linear(x, self.embedding)
        return Output(logits, torch.stack(balances).mean(), torch.stack(loads))

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def attention(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, q_norm: Tensor, k_norm: Tensor
    ) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)

        def heads(weight: Tensor, norm: Tensor | None) -> Tensor:
            y = F.linear(x, weight).view(batch, length, -1, c.head_dim)
            if norm is None:
                return y.transpose(1, 2)
            return rotate(rms_norm(y, norm, c.rms_norm_eps).transpose(1, 2), cos, sin)

        query, key, value = heads(q, q_norm), heads(k, k_norm), heads(v, None)
        group = c.num_attention_heads // c.num_key_value_heads
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves norms in float32
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.linear(y.transpose(1, 2).reshape(batch, length, -1), o)

    def experts(
        self, x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's output [B, S, H], its load-balancing loss [], and each expert's load [E]."""
        c = self.config
        flat = x.flatten(0, 1)  # [N, H]
        with torch.autocast(x.device.type, enabled=False):
            probabilities = F.linear(flat.float(), router.float()).softmax(-1)  # [N, E]
        weights, ids = probabilities.topk(c.num_experts_per_tok, dim=-1)  # [N, k]
        weights = weights / weights.sum(-1, keepdim=True)
        routing = torch.zeros_like(probabilities).scatter(1, ids, weights)  # [N, E]
        load = (routing > 0).float().mean(0) / c.num_experts_per_tok
        balance = c.num_experts * (load * probabilities.mean(0)).sum()

        gate, up = F.linear(flat, gate_up.flatten(0, 2)).chunk(2, dim=-1)  # [N, E * I] each
        units = (F.silu(gate) * up).view(-1, c.num_experts, c.moe_intermediate_size)
        units = self.drop(units * routing.unsqueeze(-1).to(units.dtype)).flatten(1)
        return (units @ down.flatten(0, 1)).view_as(x), balance, load
