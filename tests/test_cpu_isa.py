"""Every instruction set of this processor: routing, norms and rotations equal in bits, products in
tolerance."""

import os
import subprocess
import sys

import pytest
import torch

import moecore
import oracle

# Saves, for each dtype: ids and weights of some routings, the layer's output from plain and from
# prepared weights, norms and rotations, and the attention of one sequence.
SCRIPT = """
import sys
import torch
import moecore
from moecore import ops

def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

result = {"isa": moecore.build_info()["cpu_isa"]}
for dtype in (torch.float32, torch.bfloat16):
    logits = (4 * randn(97, 77, seed=1)).to(dtype)
    routings = [
        ops.topk_routing(logits, 6, score_function=score, selection_bias=bias)
        for score in ("softmax", "sigmoid", "sqrtsoftplus", "raw_logits")
        for bias in (None, 0.2 * randn(77, seed=2))
    ]
    logits = logits[:, :13]
    routed = ops.topk_routing(logits, 6)
    x = randn(97, 130, seed=3).to(dtype)
    gate_up = (randn(13, 94, 130, seed=4) / 5).to(dtype)
    down = (randn(13, 130, 47, seed=5) / 7).to(dtype)
    prepared = ops.prepare_weights(gate_up, gated=True), ops.prepare_weights(down)
    config = ops.RoutingConfig(top_k=6)
    result[dtype] = {
        "ids": torch.stack([routing.topk_ids for routing in routings]),
        "weights": torch.stack([routing.topk_weights for routing in routings]),
        "plain": moecore.MoELayer(gate_up, down, config)(x, logits),
        "prepared": moecore.MoELayer(*prepared, config)(x, logits),
        "layer": (x, *routed, gate_up, down),
    }
    rows = randn(5, 3, 100, seed=6).to(dtype)
    residual = randn(5, 3, 100, seed=7).to(dtype)
    normed = ops.rms_norm(rows, randn(100, seed=8), 1e-6, residual=residual)
    turned = [
        ops.rotary_embedding(
            rows.clone(), torch.arange(5).int(), randn(5, 90, seed=9), interleaved=interleaved
        )
        for interleaved in (False, True)
    ]
    result[dtype]["norms"] = torch.stack([normed, residual, *turned])
    qkv = tuple(randn(70, heads, 80, seed=heads).to(dtype) for heads in (6, 2, 2))
    caches = [torch.full((2, 2, 64 * 80), float("nan"), dtype=dtype) for _ in range(2)]
    batch = [torch.tensor(x, dtype=torch.int32) for x in ([0, 70], [70], [[1, 0]])]
    ops.write_kv_cache(*qkv[1:], *caches, *batch)
    result[dtype]["qkv"] = qkv
    result[dtype]["attention"] = ops.paged_attention(qkv[0], *caches, *batch, scale=0.1)
torch.save(result, sys.argv[1])
"""


def run(isa, *arguments):
    return subprocess.run(
        [sys.executable, "-c", *arguments],
        env={**os.environ, "MOECORE_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What SCRIPT saves, for each instruction set."""
    folder = tmp_path_factory.mktemp("isa")
    results = {}
    for isa in moecore.build_info()["cpu_isas"]:
        done = run(isa, SCRIPT, str(folder / isa))
        assert done.returncode == 0, done.stderr
        results[isa] = torch.load(folder / isa)
        assert results[isa]["isa"] == isa
    return results


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
ISAS = pytest.mark.parametrize("isa", moecore.build_info()["cpu_isas"])


@ISAS
@DTYPES
def test_routing_has_the_same_bits_on_every_instruction_set(results, isa, dtype):
    got, want = results[isa][dtype], results["scalar"][dtype]
    assert torch.equal(got["ids"], want["ids"])
    assert torch.equal(oracle.bits(got["weights"]), oracle.bits(want["weights"]))


@ISAS
@DTYPES
def test_layer_is_right_on_every_instruction_set(results, isa, dtype):
    got = results[isa][dtype]
    x, ids, weights, gate_up, down = got["layer"]
    want, error = oracle.moe_layer(
        x, ids, weights, gate_up, down, activation={"activation": "swiglu"}
    )
    assert ((got["plain"].double() - want).abs() <= error).all()


@ISAS
@DTYPES
def test_prepared_weights_have_the_same_bits_on_every_instruction_set(results, isa, dtype):
    got = results[isa][dtype]
    assert torch.equal(oracle.bits(got["plain"]), oracle.bits(got["prepared"]))


@ISAS
@DTYPES
def test_norms_and_rotations_have_the_same_bits_on_every_instruction_set(results, isa, dtype):
    got, want = results[isa][dtype]["norms"], results["scalar"][dtype]["norms"]
    assert torch.equal(oracle.bits(got), oracle.bits(want))


@ISAS
@DTYPES
def test_attention_is_right_on_every_instruction_set(results, isa, dtype):
    got = results[isa][dtype]
    want, error = oracle.attention(*got["qkv"], 0.1)
    assert ((got["attention"].double() - want).abs() <= error).all()


def test_an_unknown_instruction_set_is_named_with_the_known_ones():
    done = run("nonsense", "import moecore; moecore.build_info()")
    assert done.returncode != 0
    names = ", ".join(moecore.build_info()["cpu_isas"])
    assert f"ValueError: MOECORE_CPU_ISA must be one of {names}" in done.stderr
    assert "got nonsense" in done.stderr
