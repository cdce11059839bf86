"""A rank reads its own experts, and checks the others'."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import fuse_experts, make_model, save
from moecore import FormatError, Transport, model_size
from moecore.checkpoint import Checkpoint
from moecore.config import read_config
from moecore.load_plan import plan_load
from moecore.models import family_of
from moecore.models.decoder import CausalLM
from moecore.models.load import load_model

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(params=["per expert", "fused"])
def folder(request, tmp_path):
    save(make_model("Qwen2Moe"), tmp_path)
    if request.param == "fused":
        fuse_experts(tmp_path)
    return tmp_path


def plan_of(folder, transport):
    config = read_config(folder)
    model = CausalLM(config, family_of(config.model_type).NAMES, transport=transport, **CPU)
    return plan_load(Checkpoint.open(folder), model.slots(), torch.float32, model.ignored())


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_rank_reads_what_inspect_says_and_all_read_everything(folder, size):
    config = read_config(folder)
    whole = model_size.checkpoint_bytes(Checkpoint.open(folder))
    plans = [plan_of(folder, transport) for transport in Transport.in_process(size)]
    read = [sum(job.nbytes for job in plan) for plan in plans]
    assert max(read) == model_size.bytes_per_rank(whole, config.moe.num_experts, size)
    assert sum(nbytes - whole.rest for nbytes in read) == whole.experts
    experts = [
        {part.offset for job in plan for part in job.parts if ".experts." in part.info.name}
        for plan in plans
    ]
    assert sum(map(len, experts)) == len(set().union(*experts))


def test_every_rank_refuses_a_file_that_lacks_anothers_expert(tmp_path):
    save(make_model("Mixtral"), tmp_path)
    name = next(n for n in Checkpoint.open(tmp_path).names if "experts.7." in n)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    for transport in Transport.in_process(2):
        with pytest.raises(FormatError, match=f"{name} .*expected a tensor of shape"):
            load_model(tmp_path, read_config(tmp_path), progress=False, transport=transport, **CPU)


def test_a_check_that_raises_ends_the_load(tmp_path):
    save(make_model("Mixtral"), tmp_path)

    def check():
        raise InterruptedError("rank 1 is gone")

    with pytest.raises(InterruptedError, match="rank 1 is gone"):
        load_model(tmp_path, read_config(tmp_path), progress=False, check=check, **CPU)
