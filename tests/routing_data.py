"""Logits, calls and tolerances that the tests of topk_routing share."""

import torch

from moecore import ops
from oracle import EPS32


def make_logits(num_tokens, num_experts, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(num_tokens, num_experts, generator=generator)).to(dtype)


def route(device, logits, top_k, *, selection_bias=None, **options):
    """ops.topk_routing on `device`, its result on the CPU."""
    if selection_bias is not None:
        selection_bias = selection_bias.to(device)
    got = ops.topk_routing(logits.to(device), top_k, selection_bias=selection_bias, **options)
    return ops.Routing(got.topk_ids.cpu(), got.topk_weights.cpu())


def weights_rtol(num_experts, top_k, options):
    # In units of eps = 2**-23: rounding x - max, where |x - max| < 32, costs exp() at most 16, and
    # exp itself 1; so 34 for both sides of a division, 1/2 each for two divisions, the epsilon
    # and the scale, and (n - 1) / 2 for a sum of n positive terms. Sigmoid and sqrtsoftplus take
    # exact arguments and are below 8.
    is_full_sum = options.get("score_function", "softmax") == "softmax"
    return ((num_experts if is_full_sum else 0) + top_k + 36) * EPS32
