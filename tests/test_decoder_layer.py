"""The core's DecoderLayer from Python: errors, lifetimes, threads. Bits: tests/cpp, test_models."""

import gc
import re
import threading

import pytest
import torch

import moecore
from moecore import _core

# T tokens, H hidden, Hq = 2 and Hk = 1 heads of D, E experts, I inner.
T, H, D, E, I = 3, 32, 8, 4, 16
QKV = 4 * D


def randn(*shape, seed=0, dtype=torch.float32):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_tensors(seed=1, num_tokens=T):
    widths = {"residual": H, "normed": H, "delta": H, "qkv": QKV, "attended": 2 * D}
    widths |= {"router_logits": E, "inner": I}
    return {
        name: randn(num_tokens, width, seed=seed + i)
        for i, (name, width) in enumerate(widths.items())
    }


def make_moe():
    routing = moecore.ops.RoutingConfig(top_k=2)
    return moecore.MoELayer(randn(E, 2 * I, H, seed=20), randn(E, H, I, seed=21), routing)


def make_weights():
    return {
        "input_norm": randn(H, seed=30),
        "post_norm": randn(H, seed=31),
        "qkv": moecore.ops.prepare_weights(randn(1, QKV, H, seed=32)),
        "output": randn(H, 2 * D, seed=33),
        "router": randn(E, H, seed=34),
        "moe": make_moe().native,
    }


def make_layer(weights=None, **changes):
    config = {
        "hidden_size": H,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": D,
        "intermediate_size": 0,
        "rms_norm_eps": 1e-6,
        "qk_norm": "none",
        "dtype": "float32",
    }
    return _core.DecoderLayer(**(config | changes), weights=weights or make_weights())


def places(num_tokens=T):
    return torch.arange(num_tokens, dtype=torch.int32), randn(8, D, seed=40)


def run(layer, tensors):
    activations = _core.Activations(**tensors)
    layer.before_attention(activations, *places(len(tensors["residual"])), False)
    layer.after_attention(activations)
    return tensors["delta"].clone(), tensors["residual"].clone(), tensors["qkv"].clone()


@pytest.mark.parametrize("name", ["residual", "normed", "delta", "qkv", "attended"])
@pytest.mark.parametrize("bad", [None, [1.0], randn(T), randn(T, H, 1)])
def test_activations_name_the_bad_tensor(name, bad):
    with pytest.raises((ValueError, TypeError), match=rf"Activations: .*\b{name} must"):
        _core.Activations(**make_tensors() | {name: bad})


def test_activations_that_share_memory_are_refused():
    tensors = make_tensors()
    with pytest.raises(ValueError, match="Activations: delta must not overlap normed"):
        _core.Activations(**tensors | {"delta": tensors["normed"]})


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("qkv", None, "qkv must be given, got none"),
        ("qkv", randn(QKV, H + 1), f"qkv must have shape [{QKV}, {H}]"),
        ("output", randn(H, 2 * D, dtype=torch.bfloat16), "output must be float32, got bfloat16"),
        ("input_norm", None, "input_norm must be given, got none"),
        ("post_norm", randn(H + 1), f"post_norm must have shape [{H}]"),
        ("q_norm", randn(D), "qk_norm must be per_head or full_width"),
        ("router", None, "router must be given, got none"),
        ("down", randn(H, I), "gate_up and down must not be given with moe"),
        ("moe", None, "intermediate_size must be >= 1 without moe, got 0"),
        ("moe", make_moe(), "moe must be a MoELayer of moecore._core, got MoELayer"),
        ("qkv", "text", "qkv must be a tensor"),
    ],
)
def test_a_layer_names_the_bad_weight(name, bad, rule):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"DecoderLayer: {rule}")):
        make_layer(make_weights() | {name: bad})


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_heads": 3, "num_kv_heads": 2}, "num_heads must be a positive multiple"),
        ({"head_dim": 0}, "head_dim must be >= 1, got 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite"),
        ({"qk_norm": "some"}, "qk_norm must be one of none, per_head, full_width, got some"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16, got float16"),
        ({"intermediate_size": 8}, "intermediate_size must be 0 with moe, got 8"),
        ({"hidden_size": 2 * H}, "qkv must have shape"),
    ],
)
def test_a_layer_names_the_bad_size(changes, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        make_layer(**changes)


def test_a_call_names_activations_and_positions_that_do_not_fit():
    layer, tensors = make_layer(), make_tensors()
    positions, cos_sin = places()
    del tensors["router_logits"]
    with pytest.raises(ValueError, match="DecoderLayer: router_logits must be given"):
        layer.after_attention(_core.Activations(**tensors))
    activations = _core.Activations(**make_tensors())
    with pytest.raises(ValueError, match="positions must be in"):
        layer.before_attention(activations, positions + 6, cos_sin, True)
    with pytest.raises(ValueError, match="positions must have shape"):
        layer.before_attention(activations, positions[:2], cos_sin, True)
    with pytest.raises(TypeError, match="DecoderLayer: cos_sin must be a tensor"):
        layer.before_attention(activations, positions, None, True)


def test_a_layer_and_activations_keep_what_they_use_alive():
    want = run(make_layer(), make_tensors())
    layer = make_layer()
    tensors = make_tensors()
    activations = _core.Activations(**{name: t.clone() for name, t in tensors.items()})
    held = _core.Activations(**tensors)
    gc.collect()
    junk = [torch.full((QKV, H), float("nan")) for _ in range(200)]
    positions, cos_sin = places()
    for one in (activations, held):
        layer.before_attention(one, positions, cos_sin, False)
        layer.after_attention(one)
    assert len(junk) == 200
    assert torch.equal(tensors["delta"], want[0])


def test_threads_share_a_layer_but_not_its_results():
    layer = make_layer()
    sizes = [1, 5] * 8
    want = {n: run(layer, make_tensors(num_tokens=n, seed=n)) for n in (1, 5)}
    got = {}

    def work(place, num_tokens):
        got[place] = run(layer, make_tensors(num_tokens=num_tokens, seed=num_tokens))

    threads = [threading.Thread(target=work, args=item) for item in enumerate(sizes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, num_tokens in enumerate(sizes):
        assert all(map(torch.equal, got[place], want[num_tokens]))
