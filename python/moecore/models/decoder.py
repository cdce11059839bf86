"""The decoder that all families share: pre-norm layers of grouped-query attention and MoE.

A family's config.json decides what is in it; nothing here knows a family's name. Every operator
keeps the row contract, so a token's hidden states have the same bits in any batch, as far as the
attention keeps it too: the CPU's does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecore import _core, ops
from moecore.attention import Attention, NativeAttention
from moecore.batch import Batch, DecodeBatch
from moecore.config import ModelConfig
from moecore.loading import Source, WeightSlot
from moecore.models.layers import MLP, Linear, Parameter, Placement, fill_slot, one_matrix
from moecore.models.moe import MoE
from moecore.models.names import CheckpointNames
from moecore.ops import PackedWeights
from moecore.transport import Transport


class Activations:
    """Tensors of one forward pass over T tokens, reused by every layer."""

    def __init__(self, place: Placement, config: ModelConfig, num_tokens: int) -> None:
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.residual = place.empty(num_tokens, config.hidden_size)
        self.normed = place.empty(num_tokens, config.hidden_size)
        self.delta = place.empty(num_tokens, config.hidden_size)  # what a block adds
        self.qkv = place.empty(num_tokens, (heads + 2 * kv_heads) * dim)
        all_heads = self.qkv.view(num_tokens, heads + 2 * kv_heads, dim)
        self.q, self.k, self.v = torch.split(all_heads, [heads, kv_heads, kv_heads], dim=1)
        self.qk = all_heads[:, : heads + kv_heads]
        attended = place.empty(num_tokens, heads * dim)
        self.attended = attended.view(num_tokens, heads, dim)
        is_moe = config.moe_layers
        experts, inner = config.moe.num_experts, config.intermediate_size
        self.router_logits = place.empty(num_tokens, experts) if any(is_moe) else None
        self.native = _core.Activations(
            residual=self.residual,
            normed=self.normed,
            delta=self.delta,
            qkv=self.qkv,
            attended=attended,
            router_logits=self.router_logits,
            inner=None if all(is_moe) else place.empty(num_tokens, inner),
        )


class SelfAttention:
    """Weights around attention: query, key and value, their norms, and the output projection."""

    def __init__(self, place: Placement, layer: int, config: ModelConfig) -> None:
        prefix = f"model.layers.{layer}.self_attn"
        heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = Linear(
            place,
            config.hidden_size,
            {
                f"{prefix}.q_proj": heads * dim,
                f"{prefix}.k_proj": kv_heads * dim,
                f"{prefix}.v_proj": kv_heads * dim,
            },
            bias=config.qkv_bias,
        )
        self.output = Linear(
            place, heads * dim, {f"{prefix}.o_proj": config.hidden_size}, bias=config.output_bias
        )
        self.q_norm: Parameter | None = None
        self.k_norm: Parameter | None = None
        if config.qk_norm != "none":
            whole = config.qk_norm == "full_width"
            q_width, k_width = (heads * dim, kv_heads * dim) if whole else (dim, dim)
            self.q_norm = Parameter(place, f"{prefix}.q_norm.weight", q_width)
            self.k_norm = Parameter(place, f"{prefix}.k_norm.weight", k_width)

    def slots(self) -> list[WeightSlot]:
        parts = (self.qkv, self.output, self.q_norm, self.k_norm)
        return [slot for part in parts if part is not None for slot in part.slots()]


class DecoderLayer:
    """Attention, then experts (or a dense MLP), each behind a norm and added to the residual."""

    def __init__(
        self,
        place: Placement,
        layer: int,
        config: ModelConfig,
        names: CheckpointNames,
        transport: Transport | None,
    ) -> None:
        prefix = f"model.layers.{layer}"
        hidden = config.hidden_size
        self._index = layer
        self._clip = config.clip_qkv
        self._input_norm = Parameter(place, f"{prefix}.input_layernorm.weight", hidden)
        self._post_norm = Parameter(place, f"{prefix}.post_attention_layernorm.weight", hidden)
        self._attention = SelfAttention(place, layer, config)
        self._mlp: MLP | MoE
        if config.moe_layers[layer]:
            self._mlp = MoE(place, prefix, hidden, config.moe, names, transport)
        else:
            self._mlp = MLP(place, f"{prefix}.mlp", hidden, config.intermediate_size)
        self.native = _core.DecoderLayer(
            hidden_size=hidden,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=0 if config.moe_layers[layer] else config.intermediate_size,
            rms_norm_eps=config.rms_norm_eps,
            qk_norm=config.qk_norm,
            dtype=str(place.dtype).removeprefix("torch."),
            weights=self._weights(),
        )

    def _weights(self) -> dict[str, Tensor | PackedWeights | _core.MoELayer | None]:
        attention, mlp = self._attention, self._mlp
        weights: dict[str, Tensor | PackedWeights | _core.MoELayer | None] = {
            "input_norm": self._input_norm.value,
            "post_norm": self._post_norm.value,
            "qkv": attention.qkv.matrix,
            "qkv_bias": attention.qkv.bias,
            "output": attention.output.matrix,
            "output_bias": attention.output.bias,
            "q_norm": attention.q_norm.value if attention.q_norm else None,
            "k_norm": attention.k_norm.value if attention.k_norm else None,
        }
        if isinstance(mlp, MoE):
            return weights | {"router": mlp.router_matrix, "moe": mlp.layer.native}
        return weights | {"gate_up": mlp.gate_up.matrix, "down": mlp.down.matrix}

    def slots(self) -> list[WeightSlot]:
        parts = (self._input_norm, self._attention, self._post_norm, self._mlp)
        return [slot for part in parts for slot in part.slots()]

    def __call__(self, a: Activations, cos_sin: Tensor, attention: Attention, batch: Batch) -> None:
        """Add a.delta of the layer before to a.residual, and leave this layer's in a.delta."""
        is_first = self._index == 0
        if self._clip is None:
            self.native.before_attention(a.native, batch.positions, cos_sin, is_first)
        else:
            self.native.project_qkv(a.native, is_first)
            a.qkv.clamp_(-self._clip, self._clip)
            ops.rotary_embedding(a.qk, batch.positions, cos_sin)
        attention(self._index, a.q, a.k, a.v, batch, out=a.attended)
        self.native.after_attention(a.native)

    def join(self, a: Activations) -> None:
        """Run this rank's experts for other ranks' tokens; `a` is of none."""
        if isinstance(self._mlp, MoE):
            self.native.after_attention(a.native)


