"""Functional operators on torch tensors: each one call into the core, which checks every argument.

T tokens, H hidden_size, I intermediate_size, E experts, k = top_k, R rows (token-expert pairs that
were kept), X input rows, N output features, K reduction, G groups. All tensors of a call are on one
device. A row's bits never depend on the other rows of the call, on T, or on the thread count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moecore import _core
from moecore._core import GroupedGemmConfig, PackedWeights, RoutingConfig
from moecore.decoder_ops import (
    KV_BLOCK_SIZE,
    embedding,
    paged_attention,
    rms_norm,
    rotary_embedding,
    write_kv_cache,
)

__all__ = [
    "KV_BLOCK_SIZE",
    "GroupedGemmConfig",
    "PackedWeights",
    "Routing",
    "RoutingConfig",
    "SortedSlots",
    "combine",
    "embedding",
    "grouped_gemm",
    "linear",
    "paged_attention",
    "prepare_weights",
    "rms_norm",
    "rotary_embedding",
    "sort_by_expert",
    "topk_routing",
    "write_kv_cache",
]

_NO_ACTIVATION = GroupedGemmConfig()


class Routing(NamedTuple):
    """The experts of each token."""

    topk_ids: Tensor  # [T, k] int32, best expert first
    topk_weights: Tensor  # [T, k] float32


class SortedSlots(NamedTuple):
    """Slots (slot = token * k + choice) in the order of their experts."""

    sorted_slots: Tensor  # [T * k] int32: row -> slot, -1 past the last row
    slot_to_row: Tensor  # [T * k] int32: slot -> row, -1 for a dropped slot
    expert_offsets: Tensor  # [E_local + 1] int64, exclusive prefix sum


def topk_routing(
    router_logits: Tensor,
    top_k: int,
    *,
    score_function: str = "softmax",
    selection_bias: Tensor | None = None,
    renormalize: bool = True,
    scale: float = 1.0,
    norm_epsilon: float = 0.0,
    norm_min: float = 0.0,
    group_limit: str = "none",
    num_groups: int = 1,
    topk_group: int = 1,
) -> Routing:
    """Choose `top_k` experts for every token, and their weights.

    Computes, for each row x of `router_logits`::

        s       = score(x)                            # float32
        c       = s + selection_bias
        c       = c with all but the topk_group best of num_groups groups dropped
        ids     = the top_k largest entries of c, largest first
        w       = s[ids]                              # never c
        w       = w / max(sum(w) + norm_epsilon, norm_min)      # only if renormalize
        weights = w * scale

    Equal choices go to the lower expert id (and the lower group); a NaN logit or bias counts as
    -inf. Ids and weights have the same bits on every device. A row with no logit above -inf, and
    under softmax or raw_logits one with +inf, gives NaN weights.

    Args:
        router_logits: [T, E] float32 or bfloat16, rows contiguous; T >= 0, 1 <= E <= 1024.
        top_k: experts per token, 1 <= top_k <= min(E, 32).
        score_function: "softmax" over all E (Mixtral, Qwen3-MoE), "sigmoid" (DeepSeek-V3),
            "sqrtsoftplus" (DeepSeek-V4), or "raw_logits": choose on the logits, then softmax over
            the chosen (gpt-oss; `renormalize` is then without effect).
        selection_bias: [E] float32, added for the choice only (`e_score_correction_bias`).
        renormalize: make each row of weights sum to 1 (before `scale`).
        scale: `routed_scaling_factor`.
        norm_epsilon: added to the sum, >= 0 (1e-20 in DeepSeek-V3).
        norm_min: smallest divisor, >= 0 (`moe_norm_min` in ERNIE-4.5).
        group_limit: "none", "max" (DeepSeek-V2: a group is as good as its best expert) or
            "top2_sum" (DeepSeek-V3: as the sum of its two best).
        num_groups: equal groups of neighbouring experts; divides E. With a group limit only.
        topk_group: groups kept; they must hold at least top_k experts.

    Returns:
        Routing(topk_ids, topk_weights), on the device of `router_logits`.

    Raises:
        ValueError: a shape, dtype, stride or range above does not hold; the message names it.
        TypeError: `router_logits` is no tensor.

    Without a bias or "top2_sum" the choice is made on the logits, which order experts as their
    scores do, without the ties of scores that round alike; with raw_logits c = x + selection_bias.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, 1.0]])
        >>> moecore.ops.topk_routing(logits, top_k=2).topk_ids
        tensor([[1, 2]], dtype=torch.int32)

    Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2, for the bias and groups.
    """
    config = RoutingConfig(
        top_k=top_k,
        score_function=score_function,
        renormalize=renormalize,
        scale=scale,
        norm_epsilon=norm_epsilon,
        norm_min=norm_min,
        group_limit=group_limit,
        num_groups=num_groups,
        topk_group=topk_group,
    )
    num_tokens = _rows_of(router_logits)
    device = getattr(router_logits, "device", None)
    topk_ids = torch.empty((num_tokens, max(top_k, 0)), dtype=torch.int32, device=device)
    topk_weights = torch.empty((num_tokens, max(top_k, 0)), dtype=torch.float32, device=device)
    _core.topk_routing(router_logits, selection_bias, config, topk_ids, topk_weights)
    return Routing(topk_ids, topk_weights)


def sort_by_expert(
    topk_ids: Tensor, num_local_experts: int, *, first_expert: int = 0
) -> SortedSlots:
    """Sort slots by expert, and within an expert by slot.

    Ids outside [first_expert, first_expert + num_local_experts) are dropped, negative ones too:
    that is how a rank takes its own experts from a global routing. The order is always the same.

    Args:
        topk_ids: [T, k] int32, contiguous; T may be 0.
        num_local_experts: E_local in [1, 1024].
        first_expert: global id of this rank's first expert, >= 0.

    Returns:
        SortedSlots(sorted_slots, slot_to_row, expert_offsets), on the device of `topk_ids`.

    Raises:
        ValueError: a shape, dtype, stride or range above does not hold; the message names it.
        TypeError: `topk_ids` is no tensor.

    Example:
        >>> ids = torch.tensor([[1, 0], [1, 2]], dtype=torch.int32)
        >>> moecore.ops.sort_by_expert(ids, num_local_experts=2).expert_offsets
        tensor([0, 1, 3])
    """
    num_slots = topk_ids.numel() if isinstance(topk_ids, Tensor) else 0
    device = getattr(topk_ids, "device", None)
    result = SortedSlots(
        torch.empty(num_slots, dtype=torch.int32, device=device),
        torch.empty(num_slots, dtype=torch.int32, device=device),
        torch.empty(max(num_local_experts, 0) + 1, dtype=torch.int64, device=device),
    )
    _core.sort_by_expert(topk_ids, first_expert, *result)
    return result


def prepare_weights(
    weights: Tensor, *, gated: bool = False, interleaved: bool = False
) -> PackedWeights:
    """Pack expert weights once, for the kernels of the CPU.

    The packed form takes the bytes of the original (rounded up to panels of 64 features), in huge
    pages where the system grants them, and gives the same bits in every product. The original may
    be freed afterwards; a loader that never holds it whole can fill a PackedWeights expert by
    expert with `pack` and `pack_gated`, or out of files with `pack_files`.

    Args:
        weights: [G, N, K] float32 or bfloat16 on the CPU; N or K contiguous.
        gated: N = 2 I rows are gate and up of I features, for a gated activation.
        interleaved: with `gated`, row 2 f is gate f and row 2 f + 1 is up f (gpt-oss); otherwise
            rows 0 .. I - 1 are gate and the rest up.

    Returns:
        PackedWeights, for `grouped_gemm`, `linear` (G = 1) and MoELayer.

    Raises:
        ValueError: a shape, dtype or stride above does not hold; the message names it.
        moecore.UnsupportedError: `weights` is on a device without packed kernels (CUDA).
    """
    if not isinstance(weights, Tensor):
        raise TypeError(f"prepare_weights: weights must be a tensor, got {type(weights).__name__}")
    if weights.device.type != "cpu":
        raise _core.UnsupportedError(
            f"prepare_weights: weights must be on the CPU, got {weights.device}; "
            "on CUDA pass plain weights"
        )
    if weights.dim() != 3:
        raise ValueError(
            f"prepare_weights: weights must have 3 dimensions, got shape {list(weights.shape)}"
        )
    num_groups, n, k_dim = weights.shape
    packed = PackedWeights(str(weights.dtype).removeprefix("torch."), num_groups, n, k_dim, gated)
    for group, matrix in enumerate(weights.detach()):
        if not gated:
            packed.pack(group, matrix)
        elif interleaved:
            packed.pack_gated(group, matrix[0::2], matrix[1::2])
        else:
            packed.pack_gated(group, matrix[: n // 2], matrix[n // 2 :])
    return packed


def grouped_gemm(
    input: Tensor,
    weights: Tensor | PackedWeights,
    expert_offsets: Tensor,
    *,
    sorted_slots: Tensor | None = None,
    slots_per_token: int = 1,
    bias: Tensor | None = None,
    config: GroupedGemmConfig = _NO_ACTIVATION,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each group of rows by its expert's weights.

    Computes, for the rows r of group g, expert_offsets[g] <= r < expert_offsets[g + 1]::

        x      = input[r]                                    # or, with sorted_slots,
        x      = input[sorted_slots[r] // slots_per_token]   # the gather happens inside
        out[r] = activation(x @ weights[g].T + bias[g])

    Sums run in float32 along K in one fixed order and round once. Rows outside every group are not
    written.

    Args:
        input: [X, K] float32 or bfloat16, rows contiguous.
        weights: [G, N, K] of input's dtype, N or K contiguous, or `prepare_weights` of that.
        expert_offsets: [G + 1] int64, non-decreasing from 0 or above; as `sort_by_expert` gives.
        sorted_slots: [>= R] int32; entries in [0, X * slots_per_token) for every row in a group.
        slots_per_token: k, if sorted_slots is given.
        bias: [G, N] of float32 or input's dtype.
        config: the activation: none, "swiglu", "clamped_swiglu" (gpt-oss) or "gelu_tanh"; the
            gated ones halve N. `interleaved` there says how plain weights and the bias are ordered.
        out: [>= R, N or N / 2] float32 or bfloat16, rows contiguous; overlaps no input.
        out_dtype: of a new `out` (default: input's). A new out has a row for each entry of
            sorted_slots, or of input; its rows outside every group are uninitialised.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold, or on the CPU an
            offset or slot points outside its tensor; the message names it. On CUDA, which never
            waits for the host to look, the rows of such an offset or slot are unspecified.
        TypeError: an argument is no tensor.
    """
    if out is None:
        rows = _rows_of(input if sorted_slots is None else sorted_slots)
        out = _new_output(input, weights, rows, config, out_dtype)
    _core.grouped_gemm(
        input, weights, bias, expert_offsets, sorted_slots, slots_per_token, config, out
    )
    return out


