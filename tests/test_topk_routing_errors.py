"""topk_routing names the argument that is bad, and its value."""

import math

import pytest
import torch

from moecore import ops
from routing_data import make_logits, route


@pytest.mark.parametrize("top_k", [-1, 0, 17])
def test_top_k_out_of_range_names_the_argument_and_the_value(device, top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in .* got {top_k} with num_experts 16"):
        route(device, make_logits(4, 16), top_k)


def test_top_k_above_32_is_refused(device):
    with pytest.raises(ValueError, match=r"top_k must be in .* got 33 with num_experts 64"):
        route(device, make_logits(4, 64), 33)


BAD_OPTIONS = {
    "scale-nan": ({"scale": math.nan}, "scale must be finite, got nan"),
    "norm-epsilon": ({"norm_epsilon": -1.0}, "norm_epsilon must be .* got -1"),
    "norm-min": ({"norm_min": math.inf}, "norm_min must be .* got inf"),
    "score-name": ({"score_function": "tanh"}, "score_function must be one of .* got tanh"),
    "group-name": ({"group_limit": "best"}, "group_limit must be one of .* got best"),
    "groups-do-not-divide": (
        {"group_limit": "max", "num_groups": 5},
        "num_groups must be a positive divisor of num_experts, got 5 with num_experts 16",
    ),
    "no-groups": ({"group_limit": "max", "num_groups": 0}, "num_groups must be .* got 0"),
    "topk-group-zero": (
        {"group_limit": "max", "num_groups": 4, "topk_group": 0},
        r"topk_group must be in \[1, num_groups\], got 0",
    ),
    "topk-group-large": (
        {"group_limit": "top2_sum", "num_groups": 4, "topk_group": 5},
        "topk_group must be in .* got 5 with num_groups 4",
    ),
    "groups-hold-too-few": (
        {"top_k": 5, "group_limit": "max", "num_groups": 4, "topk_group": 1},
        "top_k must be at most the 4 experts of topk_group groups, got 5",
    ),
    "bias-shape": (
        {"selection_bias": torch.zeros(15)},
        r"selection_bias must have shape \[16\], got .*15",
    ),
    "bias-dtype": (
        {"selection_bias": torch.zeros(16, dtype=torch.bfloat16)},
        "selection_bias must be float32, got bfloat16",
    ),
    "bias-stride": (
        {"selection_bias": torch.zeros(32)[::2]},
        r"selection_bias must be contiguous, got strides \[2\]",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_a_bad_option_is_named_with_its_value(device, options, message):
    options = {"top_k": 2, **options}
    if "selection_bias" in options:
        options["selection_bias"] = options["selection_bias"].to(device)
        if "stride" in message:  # a copy to another device is contiguous
            options["selection_bias"] = torch.zeros(32, device=device)[::2]
    with pytest.raises(ValueError, match=message):
        ops.topk_routing(make_logits(4, 16).to(device), **options)


BAD_LOGITS = {
    "float16": (lambda x: x.half(), "router_logits must be .* got float16"),
    "int32": (lambda x: x.int(), "router_logits must be float32 or bfloat16, got int32"),
    "one-dimension": (lambda x: x[0], r"router_logits must have shape \[any, any\], got .*16"),
    "three-dimensions": (lambda x: x[None], "router_logits must have shape .* got .*1, 4, 16"),
    "no-experts": (lambda x: x[:, :0], r"num_experts must be in \[1, 1024\], got 0"),
    "too-many-experts": (lambda x: x.new_zeros(1, 1025), "num_experts must be .* got 1025"),
    "transposed": (lambda x: x.T.contiguous().T, "router_logits must have contiguous rows"),
    "every-other": (lambda x: x[:, ::2], r"router_logits must have contiguous rows.*\[16, 2\]"),
    "expanded": (lambda x: x[:1].expand(4, 16), r"router_logits must have contig.*\[0, 1\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD_LOGITS.values(), ids=BAD_LOGITS.keys())
def test_bad_logits_are_named_with_what_they_are(device, change, message):
    logits = change(make_logits(4, 16).to(device))
    with pytest.raises(ValueError, match=message):
        ops.topk_routing(logits, 2)


@pytest.mark.parametrize("logits", [[[0.0, 1.0]], None, 3.0])
def test_what_is_no_tensor_is_a_type_error(logits):
    with pytest.raises(TypeError, match="router_logits must be a tensor"):
        ops.topk_routing(logits, 1)