class CausalLM:
    """Embedding, decoder layers, final norm and the head: token ids to logits.

    Args:
        config: of the model.
        names: of its tensors in a checkpoint.
        device: where it runs.
        dtype: of weights and activations, float32 or bfloat16.
        transport: to the other ranks of an expert-parallel group, each of which holds its share of
            the experts and runs its own tokens: every forward pass is then all ranks' together.
    """

    def __init__(
        self,
        config: ModelConfig,
        names: CheckpointNames,
        *,
        device: torch.device,
        dtype: torch.dtype,
        transport: Transport | None = None,
    ) -> None:
        place = Placement(device, dtype)
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
            DecoderLayer(place, i, config, names, transport) for i in range(config.num_layers)
        ]
        self._norm = Parameter(place, "model.norm.weight", config.hidden_size)
        self._activations: dict[int, Activations] = {}
        self._decoder: tuple[NativeAttention, _core.Decoder] | None = None

    def slots(self) -> list[WeightSlot]:
        """Every tensor of the checkpoint that this rank needs, and where it goes."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        embedding = ((Source("model.embed_tokens.weight", shape),),)
        head = ((Source("lm_head.weight", shape),),)
        if self.config.tie_word_embeddings:
            # Some writers store the tied head too, some only that.
            slots = [fill_slot(embedding + head, self._head, 0)]
        else:
            assert isinstance(self._embedding, Tensor)
            slots = [WeightSlot(embedding, self._embedding.copy_), fill_slot(head, self._head, 0)]
        for layer in self._layers:
            slots += layer.slots()
        return slots + self._norm.slots()

    def ignored(self) -> tuple[str, ...]:
        """Patterns of tensors that a checkpoint may hold and the model does not need."""
        tied = (r"lm_head\.weight",) if self.config.tie_word_embeddings else ()
        return self._names.ignored + tied

    def activations(self, num_tokens: int) -> Activations:
        """New buffers for passes of T tokens."""
        return Activations(self._place, self.config, num_tokens)

    def forward(
        self,
        batch: Batch,
        attention: Attention,
        cos_sin: Tensor,
        *,
        activations: Activations | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run the batch's T tokens; return its logits [N, vocab_size] float32.

        Args:
            batch: on the model's device.
            attention: holds the keys and values.
            cos_sin: [P, rotary_dim] float32, for every position of the batch.
            activations: of T tokens (default: buffers that the model keeps).
            out: [N, vocab_size] float32 (default: new).
        """
        a = activations or self._activations_of(batch.num_tokens)
        if out is None:
            shape = (batch.logit_rows.shape[0], self.config.vocab_size)
            out = torch.empty(shape, dtype=torch.float32, device=self._place.device)
        if isinstance(attention, NativeAttention) and self.config.clip_qkv is None:
            self._forward_natively(a, batch, attention, cos_sin, out)
            return out
        ops.embedding(batch.token_ids, self._embedding, out=a.residual)
        for layer in self._layers:
            layer(a, cos_sin, attention, batch)
        rows = batch.logit_rows
        normed = ops.rms_norm(
            a.delta[rows], self._norm.value, self.config.rms_norm_eps, residual=a.residual[rows]
        )
        return ops.linear(normed, self._head_matrix, out=out, out_dtype=torch.float32)

    def _forward_natively(
        self,
        a: Activations,
        batch: Batch,
        attention: NativeAttention,
        cos_sin: Tensor,
        logits: Tensor,
    ) -> None:
        """The same in one call of the core, which knows this attention."""
        if self._decoder is None or self._decoder[0] is not attention:
            native = _core.Decoder(
                layers=[layer.native for layer in self._layers],
                key_caches=attention.keys,
                value_caches=attention.values,
                weights={
                    "embedding": self._embedding,
                    "final_norm": self._norm.value,
                    "head": self._head_matrix,
                },
            )
            self._decoder = (attention, native)
        if isinstance(batch, DecodeBatch):
            self._decoder[1].forward_decodes(
                a.native, batch.numbers, batch.num_sequences, cos_sin, logits
            )
            return
        self._decoder[1].forward(
            a.native,
            batch.token_ids,
            batch.positions,
            cos_sin,
            batch.query_offsets,
            batch.context_lens,
            batch.block_tables,
            batch.logit_rows,
            logits,
        )

    def join(self) -> None:
        """Take part in a pass of the group with no tokens of this rank's own."""
        a = self._activations_of(0)
        for layer in self._layers:
            layer.join(a)

    def _activations_of(self, num_tokens: int) -> Activations:
        """Buffers for T tokens; those of the last few T are kept, so that decode allocates none."""
        found = self._activations.pop(num_tokens, None)
        if found is None:
            found = self.activations(num_tokens)
            if len(self._activations) >= 4:
                del self._activations[next(iter(self._activations))]
        self._activations[num_tokens] = found
        return found
