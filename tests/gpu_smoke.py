"""Every CUDA kernel once on small sizes, for compute-sanitizer; prints nothing if all is well.

With the argument grouped_gemm, the grouped GEMM alone, whose kernel MOECORE_CUDA_GEMM chooses.
"""

import sys
import uuid

import torch

import moecore
from moecore import ops


def main() -> None:
    torch.manual_seed(0)
    if sys.argv[1:] == ["grouped_gemm"]:
        run_grouped_gemm()
        run_tensor_core_layer()
    else:
        run_all()
    torch.cuda.synchronize()


def run_all() -> None:
    experts, top_k, hidden, inner = 9, 3, 70, 45
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = torch.randn(experts, 2 * inner, hidden).to(dtype).cuda()
        down = torch.randn(experts, hidden, inner).to(dtype).cuda()
        bias = torch.randn(experts, device="cuda")
        routing = ops.RoutingConfig(
            top_k=top_k,
            score_function="sigmoid",
            group_limit="top2_sum",
            num_groups=3,
            topk_group=2,
        )
        layer = moecore.MoELayer(
            gate_up,
            down,
            routing,
            selection_bias=bias,
            shared_gate_up=gate_up[0],
            shared_down=down[0],
            shared_gate=down[0, :1, :1].expand(1, hidden).contiguous(),
        )
        for num_tokens in (0, 1, 77):
            x = torch.randn(num_tokens, hidden).to(dtype).cuda()
            logits = torch.randn(num_tokens, experts).cuda()
            assert layer(x, logits).isfinite().all()
        run_decoder_ops(dtype)
    run_grouped_gemm()
    run_tensor_core_layer()
    run_rank()
    run_model()
    run_attention()


def run_decoder_ops(dtype: torch.dtype) -> None:
    table = torch.randn(50, 72).to(dtype).cuda()
    angles = torch.randn(64, 16, device="cuda")
    for num_tokens in (0, 1, 33):
        ids = torch.arange(num_tokens, device="cuda")
        x = ops.embedding(ids, table)
        residual = torch.ones_like(x)
        x = ops.rms_norm(x, table[0], 1e-6, residual=residual)
        heads = x.view(num_tokens, 3, 24)
        ops.rotary_embedding(heads, ids.int(), angles)
        assert heads.isfinite().all()


def run_grouped_gemm() -> None:
    """K of less than a block, and of several; outputs that are aligned and that are not."""
    for k_dim in (8, 72, 264):
        for num_rows in (1, 40, 130):
            x = torch.randn(num_rows, k_dim).bfloat16().cuda()
            weights = torch.randn(2, 272, k_dim).bfloat16().cuda()
            bias = torch.randn(2, 272).cuda()
            offsets = torch.tensor([0, num_rows // 3, num_rows]).cuda()
            for activation in ("none", "swiglu", "clamped_swiglu", "gelu_tanh"):
                width = 272 if activation == "none" else 136
                for dtype, shift in ((torch.bfloat16, 0), (torch.bfloat16, 1), (torch.float32, 1)):
                    memory = torch.zeros(num_rows, width + 8, dtype=dtype, device="cuda")
                    out = memory[:, shift : shift + width]
                    config = ops.GroupedGemmConfig(activation=activation, interleaved=shift == 1)
                    ops.grouped_gemm(x, weights, offsets, bias=bias, config=config, out=out)
                    assert out.isfinite().all()


def run_tensor_core_layer() -> None:
    """Sizes that the tensor cores' kernels take: few rows an expert, many, very many, and none."""
    for inner, batches in ((72, (1, 40, 700)), (1024, (1500,)), (2048, (1500,))):
        run_batches(inner, batches)


def run_batches(inner: int, batches: tuple[int, ...]) -> None:
    experts, hidden = 6, 136
    gate_up = torch.randn(experts, 2 * inner, hidden).bfloat16().cuda()
    down = torch.randn(experts, hidden, inner).bfloat16().cuda()
    layer = moecore.MoELayer(gate_up, down, ops.RoutingConfig(top_k=2))
    for num_tokens in batches:
        x = torch.randn(num_tokens, hidden).bfloat16().cuda()
        logits = torch.randn(num_tokens, experts).cuda()
        logits[:, 3] = -1e9
        assert layer(x, logits).isfinite().all()


def run_rank() -> None:
    """One rank over peer memory: what it writes to others goes to itself.

    Ranks that wait for each other would wait for ever: the sanitizer runs one kernel at a time.
    """
    hosts = moecore.Transport.shm(f"smoke-{uuid.uuid4().hex}", 0, 1)
    transport = moecore.Transport.peer(hosts, device="cuda:0")
    experts = 8
    for hidden, inner in ((136, 72), (70, 45)):
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator).bfloat16().cuda()
        down = torch.randn(experts, hidden, inner, generator=generator).bfloat16().cuda()
        routing = ops.RoutingConfig(top_k=3)
        alone = moecore.MoELayer(gate_up, down, routing)
        for how in (
            {"schedule": "all_to_all", "num_groups": 2},
            {"combine": "fast"},
            {"schedule": "all_gather"},
            {"schedule": "all_gather", "fixed_tokens": 80},
        ):
            layer = moecore.MoELayer(gate_up, down, routing, transport=transport, **how)
            for count in (0, 77):
                x = torch.randn(count, hidden, generator=generator).bfloat16().cuda()
                logits = torch.randn(count, experts, generator=generator).cuda()
                got = layer(x, logits)
                transport.synchronize("a layer")
                assert "combine" in how or torch.equal(got, alone(x, logits))


def run_model() -> None:
    """Prompts, then decodes in a CUDA graph and without one."""
    params = moecore.SamplingParams(temperature=0, max_tokens=3)
    for enforce_eager in (False, True):
        with moecore.LLM(
            device="cuda",
            max_num_seqs=2,
            kv_cache_memory=32 << 20,
            enforce_eager=enforce_eager,
            use_tqdm=False,
        ) as llm:
            llm.generate(["Once upon a time", "The king"], params, use_tqdm=False)


def run_attention() -> None:
    for head_dim, num_heads in ((16, 3), (80, 16), (128, 8), (256, 2)):
        lengths = [70, 1, 600]
        counts = [3, 1, 300]
        tables = torch.arange(30, dtype=torch.int32, device="cuda").view(3, 10)
        cache = torch.zeros(1, 30, 64 * head_dim, dtype=torch.bfloat16, device="cuda")
        for queries in (counts, [1, 1, 1]):
            offsets = torch.tensor([0, *queries]).cumsum(0, dtype=torch.int32).cuda()
            context = torch.tensor(lengths, dtype=torch.int32, device="cuda")
            batch = (offsets, context, tables)
            rows = torch.randn(sum(queries), num_heads, head_dim).bfloat16().cuda()
            key = rows[:, :1].contiguous()
            value_cache = cache.clone()
            ops.write_kv_cache(key, key, cache, value_cache, *batch)
            out = ops.paged_attention(rows, cache, value_cache, *batch, scale=0.1)
            assert out.isfinite().all()


if __name__ == "__main__":
    main()
