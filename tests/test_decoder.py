"""The core's Decoder: the bits of its parts one by one, errors that name a part."""

import gc
import re
from array import array
from dataclasses import fields

import pytest
import torch

from checkpoints import make_model, save
from moecore import _core
from moecore.attention import NativeAttention
from moecore.batch import Batch, DecodeBatch
from moecore.config import read_config
from moecore.models.load import load_model
from moecore.rope import cos_sin_table
from moecore.scheduler import Sequence
from test_decoder_layer import D, E, H, T, make_layer, make_tensors, places, randn

# Every kind of norm of query and key; Olmoe once with what only layers one by one can do.
FAMILIES = {
    "Mixtral": {},
    "Olmoe": {},
    "Olmoe-unclipped": {"clip_qkv": None},
    "Qwen2Moe": {},
    "Qwen3Moe": {},
}
VOCAB = 20


class OneByOne:
    """NativeAttention that the decoder does not know: it goes layer by layer."""

    def __init__(self, *arguments):
        self._attention = NativeAttention(*arguments)
        self.block_size = NativeAttention.block_size

    def __call__(self, *arguments, out):
        self._attention(*arguments, out=out)


def batch_of(lengths, contexts, tables, logit_rows):
    positions = [p for n, end in zip(lengths, contexts, strict=True) for p in range(end - n, end)]
    generator = torch.Generator().manual_seed(sum(contexts))
    return Batch(
        token_ids=torch.randint(0, 128, (len(positions),), generator=generator),
        positions=torch.tensor(positions, dtype=torch.int32),
        query_offsets=torch.tensor([0, *lengths]).cumsum(0).int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


def on_device(batch, device):
    return Batch(**{f.name: getattr(batch, f.name).to(device) for f in fields(Batch)})


def decoding(num_cached_tokens, blocks):
    token_ids = [t % 100 for t in range(num_cached_tokens + 1)]
    return Sequence(token_ids, num_cached_tokens, 1, array("i", blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_the_bits_of_the_parts_one_by_one(family, dtype, device, tmp_path):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("a cache on CUDA holds bfloat16")
    made = make_model(family.removesuffix("-unclipped"), **FAMILIES[family])
    config = read_config(save(made, tmp_path))
    place = torch.device(device)
    model = load_model(tmp_path, config, device=place, dtype=dtype, progress=False)
    cos_sin = cos_sin_table(config.rope, 256, config.max_position_embeddings).to(place)
    native, one_by_one = (kind(config, dtype, 6, place) for kind in (NativeAttention, OneByOne))
    passes = [
        batch_of([70, 3], [70, 3], [[4, 1], [3, -1]], [69, 72]),
        batch_of([1, 30], [4, 100], [[3, -1], [4, 1]], [0, 30]),
        batch_of([1, 1], [5, 101], [[3, -1], [4, 1]], [0, 1]),
        batch_of([2], [103], [[4, 1]], []),
        Batch.of([decoding(5, [3]), decoding(103, [4, 1])]),
    ]
    assert isinstance(passes[-1], DecodeBatch)
    if device == "cuda":
        passes = [on_device(batch, place) for batch in passes]
    for batch in passes:
        got = model.forward(batch, native, cos_sin)
        want = model.forward(batch, one_by_one, cos_sin)
        assert got.shape == (len(batch.logit_rows), config.vocab_size)
        assert torch.equal(got, want)


def make_parts(num_layers=2, num_blocks=3, **changes):
    caches = [torch.zeros(1, num_blocks, 64 * D) for _ in range(2 * num_layers)]
    head = randn(VOCAB, H, seed=50)
    return {
        "layers": [make_layer() for _ in range(num_layers)],
        "key_caches": caches[:num_layers],
        "value_caches": caches[num_layers:],
        "weights": {"embedding": head, "final_norm": randn(H, seed=51), "head": head},
    } | changes


def make_call(**changes):
    positions, cos_sin = places()
    arguments = {
        "activations": _core.Activations(**make_tensors()),
        "token_ids": torch.tensor([3, 0, 19]),
        "positions": positions,
        "cos_sin": cos_sin,
        "query_offsets": torch.tensor([0, T], dtype=torch.int32),
        "context_lens": torch.tensor([T], dtype=torch.int32),
        "block_tables": torch.tensor([[1]], dtype=torch.int32),
        "logit_rows": torch.tensor([2]),
        "logits": torch.full((1, VOCAB), float("nan")),
    }
    return arguments | changes


def run(parts):
    call = make_call()
    parts.forward(*call.values())
    return call["logits"]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"layers": [], "key_caches": [], "value_caches": []}, "layers must hold at least one"),
        ({"layers": ["x", "y"]}, "layers must be DecoderLayers, got str"),
        ({"key_caches": []}, "value_caches must be as many as key_caches, 0, got 2"),
        ({"key_caches": [], "value_caches": []}, "caches must be one a layer, 2, got 0"),
        ({"key_caches": [torch.zeros(2, 3, 64 * D)] * 2}, "caches must have shape [1, any"),
        ({"key_caches": [None, None]}, "key_caches must be a tensor"),
    ],
)
def test_a_decoder_names_the_bad_part(changes, rule):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"Decoder: {rule}")):
        _core.Decoder(**make_parts(**changes))


