"""The decoder that all families share: pre-norm layers of grouped-query attention and MoE.

A family's config.json decides what is in it; nothing here knows a family's name. Every operator
keeps the row contract, so a token's hidden states have the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moecore import ops
from moecore.attention import Attention
from moecore.batch import Batch
from moecore.config import ModelConfig
from moecore.loading import Source, WeightSlot
from moecore.models.layers import MLP, Linear, Parameter, Placement, fill, one_matrix
from moecore.models.moe import MoE
from moecore.models.names import CheckpointNames
from moecore.ops import PackedWeights


class Activations:
    """Tensors of one forward pass over T tokens, reused by every layer."""

    def __init__(self, place: Placement, config: ModelConfig, num_tokens: int) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.residual = place.empty(num_tokens, config.hidden_size)
        self.normed = place.empty(num_tokens, config.hidden_size)
        self.delta = place.empty(num_tokens, config.hidden_size)  # what a block adds
        self.router_logits = place.empty(num_tokens, config.moe.num_experts)
        self.qkv = place.empty(num_tokens, (heads + 2 * kv_heads) * dim)
        widths = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.q, self.k, self.v = torch.split(self.qkv, widths, dim=1)  # [T, heads * dim]
        qk = self.qkv[:, : (heads + kv_heads) * dim]
        self.qk_heads = qk.view(num_tokens, heads + kv_heads, dim)
        self.q_heads = self.q.view(num_tokens, heads, dim)
        self.k_heads = self.k.view(num_tokens, kv_heads, dim)
        self.v_heads = self.v.view(num_tokens, kv_heads, dim)
        self.attended = place.empty(num_tokens, heads * dim)
        self.attended_heads = self.attended.view(num_tokens, heads, dim)


class SelfAttention:
    """Query, key and value, their norms and rotation, attention, and the output projection."""

    def __init__(self, place: Placement, layer: int, config: ModelConfig) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self._layer = layer
        self._eps = config.rms_norm_eps
        self._clip = config.clip_qkv
        self._qk_norm = config.qk_norm
        self._qkv = Linear(
            place,
            config.hidden_size,
            {
                f"{prefix}.q_proj": heads * dim,
                f"{prefix}.k_proj": kv_heads * dim,
                f"{prefix}.v_proj": kv_heads * dim,
            },
            bias=config.qkv_bias,
        )
        self._o = Linear(
            place, heads * dim, {f"{prefix}.o_proj": config.hidden_size}, bias=config.output_bias
        )
        self._norms: tuple[Parameter, ...] = ()
        if config.qk_norm != "none":
            whole = config.qk_norm == "full_width"
            self._norms = (
                Parameter(place, f"{prefix}.q_norm.weight", heads * dim if whole else dim),
                Parameter(place, f"{prefix}.k_norm.weight", kv_heads * dim if whole else dim),
            )

    def slots(self) -> list[WeightSlot]:
        norms = [slot for norm in self._norms for slot in norm.slots()]
        return [*self._qkv.slots(), *self._o.slots(), *norms]

    def __call__(self, a: Activations, cos_sin: Tensor, attention: Attention, batch: Batch) -> None:
        """a.normed -> a.delta."""
        self._qkv(a.normed, out=a.qkv)
        if self._norms:
            per_head = self._qk_norm == "per_head"
            q, k = (a.q_heads, a.k_heads) if per_head else (a.q, a.k)
            q_norm, k_norm = self._norms
            ops.rms_norm(q, q_norm.value, self._eps, out=q)
            ops.rms_norm(k, k_norm.value, self._eps, out=k)
        if self._clip is not None:
            a.qkv.clamp_(-self._clip, self._clip)
        ops.rotary_embedding(a.qk_heads, batch.positions, cos_sin)
        attention(self._layer, a.q_heads, a.k_heads, a.v_heads, batch, out=a.attended_heads)
        self._o(a.attended, out=a.delta)


class DecoderLayer:
    """Attention, then experts (or a dense MLP), each behind a norm and added to the residual."""

    def __init__(
        self,
        place: Placement,
        layer: int,
        config: ModelConfig,
        names: CheckpointNames,
        local_experts: range,
    ) -> None:
        prefix = f"model.layers.{layer}"
        hidden = config.hidden_size
        self._eps = config.rms_norm_eps
        self._input_norm = Parameter(place, f"{prefix}.input_layernorm.weight", hidden)
        self._post_norm = Parameter(place, f"{prefix}.post_attention_layernorm.weight", hidden)
        self._attention = SelfAttention(place, layer, config)
        self._mlp: MLP | MoE
        if config.moe_layers[layer]:
            self._mlp = MoE(place, prefix, hidden, config.moe, names, local_experts)
        else:
            self._mlp = MLP(place, f"{prefix}.mlp", hidden, config.intermediate_size)

    def slots(self) -> list[WeightSlot]:
        parts = (self._input_norm, self._attention, self._post_norm, self._mlp)
        return [slot for part in parts for slot in part.slots()]

    def __call__(
        self,
        a: Activations,
        cos_sin: Tensor,
        attention: Attention,
        batch: Batch,
        *,
        is_first: bool,
    ) -> None:
        """Add a.delta of the layer before to a.residual, and leave this layer's in a.delta."""
        residual = None if is_first else a.residual
        x = a.residual if is_first else a.delta
        ops.rms_norm(x, self._input_norm.value, self._eps, residual=residual, out=a.normed)
        self._attention(a, cos_sin, attention, batch)
        ops.rms_norm(a.delta, self._post_norm.value, self._eps, residual=a.residual, out=a.normed)
        if isinstance(self._mlp, MoE):
            self._mlp(a.normed, router_logits=a.router_logits, out=a.delta)
        else:
            self._mlp(a.normed, out=a.delta)