def linear(
    input: Tensor,
    weight: Tensor | PackedWeights,
    bias: Tensor | None = None,
    *,
    config: GroupedGemmConfig = _NO_ACTIVATION,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute activation(input @ weight.T + bias), a row's bits independent of the batch.

    Args:
        input: [T, K] float32 or bfloat16, rows contiguous.
        weight: [N, K] of input's dtype, or PackedWeights of one group.
        bias: [N] of float32 or input's dtype.
        config: as in `grouped_gemm`.
        out: [T, N] (N / 2 if gated) float32 or bfloat16; overlaps no input.
        out_dtype: of a new `out` (default: input's).

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride or device above does not hold; the message names it.
        TypeError: an argument is no tensor.
    """
    if out is None:
        out = _new_output(input, weight, _rows_of(input), config, out_dtype)
    _core.linear(input, weight, bias, config, out)
    return out


def combine(
    expert_rows: Tensor,
    slot_to_row: Tensor,
    topk_weights: Tensor,
    *,
    shared_output: Tensor | None = None,
    shared_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Add each token's expert rows, in the order of its choices, and its shared expert.

    Computes in float32, rounding once at the end::

        out[t] = sum over j = 0 .. k - 1 of topk_weights[t, j] * expert_rows[slot_to_row[t * k + j]]
                 + shared_scale[t] * shared_output[t]

    Args:
        expert_rows: [>= R, H] float32 or bfloat16, rows contiguous.
        slot_to_row: [T * k] int32; -1 adds nothing. A row outside expert_rows is an error on the
            CPU and adds nothing on CUDA, which never waits for the host to look.
        topk_weights: [T, k] float32.
        shared_output: [T, H] of expert_rows' dtype.
        shared_scale: [T] float32; 1 if not given.
        out: [T, H] float32 or bfloat16 (default: new, of expert_rows' dtype); may be
            shared_output, overlaps nothing else.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, dtype, stride, range or device above does not hold; the message names
            it.
        TypeError: an argument is no tensor.
    """
    if out is None:
        shape = (_rows_of(topk_weights), _columns_of(expert_rows))
        out = torch.empty(
            shape,
            dtype=_dtype_of(expert_rows),
            device=getattr(expert_rows, "device", None),
        )
    _core.combine(expert_rows, slot_to_row, topk_weights, shared_output, shared_scale, out)
    return out


# Outputs are shaped before the core has checked the inputs, so these accept anything: what does not
# fit is then reported by the core, in the same words as to a C++ caller.


def _shape_of(tensor: object) -> tuple[int, ...]:
    return tuple(getattr(tensor, "shape", ()))  # NumPy arrays have one, too


def _rows_of(tensor: object) -> int:
    return next(iter(_shape_of(tensor)), 0)


def _dtype_of(tensor: Tensor) -> torch.dtype | None:
    dtype = getattr(tensor, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)


def _columns_of(tensor: object) -> int:
    return next(reversed(_shape_of(tensor)), 0)


def _new_output(
    input: Tensor,
    weights: Tensor | PackedWeights,
    rows: int,
    config: GroupedGemmConfig,
    dtype: torch.dtype | None,
) -> Tensor:
    shape = _shape_of(weights)
    n = shape[-2] if len(shape) >= 2 else 0
    return torch.empty(
        (rows, n // 2 if config.gated else n),
        dtype=dtype or _dtype_of(input),
        device=getattr(input, "device", None),
    )
