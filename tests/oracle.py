"""Reference mathematics in float64 torch: no moecore import, no performance, no shortcuts."""

from __future__ import annotations

import math

import torch

NEG_INF = -math.inf
EPS32 = 2.0**-23


def bits(x):
    """The bits of x as integers, to compare NaN, -0 and all."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def score(logits, score_function):
    """Scores of float64 logits, of which none is NaN; for raw_logits the logits themselves."""
    if score_function == "softmax":
        return torch.softmax(logits, dim=1)
    if score_function == "sigmoid":
        return torch.sigmoid(logits)
    if score_function == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits, threshold=40).sqrt()
    return logits


def choices(
    router_logits,
    *,
    score_function="softmax",
    selection_bias=None,
    group_limit="none",
    num_groups=1,
    topk_group=1,
):
    """[T, E] values that experts are chosen on: (within kept groups, group scores or None)."""
    logits = router_logits.double().nan_to_num(nan=NEG_INF, posinf=math.inf, neginf=NEG_INF)
    # Every score is increasing in its logit, so only a sum needs the score itself.
    needs_score = selection_bias is not None or group_limit == "top2_sum"
    choice = score(logits, score_function) if needs_score else logits
    if selection_bias is not None:
        choice = choice + selection_bias.double()
    choice = choice.nan_to_num(nan=NEG_INF, posinf=math.inf, neginf=NEG_INF)
    if group_limit == "none":
        return choice, None
    grouped = choice.unflatten(1, (num_groups, -1))
    best = grouped.sort(dim=2, descending=True).values
    count = min(2, best.shape[2]) if group_limit == "top2_sum" else 1
    return choice, best[:, :, :count].sum(dim=2).nan_to_num(
        nan=NEG_INF, posinf=math.inf, neginf=NEG_INF
    )


def largest_first(values, count):
    """Indices of the `count` largest of each row; a stable sort keeps the lower among equals."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]


def topk_routing(
    router_logits,
    top_k,
    *,
    score_function="softmax",
    selection_bias=None,
    renormalize=True,
    scale=1.0,
    norm_epsilon=0.0,
    norm_min=0.0,
    group_limit="none",
    num_groups=1,
    topk_group=1,
):
    """[T, E] logits -> (ids [T, k] int64, weights [T, k] float64, gap [T]).

    The gap is the least difference that decided the row: between neighbours among the k + 1 best
    choices, and between the last kept group and the best dropped one.
    """
    choice, group_score = choices(
        router_logits,
        score_function=score_function,
        selection_bias=selection_bias,
        group_limit=group_limit,
        num_groups=num_groups,
        topk_group=topk_group,
    )
    num_tokens, num_experts = choice.shape
    gap = torch.full((num_tokens,), math.inf, dtype=torch.float64)
    eligible = torch.ones_like(choice, dtype=torch.bool)
    if group_score is not None and topk_group < num_groups:
        kept = largest_first(group_score, topk_group)
        is_kept = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, kept, True)
        eligible = is_kept.repeat_interleave(num_experts // num_groups, dim=1)
        ranked = group_score.sort(dim=1, descending=True).values
        gap = torch.minimum(gap, ranked[:, topk_group - 1] - ranked[:, topk_group])
    # Dropped experts come after those of choice -inf: two stable sorts.
    order = largest_first(choice, num_experts)
    dropped_last = (~eligible).gather(1, order).long().sort(dim=1, stable=True).indices
    order = order.gather(1, dropped_last)
    ids = order[:, :top_k]
    ranked = choice.masked_fill(~eligible, NEG_INF).gather(1, order)[:, : top_k + 1]
    if ranked.shape[1] > 1:
        gap = torch.minimum(gap, (ranked[:, :-1] - ranked[:, 1:]).min(dim=1).values)

    weights = routing_weights(
        router_logits, ids, score_function, renormalize, scale, norm_epsilon, norm_min
    )
    return ids, weights, gap


def routing_weights(
    router_logits,
    ids,
    score_function="softmax",
    renormalize=True,
    scale=1.0,
    norm_epsilon=0.0,
    norm_min=0.0,
):
    """Weights [T, k] float64 of given ids."""
    logits = router_logits.double().nan_to_num(nan=NEG_INF, posinf=math.inf, neginf=NEG_INF)
    ids = ids.long()
    if score_function == "raw_logits":
        weights = torch.softmax(logits.gather(1, ids), dim=1)
    elif score_function == "softmax" and renormalize and norm_epsilon == 0 and norm_min == 0:
        # The sum over all experts cancels, which keeps quotients of tiny scores defined.
        chosen = (logits.gather(1, ids) - logits.max(dim=1, keepdim=True).values).exp()
        weights = chosen / chosen.sum(dim=1, keepdim=True)
    else:
        weights = score(logits, score_function).gather(1, ids)
        if renormalize:
            divisor = weights.sum(dim=1, keepdim=True) + norm_epsilon
            weights = weights / divisor.clamp(min=norm_min)
    weights = weights * scale
    row_max = logits.max(dim=1, keepdim=True).values
    is_exponential = score_function in ("softmax", "raw_logits")
    undefined = (row_max == NEG_INF) | ((row_max == math.inf) & is_exponential)
    return weights.masked_fill(undefined, math.nan)


def sort_by_expert(topk_ids, num_local_experts, first_expert=0):
    """[T, k] ids -> (sorted_slots, slot_to_row, expert_offsets), int64."""
    local = topk_ids.flatten().long() - first_expert
    slots_of = [(local == expert).nonzero().flatten() for expert in range(num_local_experts)]
    order = torch.cat(slots_of)
    sorted_slots = torch.full_like(local, -1)
    sorted_slots[: len(order)] = order
    slot_to_row = torch.full_like(local, -1)
    slot_to_row[order] = torch.arange(len(order))
    counts = torch.tensor([0] + [len(slots) for slots in slots_of])
    return sorted_slots, slot_to_row, counts.cumsum(0)


def activate(x, activation, interleaved=False, alpha=1.702, limit=7.0, up_offset=1.0):
    """[..., N] -> [..., N], or [..., N / 2] for a gated activation."""
    if activation == "none":
        return x
    gate, up = pair_of(x, interleaved)
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + up_offset)
    assert activation == "gelu_tanh"
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return 0.5 * gate * (1 + torch.tanh(inner)) * up


