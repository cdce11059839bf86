"""Both implementations of attention behind the decoder's interface."""

from __future__ import annotations

import pytest
import torch

from checkpoints import make_model, save
from moecore.attention import NativeAttention, TorchAttention
from moecore.batch import Batch
from moecore.config import read_config


def batches(num_heads: int) -> list[Batch]:
    """Two sequences: a prompt of 70 in two chunks beside one of 3, then a token of each."""
    generator = torch.Generator().manual_seed(1)

    def batch(spans: list[tuple[int, int, list[int]]]) -> Batch:
        positions = [p for begin, end, _ in spans for p in range(begin, end)]
        offsets = torch.tensor([0] + [end - begin for begin, end, _ in spans]).cumsum(0)
        return Batch(
            token_ids=torch.randint(0, 8, (len(positions),), generator=generator),
            positions=torch.tensor(positions, dtype=torch.int32),
            query_offsets=offsets.int(),
            context_lens=torch.tensor([end for _, end, _ in spans], dtype=torch.int32),
            block_tables=torch.tensor([blocks for _, _, blocks in spans], dtype=torch.int32),
            logit_rows=torch.arange(len(positions)),
        )

    first, second = [4, 1, 2], [3, -1, -1]
    return [
        batch([(0, 40, first), (0, 3, second)]),
        batch([(40, 70, first)]),
        batch([(3, 4, second), (70, 71, first)]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_native_and_torch_attention_agree(dtype, tmp_path):
    config = read_config(save(make_model("Qwen3Moe"), tmp_path))
    native = NativeAttention(config, dtype, 6, torch.device("cpu"))
    library = TorchAttention(config, dtype, 6, torch.device("cpu"))
    heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
    torch.manual_seed(0)
    for batch in batches(heads):
        tokens = len(batch.positions)
        query, key, value = (
            torch.randn(tokens, n, dim).to(dtype) for n in (heads, kv_heads, kv_heads)
        )
        for layer in (0, 2):
            got, want = torch.empty_like(query), torch.empty_like(query)
            native(layer, query, key, value, batch, out=got)
            library(layer, query, key, value, batch, out=want)
            # Both round the weights (at most 1) and the result, which is below max |value| < 5.
            torch.testing.assert_close(got, want, rtol=0, atol=5 * 2 * torch.finfo(dtype).eps)
