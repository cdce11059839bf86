"""The GGUF file that bench/compare.py writes: llama.cpp computes transformers' logits from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny_models import HIDDEN, VOCAB, build

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_checkpoint import gguf_file
from llama_cpp_model import LlamaCpp

LENGTH = 20
each_family = pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])


def random_ids(num_seqs: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (num_seqs, length), generator=torch.Generator().manual_seed(1))


def token_errors(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    return (got - want).norm(dim=-1) / want.norm(dim=-1)


@each_family
@pytest.mark.parametrize("num_seqs", [1, 8])
def test_llama_cpp_has_the_logits_of_transformers(name: str, num_seqs: int, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    ids = random_ids(num_seqs, LENGTH + 2)
    with torch.inference_mode():
        want = model(ids).logits
    peer = LlamaCpp(gguf_file(tmp_path), num_threads=2, max_len=LENGTH + 2, exact=True)
    peer.start(num_seqs)
    parts = [torch.tensor(peer.decode(ids[:, :LENGTH].numpy(), every=True))]
    parts += [torch.tensor(peer.decode(ids[:, n : n + 1].numpy())) for n in (LENGTH, LENGTH + 1)]
    got = torch.cat(parts, dim=1)
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    # Three layers of seven products, each a float32 sum of up to HIDDEN terms of random signs in
    # two orders.
    bound = 3 * 7 * 2 * HIDDEN**0.5 * torch.finfo(torch.float32).eps
    assert token_errors(got, want).max() <= bound


@each_family
def test_llama_cpp_is_as_exact_as_transformers_in_bfloat16(name: str, tmp_path: Path) -> None:
    model = build(name, torch.bfloat16)
    model.save_pretrained(tmp_path)
    ids = random_ids(1, LENGTH)
    with torch.inference_mode():
        eager = model(ids).logits
        exact = model.float()(ids).logits
    peer = LlamaCpp(gguf_file(tmp_path), num_threads=2, max_len=LENGTH)
    peer.start(1)
    got = torch.tensor(peer.decode(ids.numpy(), every=True))
    # llama.cpp rounds a product's inputs to bfloat16, transformers every result too. A median,
    # since a rounding may flip a near tie of the router and send a token to another expert.
    assert token_errors(got, exact).median() <= token_errors(eager, exact).median()


def test_a_started_peer_forgets_its_sequences(tmp_path: Path) -> None:
    build("Qwen3Moe").save_pretrained(tmp_path)
    peer = LlamaCpp(gguf_file(tmp_path), num_threads=2, max_len=LENGTH)
    ids = random_ids(2, LENGTH).numpy()
    peer.start(2)
    first = peer.decode(ids).copy()
    peer.start(1)
    peer.decode(ids[:1])
    peer.start(2)
    assert (peer.decode(ids) == first).all()


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path) -> None:
    build("Qwen3Moe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"norm_topk_prob": False, "architectures": ["OlmoeForCausalLM"]}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=f"gguf_file: {key} must be .*, got "):
            gguf_file(tmp_path)
        assert not list(tmp_path.glob("*.gguf*"))