class CausalLM:
    """Embedding, decoder layers, final norm and the head: token ids to logits.

    Args:
        config: of the model.
        names: of its tensors in a checkpoint.
        device: where it runs.
        dtype: of weights and activations, float32 or bfloat16.
        local_experts: this rank's experts (default: all).
    """

    def __init__(
        self,
        config: ModelConfig,
        names: CheckpointNames,
        *,
        device: torch.device,
        dtype: torch.dtype,
        local_experts: range | None = None,
    ) -> None:
        place = Placement(device, dtype)
        experts = range(config.moe.num_experts) if local_experts is None else local_experts
        self.config = config
        self._names = names
        self._place = place
        # A tied embedding is read from the head's rows: one copy serves both.
        self._head = place.matrices(1, config.vocab_size, config.hidden_size, gated=False)
        self._head_matrix = one_matrix(self._head)
        self._embedding: Tensor | PackedWeights = self._head_matrix
        if not config.tie_word_embeddings:
            self._embedding = place.empty(config.vocab_size, config.hidden_size)
        self._layers = [
            DecoderLayer(place, i, config, names, experts) for i in range(config.num_layers)
        ]
        self._norm = Parameter(place, "model.norm.weight", config.hidden_size)
        self._activations: dict[int, Activations] = {}

    def slots(self) -> list[WeightSlot]:
        """Every tensor of the checkpoint that this rank needs, and where it goes."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        embedding = ((Source("model.embed_tokens.weight", shape),),)
        head = ((Source("lm_head.weight", shape),),)
        load_head: Callable[..., None] = lambda weight: fill(self._head, 0, (weight,))  # noqa: E731
        if self.config.tie_word_embeddings:
            # Some writers store the tied head too, some only that.
            slots = [WeightSlot(embedding + head, load_head)]
        else:
            assert isinstance(self._embedding, Tensor)
            slots = [WeightSlot(embedding, self._embedding.copy_), WeightSlot(head, load_head)]
        for layer in self._layers:
            slots += layer.slots()
        return slots + self._norm.slots()

    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold and the model does not need."""
        tied = (r"lm_head\.weight",) if self.config.tie_word_embeddings else ()
        return self._names.ignored + tied

    def forward(self, batch: Batch, attention: Attention, cos_sin: Tensor) -> Tensor:
        """Run the batch's T tokens; return its logits [N, vocab_size] float32.

        cos_sin [P, rotary_dim] float32 covers every position of the batch.
        """
        a = self._activations_of(batch.token_ids.shape[0])
        ops.embedding(batch.token_ids, self._embedding, out=a.residual)
        for index, layer in enumerate(self._layers):
            layer(a, cos_sin, attention, batch, is_first=index == 0)
        eps = self.config.rms_norm_eps
        ops.rms_norm(a.delta, self._norm.value, eps, residual=a.residual, out=a.normed)
        rows = a.normed[batch.logit_rows]
        return ops.linear(rows, self._head_matrix, out_dtype=torch.float32)

    def _activations_of(self, num_tokens: int) -> Activations:
        """Buffers for T tokens; those of the last few T are kept, so that decode allocates none."""
        found = self._activations.pop(num_tokens, None)
        if found is None:
            found = Activations(self._place, self.config, num_tokens)
            if len(self._activations) >= 4:
                del self._activations[next(iter(self._activations))]
        self._activations[num_tokens] = found
        return found