@pytest.mark.parametrize(
    ("name", "bad", "rule"),
    [
        ("head", None, "head must be given, got none"),
        ("head", randn(VOCAB, H + 1), "head must have shape"),
        ("embedding", randn(VOCAB + 1, H), f"embedding must have shape [{VOCAB}, {H}]"),
        ("embedding", randn(VOCAB, H).bfloat16(), "embedding must be float32, got bfloat16"),
        ("final_norm", randn(H + 1), f"final_norm must have shape [{H}]"),
        ("final_norm", None, "final_norm must be given"),
    ],
)
def test_a_decoder_names_the_bad_weight(name, bad, rule):
    parts = make_parts()
    parts["weights"][name] = bad
    with pytest.raises((ValueError, TypeError), match=re.escape(f"Decoder: {rule}")):
        _core.Decoder(**parts)


def test_layers_of_different_sizes_are_refused():
    wide = _core.DecoderLayer(
        hidden_size=H,
        num_heads=4,
        num_kv_heads=1,
        head_dim=D // 2,
        intermediate_size=16,
        rms_norm_eps=1e-6,
        qk_norm="none",
        dtype="float32",
        weights={
            "input_norm": randn(H),
            "post_norm": randn(H),
            "qkv": randn(6 * D // 2, H),
            "output": randn(H, 2 * D),
            "gate_up": randn(32, H),
            "down": randn(H, 16),
        },
    )
    with pytest.raises(ValueError, match="layers must have one num_heads, got 2 at 0 and 4 at 1"):
        _core.Decoder(**make_parts(layers=[make_layer(), wide]))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"token_ids": torch.tensor([0, VOCAB, 1])}, "embedding: ids must be in [0, 20)"),
        ({"token_ids": torch.tensor([0, 1])}, "embedding: output must have shape [2, 32]"),
        ({"logit_rows": torch.tensor([3])}, "embedding: ids must be in [0, 3)"),
        (
            {"logit_rows": torch.tensor([1, 0, 2])},
            "logit_rows must be ascending, got 1 then 0 at 1",
        ),
        ({"logit_rows": torch.tensor([[0]])}, "Decoder: logit_rows must have shape [any]"),
        ({"logits": torch.empty(2, VOCAB)}, "linear: output must have shape [1, 20]"),
        (
            {"block_tables": torch.tensor([[3]], dtype=torch.int32)},
            "block_tables must be in [0, 3)",
        ),
        (
            {"context_lens": torch.tensor([65], dtype=torch.int32)},
            "context_lens must be in [3, 64]",
        ),
        ({"positions": None}, "Decoder: positions must be a tensor"),
    ],
)
def test_a_call_names_the_bad_argument(changes, rule):
    decoder = _core.Decoder(**make_parts())
    with pytest.raises((ValueError, TypeError), match=re.escape(rule)):
        decoder.forward(*make_call(**changes).values())


def test_a_pass_of_decodes_names_its_bad_argument():
    call, decoder = make_call(), _core.Decoder(**make_parts())
    for numbers, size in (
        (bytes(15), 1),  # no int32
        (bytes(4 * 3), 1),  # no block table
        (bytes(4 * 9), 2),  # not as many for each
        (bytes(4 * 4), 0),
    ):
        with pytest.raises(ValueError, match="Decoder: numbers must be int32, 4 or more"):
            decoder.forward_decodes(
                call["activations"], numbers, size, call["cos_sin"], call["logits"]
            )


def test_a_decoder_keeps_its_parts_alive():
    want = run(_core.Decoder(**make_parts()))
    assert want.isfinite().all()
    decoder = _core.Decoder(**make_parts())
    gc.collect()
    junk = [torch.full((E, H, 16), float("nan")) for _ in range(200)]
    assert torch.equal(run(decoder), want)
    assert len(junk) == 200
