"""What must be the same on every device, and what a build without CUDA answers."""

import pytest
import torch

import moecore
from moecore import ops

HAS_CUDA = torch.cuda.is_available() and moecore.build_info()["has_cuda"]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU and a build with CUDA kernels")


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"renormalize": True},
        {"renormalize": False},
        {"score_function": "sigmoid"},
        {"score_function": "sqrtsoftplus", "scale": 1.5},
        {"score_function": "raw_logits"},
        {"group_limit": "max", "num_groups": 8, "topk_group": 3, "renormalize": False},
        {
            "score_function": "sigmoid",
            "group_limit": "top2_sum",
            "num_groups": 8,
            "topk_group": 4,
            "norm_epsilon": 1e-20,
            "scale": 2.5,
        },
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("num_experts", [8, 160, 256, 1024])
def test_routing_has_the_same_bits_on_the_cpu_and_the_gpu(num_experts, options, dtype):
    generator = torch.Generator().manual_seed(num_experts)
    logits = (torch.randn(513, num_experts, generator=generator) * 3).to(dtype)
    bias = torch.randn(num_experts, generator=generator) if options.get("scale") else None
    top_k = min(8, num_experts // 8 * options.get("topk_group", 8))
    got = ops.topk_routing(
        logits.cuda(), top_k, selection_bias=None if bias is None else bias.cuda(), **options
    )
    want = ops.topk_routing(logits, top_k, selection_bias=bias, **options)
    assert torch.equal(got.topk_ids.cpu(), want.topk_ids)
    assert torch.equal(got.topk_weights.cpu(), want.topk_weights)


@needs_cuda
def test_the_layer_agrees_between_the_cpu_and_the_gpu_and_replays_in_a_cuda_graph():
    torch.manual_seed(0)
    gate_up = (torch.randn(8, 256, 192) * 0.1).bfloat16()
    down = (torch.randn(8, 192, 128) * 0.1).bfloat16()
    x, logits = torch.randn(65, 192).bfloat16(), torch.randn(65, 8)
    routing = ops.RoutingConfig(top_k=2)
    want = moecore.MoELayer(gate_up, down, routing)(x, logits)
    layer = moecore.MoELayer(gate_up.cuda(), down.cuda(), routing)
    x_gpu, logits_gpu = x.cuda(), logits.cuda()
    eager = layer(x_gpu, logits_gpu)
    # Both round the inner layer, the rows and the output to bfloat16 (2**-9 each); sums differ in
    # order only, far below that.
    assert (eager.cpu().float() - want.float()).norm() <= 2**-8 * want.float().norm()

    out = torch.empty_like(x_gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x_gpu, logits_gpu, out=out)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, eager)


@needs_cuda
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 255, 256, 257, 1000])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (128, 8), (256, 8), (512, 10)])
def test_the_layer_routes_as_the_operators_do(num_experts, top_k, num_tokens):
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    made = {"generator": generator, "device": "cuda"}
    local = num_experts // 2
    gate_up, down = torch.randn(local, 64, 32, **made), torch.randn(local, 32, 32, **made)
    bias = torch.randn(num_experts, **made)
    options = {"score_function": "sigmoid", "scale": 2.5}
    layer = moecore.MoELayer(
        gate_up,
        down,
        ops.RoutingConfig(top_k=top_k, **options),
        selection_bias=bias,
        num_experts=num_experts,
        first_expert=num_experts // 4,
    )
    x, logits = torch.randn(num_tokens, 32, **made), torch.randn(num_tokens, num_experts, **made)
    routed = ops.topk_routing(logits, top_k, selection_bias=bias, **options)
    assert torch.equal(layer(x, logits), layer.forward_routed(x, *routed))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 63, 64, 100, 1024])
def test_norms_have_the_same_bits_on_the_cpu_and_the_gpu(width, dtype):
    generator = torch.Generator().manual_seed(width)
    x, residual = torch.randn(2, 33, width, generator=generator).to(dtype)
    weight = torch.randn(width, generator=generator)
    stream = residual.cuda()
    got = ops.rms_norm(x.cuda(), weight.cuda(), 1e-6, residual=stream)
    assert torch.equal(got.cpu(), ops.rms_norm(x, weight, 1e-6, residual=residual))
    assert torch.equal(stream.cpu(), residual)


@needs_cuda
def test_what_lies_outside_a_table_is_nan_on_the_gpu():
    ids = torch.tensor([0, -1, 3, 2**31 - 1], dtype=torch.int32, device="cuda")
    for index in (ids, ids.long()):
        got = ops.embedding(index, torch.ones(4, 1100, device="cuda"))
        assert got.isnan().all(dim=1).tolist() == [False, True, False, True]
    x = torch.ones(4, 2, 8, device="cuda")
    ops.rotary_embedding(x, ids, torch.ones(4, 6, device="cuda"))
    assert x[..., :6].isnan().all(dim=2)[:, 0].tolist() == [False, True, False, True]
    assert x[..., 6:].eq(1).all()


@needs_cuda
def test_attention_on_the_gpu_names_what_it_cannot_take():
    batch = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 1], [1], [[0]])]
    for head_dim, dtype in ((16, torch.float32), (8, torch.bfloat16)):
        cache = torch.zeros(1, 1, 64 * head_dim, dtype=dtype, device="cuda")
        rows = torch.zeros(1, 1, head_dim, dtype=dtype, device="cuda")
        with pytest.raises(moecore.UnsupportedError, match="bfloat16 and the head size a multiple"):
            ops.paged_attention(rows, cache, cache.clone(), *batch, scale=1.0)
        with pytest.raises(moecore.UnsupportedError, match="bfloat16 and the head size a multiple"):
            ops.write_kv_cache(rows, rows, cache, cache.clone(), *batch)
    cache = torch.zeros(1, 1, 64 * 16, dtype=torch.bfloat16, device="cuda")
    rows = torch.zeros(1, 33, dtype=torch.bfloat16, device="cuda")[:, 1:17].view(1, 1, 16)
    with pytest.raises(ValueError, match="query must have its rows at multiples of 16 bytes"):
        ops.paged_attention(rows, cache, cache.clone(), *batch, scale=1.0)


@needs_cuda
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"bias must be on cuda:0, got cpu"):
        ops.linear(torch.ones(2, 4).cuda(), torch.ones(3, 4).cuda(), torch.ones(3))


def test_prepare_weights_names_the_device_it_cannot_take():
    with pytest.raises(moecore.UnsupportedError, match="must be on the CPU, got meta"):
        ops.prepare_weights(torch.empty(1, 4, 4, device="meta"))