def gathered(input, num_rows, sorted_slots=None, slots_per_token=1):
    if sorted_slots is None:
        return input[:num_rows].double()
    return input.double()[sorted_slots[:num_rows].long() // slots_per_token]


def grouped_sums(
    input, weights, expert_offsets, *, sorted_slots=None, slots_per_token=1, bias=None
):
    """Sums before the activation, and the sums of the terms' magnitudes: both [R, N] float64.

    Rows before the first group are zero.
    """
    offsets = expert_offsets.tolist()
    x = gathered(input, offsets[-1], sorted_slots, slots_per_token)
    sums = torch.zeros(offsets[-1], weights.shape[1], dtype=torch.float64)
    magnitudes = torch.zeros_like(sums)
    for group, matrix in enumerate(weights.double()):
        rows = slice(offsets[group], offsets[group + 1])
        sums[rows] = x[rows] @ matrix.T
        magnitudes[rows] = x[rows].abs() @ matrix.abs().T
        if bias is not None:
            sums[rows] += bias[group].double()
            magnitudes[rows] += bias[group].double().abs()
    return sums, magnitudes


def grouped_gemm(
    input,
    weights,
    expert_offsets,
    *,
    sorted_slots=None,
    slots_per_token=1,
    bias=None,
    **activation,
):
    """[R, N] (or [R, N / 2]) float64, and a bound of the error of float32 sums of K + 1 terms."""
    sums, magnitudes = grouped_sums(
        input,
        weights,
        expert_offsets,
        sorted_slots=sorted_slots,
        slots_per_token=slots_per_token,
        bias=bias,
    )
    activation = activation or {"activation": "none"}
    error = (weights.shape[2] + 1) * EPS32 * magnitudes
    return activate(sums, **activation), activation_error(sums, error, **activation)


def combine(expert_rows, slot_to_row, topk_weights, shared_output=None, shared_scale=None):
    """[T, H] float64."""
    num_tokens, top_k = topk_weights.shape
    rows = slot_to_row.long().reshape(num_tokens, top_k)
    out = torch.zeros(num_tokens, expert_rows.shape[1], dtype=torch.float64)
    for token in range(num_tokens):
        for choice in range(top_k):
            if rows[token, choice] >= 0:
                row = expert_rows[rows[token, choice]].double()
                out[token] += topk_weights[token, choice].double() * row
    if shared_output is not None:
        scale = 1.0 if shared_scale is None else shared_scale.double()[:, None]
        out += scale * shared_output.double()
    return out


def activation_error(sums, error, activation, interleaved=False, **parameters):
    """Bound of the float32 error of `activate` whose inputs are off by up to `error`.

    f, the part of the gate alone (x sigmoid(x), gelu), has |f'| <= 1.13 and |f(x)| <= |x|. Its own
    rounding is 8 operations, and those in the argument of exp, which count |argument| times.
    """
    if activation == "none":
        return error
    gate, up = pair_of(sums, interleaved)
    gate_error, up_error = pair_of(error, interleaved)
    offset = parameters.get("up_offset", 1.0) if activation == "clamped_swiglu" else 0.0
    unit = torch.cat([gate, torch.full_like(up, 1.0 - offset)], dim=-1)
    f = activate(unit, activation, **parameters).abs()
    if activation == "clamped_swiglu":
        up = up.clamp(-parameters.get("limit", 7.0), parameters.get("limit", 7.0))
    factor = up.abs() + abs(offset)
    rounding = EPS32 * (8 + 4 * gate.abs() + gate.abs() ** 3) * f * factor
    return 1.13 * gate_error * (factor + up_error) + f * up_error + rounding


def pair_of(x, interleaved):
    """Gate and up of [..., N]."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def rounded(value, error, dtype):
    """Error bound after rounding to `dtype` a value that was off by up to `error`."""
    return error + torch.finfo(dtype).eps / 2 * (value.abs() + error)


def moe_layer(
    hidden_states,
    topk_ids,
    topk_weights,
    gate_up,
    down,
    *,
    activation,
    first_expert=0,
    gate_up_bias=None,
    down_bias=None,
    shared_gate_up=None,
    shared_down=None,
    shared_gate=None,
):
    """[T, H] float64: every token through its experts, with nothing rounded in between.

    `activation` is a dict of the arguments of `activate`. The second result bounds the error of a
    layer that sums in float32 and rounds the inner rows, the expert rows and the output to the
    dtype of `hidden_states`: n terms cost n eps of the sum of their magnitudes.
    """
    dtype = hidden_states.dtype
    x = hidden_states.double()

    def linear(x, error, weight, bias):
        weight = weight.double()
        bias = torch.zeros(len(weight)).double() if bias is None else bias.double()
        magnitude = (x.abs() + error) @ weight.abs().T + bias.abs()
        terms = weight.shape[1] + 1
        return x @ weight.T + bias, error @ weight.abs().T + terms * EPS32 * magnitude

    def expert(gate_up, down, gate_up_bias, down_bias):
        sums, error = linear(x, torch.zeros_like(x), gate_up, gate_up_bias)
        inner = activate(sums, **activation)
        error = rounded(inner, activation_error(sums, error, **activation), dtype)
        out, error = linear(inner, error, down, down_bias)
        return out, rounded(out, error, dtype)

    out = torch.zeros_like(x)
    error = torch.zeros_like(x)
    sum_terms = EPS32 * (topk_ids.shape[1] + 1)
    for local in range(len(gate_up)):
        is_chosen = topk_ids.long() == local + first_expert
        weight = (topk_weights.double() * is_chosen).sum(dim=1, keepdim=True)
        y, y_error = expert(
            gate_up[local],
            down[local],
            None if gate_up_bias is None else gate_up_bias[local],
            None if down_bias is None else down_bias[local],
        )
        out += weight * y
        error += weight.abs() * (y_error + sum_terms * y.abs())
    if shared_gate_up is not None:
        y, y_error = expert(shared_gate_up, shared_down, None, None)
        scale, scale_error = torch.ones(len(x), 1).double(), torch.zeros(len(x), 1).double()
        if shared_gate is not None:
            logit, logit_error = linear(x, torch.zeros_like(x), shared_gate, None)
            scale = torch.sigmoid(logit)
            scale_error = logit_error / 4 + 4 * EPS32 * scale
        out += scale * y
        error += (scale + scale_error) * (y_error + sum_terms * y.abs()) + scale_error * y.abs()
    return out, rounded(out, error, dtype)


def rms_norm(x, weight, eps):
    """[..., N] float64."""
    x = x.double()
    return weight.double() * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def rotary_embedding(x, positions, cos_sin, interleaved=False, absolute=False):
    """[T, n, D] float64; with `absolute` the sum of the magnitudes of its terms, for x >= 0."""
    rotary_dim = cos_sin.shape[1]
    cos, sin = (t[:, None, :].double() for t in cos_sin[positions.long()].chunk(2, dim=1))
    if absolute:
        cos, sin = cos.abs(), sin.abs()
    sign = 1.0 if absolute else -1.0
    x = x.double()
    a, b = pair_of(x[..., :rotary_dim], interleaved)
    turned = a * cos + sign * b * sin, b * cos + a * sin
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat([turned, x[..., rotary_dim:]], dim=-1)


def attention(query, key, value, scale):
    """[T, Hq, D] float64 of one sequence, causal, and a bound of the error of `paged_attention`.

    A score is off by D + 2 roundings of its terms, and its exponent by as much again of itself; a
    weight by that, by 4 eps of its own, and by its rounding to the dtype; sums of weights, of
    values and their rescaling by one eps a term at most. Weights err in the numerator and in the
    denominator, each within that share of the weighted magnitudes.
    """
    num_tokens, num_heads, head_dim = query.shape
    group = num_heads // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (t.double().repeat_interleave(group, dim=1).transpose(0, 1) for t in (key, value))
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    scores = scale * (q @ k.mT)
    magnitudes = scale * (q.abs() @ k.abs().mT)
    weights = torch.softmax(scores.masked_fill(~visible, NEG_INF), dim=-1)
    score_error = (2 * head_dim + 8) * EPS32 * magnitudes.masked_fill(~visible, 0).amax(-1, True)
    relative = 2 * score_error + (num_tokens + 16) * EPS32
    spread = weights @ v.abs()
    weight_rounding = 2**-8 if query.dtype == torch.bfloat16 else 0.0
    error = (2 * relative + weight_rounding) * spread
    out = weights @ v
    error = rounded(out, error, query.dtype)
    return out.transpose(0, 1), error.transpose(0, 1)
