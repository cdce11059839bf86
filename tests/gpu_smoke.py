"""Every CUDA kernel once on small sizes, for compute-sanitizer; prints nothing if all is well."""

import torch

import moecore
from moecore import ops


def main() -> None:
    torch.manual_seed(0)
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
            residual = torch.zeros_like(x)
            assert ops.rms_norm(x, x.new_ones(hidden), 1e-6, residual=residual).isfinite().all()
            heads = residual.unflatten(1, (7, 10))
            positions = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
            table = torch.ones(80, 8, device="cuda")
            assert ops.rotary_embedding(heads, positions, table).isfinite().all()
            assert ops.embedding(positions % experts, gate_up[:, 0]).isfinite().all()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
