"""scripts/train_bundled_model: what it trains is Qwen3-MoE, and the clockwork around it."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20")

SCRIPTS = Path(__file__).parents[1] / "scripts" / "train_bundled_model"
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 5,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(SCRIPTS))
    yield
    patch.undo()
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def make_model(**changes):
    """A model whose every weight matters, unlike at the start of training."""
    from model import ModelConfig, Qwen3Moe

    torch.manual_seed(0)
    model = Qwen3Moe(ModelConfig(**{**CONFIG, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_(1.0 if name.endswith("norm") else 0.0)
    return model.eval()


def test_transformers_computes_the_same_logits_from_the_exported_files(tmp_path):
    from export import difference_from_transformers, write_model

    model = make_model()
    write_model(model, 0, tmp_path)
    tokens = torch.randint(0, CONFIG["vocab_size"], (2, 64))
    # In units of float32's eps, for logits up to 30: some 3 layers times 10 sums of up to 48 terms.
    assert model(tokens).logits.abs().max() < 30
    assert difference_from_transformers(model, tmp_path, tokens) < 30 * 3 * 10 * 48 * 2**-24


def test_exported_folder_has_the_config_and_the_stored_dtype(tmp_path):
    from export import write_model
    from safetensors import safe_open

    write_model(make_model(), 7, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert config["eos_token_id"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_balance_is_one_for_even_routing_and_load_sums_to_one():
    model = make_model()
    with torch.no_grad():
        model.router.zero_()
    output = model(torch.randint(0, CONFIG["vocab_size"], (2, 8)))
    torch.testing.assert_close(output.balance, torch.tensor(1.0))
    output = make_model()(torch.randint(0, CONFIG["vocab_size"], (2, 8)))
    torch.testing.assert_close(output.load.sum(-1), torch.ones(3))


def test_dropout_only_in_training():
    model = make_model()
    model.dropout = 0.5
    tokens = torch.randint(0, CONFIG["vocab_size"], (1, 8))
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 24, 16), (2, 20, 20)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    from optimizer import orthogonalise

    torch.manual_seed(0)
    matrices = torch.randn(shape)
    update = orthogonalise(matrices)
    values = torch.linalg.svdvals(update)
    # The polynomial takes (0, 1.2] to at most 1.203, and [0.3, 1.2] to at least 0.68.
    assert values.max() < 1.21
    assert values.median() > 0.65
    # Same singular vectors: the product with the original's transpose is symmetric and positive.
    product = update @ matrices.mT
    torch.testing.assert_close(product, product.mT, rtol=0, atol=1e-3)
    assert (torch.linalg.eigvalsh(product) > -1e-3).all()


def test_an_epoch_visits_every_window_once_and_the_next_starts_elsewhere():
    from trainer import windows

    tokens = torch.arange(1000)
    batches = windows(tokens, batch=1, context=10, seed=0)
    epoch = [next(batches)[0] for _ in range(99)]
    starts = sorted(int(window[0]) for window in epoch)
    assert all(torch.equal(window, torch.arange(window[0], window[0] + 11)) for window in epoch)
    assert {b - a for a, b in itertools.pairwise(starts)} == {10}
    assert len({int(next(batches)[0, 0]) % 10 for _ in range(1000)}) > 3


def test_learning_rate_rises_and_falls_to_zero():
    from trainer import WARM_UP, rate_at

    assert rate_at(0.0) == rate_at(1.0) == 0.0
    assert rate_at(WARM_UP) == pytest.approx(1.0)
    assert rate_at(0.5 + WARM_UP / 2) == pytest.approx(0.5)


def test_steps_lower_the_loss():
    from model import ModelConfig, Qwen3Moe
    from optimizer import make_optimizers

    torch.manual_seed(0)
    model = Qwen3Moe(ModelConfig(**CONFIG), dropout=0.1)
    optimizers = make_optimizers(model, lr=1e-2, weight_decay=0.1)
    tokens = torch.arange(64).remainder(7).repeat(2, 1)
    losses = []
    for _ in range(30):
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_validation_predicts_every_token_but_the_first_and_counts_bytes():
    from evaluate import validate

    model = make_model()
    tokens = torch.randint(
        0, CONFIG["vocab_size"], (4 * 40 + 3,)
    )  # more windows than a batch holds
    result = validate(model, tokens, num_bytes=500, context=4)

    nats = 0.0
    for begin in range(0, len(tokens) - 1, 4):
        window = tokens[begin : begin + 5]
        logits = model(window[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert result["loss_per_token"] == pytest.approx(nats / (len(tokens) - 1), rel=1e-5)
    assert result["nats_per_byte"] == pytest.approx(nats / 500, rel=1e-5)
    assert result["perplexity_per_byte"] == pytest.approx(2 ** result["bits_per_byte"])
    torch.testing.assert_close(torch.tensor(result["expert_load"]).sum(-1), torch.ones(3))


def test_samples_of_almost_no_probability_mass_are_greedy():
    from evaluate import sample
    from prepare import train_tokenizer

    tokenizer = train_tokenizer(["Once upon a time there was a king.\n\nHe had a daughter."] * 3)
    model = make_model(vocab_size=tokenizer.get_vocab_size())
    ids = tokenizer.encode("Once upon a time").ids
    with torch.inference_mode():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample(model, tokenizer, "Once upon a time", 5, top_p=1e-6) == tokenizer.decode(ids)
