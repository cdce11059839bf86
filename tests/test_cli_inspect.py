"""`moecore inspect`: its numbers against transformers' and published ones, and what it prints."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoints
import moecore
from moecore import model_size
from moecore.checkpoint import Checkpoint
from moecore.cli import inspect

REAL = {
    # config.json, total, active, KV bytes a token; bfloat16
    "qwen3-30b-a3b": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "head_dim": 128,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
        30_532_122_624,
        3_353_032_704,
        98_304,
    ),
    "mixtral-8x7b": (
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        46_702_792_704,
        12_879_925_248,
        131_072,
    ),
}


def command(*arguments):
    parser = argparse.ArgumentParser()
    inspect.add_parser(parser.add_subparsers())
    args = parser.parse_args(["inspect", *map(str, arguments)])
    return args.run(args)


def facts_of(folder, capsys):
    assert command(folder, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_checkpoint_has_the_parameters_of_transformers_model(tmp_path, capsys, family, fused):
    model = checkpoints.make_model(family, num_key_value_heads=2)
    checkpoints.save(model, tmp_path)
    if fused:
        checkpoints.fuse_experts(tmp_path)
    facts = facts_of(tmp_path, capsys)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    total = sum(sizes.values())
    assert facts["source"] == "checkpoint"
    assert facts["parameters"] == facts["config_parameters"] == total
    k, count = model.config.num_experts_per_tok, 8
    assert facts["active_parameters"] == total - experts * (count - k) // count
    assert facts["bytes_by_dtype"] == {"F32": 4 * total}
    assert facts["bytes_per_rank"] == {
        str(ep): 4 * (total - experts + experts // ep) for ep in (1, 2, 4, 8)
    }


@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_a_config_alone_gives_the_numbers_of_its_checkpoint(tmp_path, capsys, family):
    checkpoints.save(checkpoints.make_model(family), tmp_path)
    with_weights = facts_of(tmp_path, capsys)
    (tmp_path / "model.safetensors").unlink()
    without = facts_of(tmp_path, capsys)
    assert without["source"] == "config"
    assert without["bytes_by_dtype"] == {"float32": with_weights["bytes_by_dtype"]["F32"]}
    differ = {key for key in without if without[key] != with_weights[key]}
    assert differ == {"source", "bytes_by_dtype"}


@pytest.mark.parametrize(("config", "total", "active", "kv"), REAL.values(), ids=REAL)
def test_real_models_have_their_published_sizes(tmp_path, capsys, config, total, active, kv):
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    facts = facts_of(tmp_path, capsys)
    assert facts["parameters"] == total
    assert facts["active_parameters"] == active
    assert facts["kv_bytes_per_token"] == kv
    assert facts["bytes_per_rank"]["1"] == 2 * total


def test_shared_experts_are_on_every_rank(tmp_path):
    tensors = {
        f"model.layers.0.mlp.{name}.weight": torch.zeros(size)
        for name, size in {"experts.7.up_proj": 5, "shared_experts.up_proj": 7}.items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    size = model_size.checkpoint_parameters(Checkpoint.open(tmp_path))
    assert (size.experts, size.rest) == (5, 7)


def test_bytes_are_those_of_the_dtypes_in_the_files(tmp_path, capsys):
    model = checkpoints.make_model("Qwen3Moe")
    checkpoints.save(model, tmp_path)
    tensors = {
        name: tensor if "norm" in name else tensor.to(torch.bfloat16)
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors")
    by_dtype = facts_of(tmp_path, capsys)["bytes_by_dtype"]
    norms = sum(tensor.numel() for name, tensor in tensors.items() if "norm" in name)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert by_dtype == {"BF16": 2 * (total - norms), "F32": 4 * norms}
    assert list(by_dtype) == ["BF16", "F32"]


def test_the_fullest_of_uneven_ranks_counts_and_no_rank_is_empty(tmp_path, capsys):
    config = {**REAL["mixtral-8x7b"][0], "num_local_experts": 6, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    per_rank = facts_of(tmp_path, capsys)["bytes_per_rank"]
    assert list(per_rank) == ["1", "2", "4"]
    expert = 2 * 32 * 3 * 4096 * 14336
    assert per_rank["1"] - per_rank["4"] == 4 * expert  # a rank holds 2, 2, 2 or none of the 6


def test_the_text_says_what_was_counted_and_where(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps({**REAL["qwen3-30b-a3b"][0], "dtype": "bfloat16"})
    )
    assert command(tmp_path) == 0
    text = capsys.readouterr().out
    for part in (
        "qwen3_moe, routing softmax",
        "128 a layer, 8 for each token",
        "30.53 B, 3.35 B active for each token",
        "bfloat16 61.06 GB (computed from config.json",
        "98,304 bytes for each token in bfloat16",
        "10.33 GB of weights on each rank",
    ):
        assert part in text
    assert "note" not in text


def test_a_checkpoint_of_another_size_than_its_config_is_noted(tmp_path, capsys):
    checkpoints.save(checkpoints.make_model("Mixtral"), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.9.extra.weight"] = torch.zeros(1000)
    save_file(tensors, path)
    facts = facts_of(tmp_path, capsys)
    assert facts["parameters"] == facts["config_parameters"] + 1000
    assert command(tmp_path) == 0
    assert f"config.json implies {facts['config_parameters']:,} parameters" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_cut_checkpoint_is_refused_and_not_taken_for_none(tmp_path):
    checkpoints.save(checkpoints.make_model("Mixtral"), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(moecore.FormatError, match=r"model.safetensors: expected"):
        command(tmp_path)


def test_a_hub_id_is_asked_for_no_weights(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({**REAL["mixtral-8x7b"][0], "dtype": "bfloat16"})
    )
    asked = []

    def download(repo_id, **options):
        asked.append((repo_id, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert command("owner/name", "--revision", "v2", "--json") == 0
    [(repo_id, revision, patterns)] = asked
    assert (repo_id, revision) == ("owner/name", "v2")
    assert not any("safetensors" in pattern for pattern in patterns)
