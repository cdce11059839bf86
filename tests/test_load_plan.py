"""What load_weights refuses before it loads anything, and how it says so."""

import pytest
import torch

import moecore
from moecore.loading import Source, WeightSlot, load_weights
from weight_slots import E, K, Model, N, make_tensors, save


@pytest.fixture
def tensors():
    return make_tensors()


@pytest.fixture
def checkpoint(tmp_path, tensors):
    """Two shards: gate and up of expert 3 are on different sides of the cut."""
    return save(tmp_path, tensors)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# What is done to the right tensors, and what the message must say.
MISFITS = {
    "missing": (
        lambda t: without(t, "norm.weight"),
        r"norm.weight in .*: expected a tensor of shape \[16\], found none",
    ),
    "one-of-two-missing": (
        lambda t: without(t, "layers.0.experts.2.up.weight"),
        r"experts.2.up.weight in .*: expected a tensor of shape \[8, 16\], found none",
    ),
    "extra": (
        lambda t: {**t, "layers.1.mlp": torch.zeros(3, 2)},
        r"layers.1.mlp in .*safetensors: expected no tensor .* found F32 of shape \[3, 2\]",
    ),
    "misshapen": (
        lambda t: {**t, "embed.weight": torch.zeros(51, K)},
        r"embed.weight in .*safetensors: expected shape \[50, 16\], found shape \[51, 16\]",
    ),
    "transposed": (
        lambda t: {**t, "embed.weight": t["embed.weight"].T.contiguous()},
        r"embed.weight in .*: expected shape \[50, 16\], found shape \[16, 50\]",
    ),
    "fewer-experts": (
        lambda t: {**t, "layers.0.experts.fused": t["layers.0.experts.fused"][:-1].clone()},
        r"experts.fused in .*: expected shape \[6, 8, 16\], found shape \[5, 8, 16\]",
    ),
    "float8": (
        lambda t: {**t, "embed.weight": t["embed.weight"].to(torch.float8_e4m3fn)},
        "embed.weight in .*: expected a dtype that can become bfloat16, found F8_E4M3",
    ),
    "integers": (
        lambda t: {**t, "norm.weight": torch.zeros(K, dtype=torch.int64)},
        "norm.weight in .*: expected a dtype that can become bfloat16, found I64",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, tensors, change, message):
    model = Model(tensors)
    with pytest.raises(moecore.FormatError, match=message):
        load_weights(save(tmp_path, change(tensors)), model.slots, dtype=torch.bfloat16)
    assert not model.got


def test_floats_do_not_become_integers(checkpoint):
    slots = [WeightSlot(((Source("norm.weight", (K,)),),), pytest.fail, dtype=torch.int64)]
    with pytest.raises(moecore.FormatError, match=r"norm.weight .* can become int64, found BF16"):
        load_weights(checkpoint, slots, dtype=torch.bfloat16, ignore=["."])


def test_all_problems_are_counted_and_the_first_are_listed(tmp_path, tensors):
    tensors = {name: tensor for name, tensor in tensors.items() if "gate" not in name}
    with pytest.raises(moecore.FormatError, match="got 6 problems") as caught:
        load_weights(save(tmp_path, tensors), Model(make_tensors()).slots, dtype=torch.bfloat16)
    assert str(caught.value).count("found none") == E
    many = {f"extra.{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(moecore.FormatError, match="got 26 problems") as caught:
        load_weights(
            save(tmp_path, {**tensors, **many}), Model(make_tensors()).slots, dtype=torch.bfloat16
        )
    assert str(caught.value).endswith("and 18 more")


def test_a_missing_slot_names_the_nearest_alternative_and_the_others(checkpoint):
    alternatives = (
        (Source("w1", (N, K)), Source("w3", (N, K))),
        (Source("norm.weight", (K,)), Source("w2", (N, K))),
    )
    slots = [WeightSlot(alternatives, lambda *_: None)]
    with pytest.raises(moecore.FormatError, match=r"w2 in .*\[8, 16\] \(or instead w1 \+ w3\)"):
        load_weights(checkpoint, slots, dtype=torch.bfloat16, ignore=["."])


@pytest.mark.parametrize(
    "source",
    [Source("layers.0.experts.fused", (E, N, K), expert=E), Source("scalar", (), expert=0)],
    ids=["past-the-last", "of-a-scalar"],
)
def test_an_expert_that_is_not_there_is_refused(tmp_path, tensors, source):
    checkpoint = save(tmp_path, {**tensors, "scalar": torch.tensor(1.0)})
    slots = [WeightSlot(((source,),), lambda _: None)]
    with pytest.raises(moecore.FormatError, match=rf"expected an expert {source.expert}, found"):
        load_weights(checkpoint, slots, dtype=torch.bfloat16, ignore=["."])


def test_ignored_tensors_need_no_slot(checkpoint):
    slots = [WeightSlot(((Source("norm.weight", (K,)),),), lambda _: None)]
    report = load_weights(
        checkpoint, slots, dtype=torch.bfloat16, ignore=[r"experts\.", "^embed"], progress=False
    )
    assert report.bytes == 2 * K


@pytest.mark.parametrize("ignore", ["embed", ["("], [3]])
def test_ignore_that_is_no_list_of_expressions_is_named(checkpoint, ignore):
    with pytest.raises(ValueError, match="ignore must be a list of regular expressions, got"):
        load_weights(checkpoint, [], dtype=torch.bfloat16, ignore=ignore)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_num_threads_out_of_range_is_named(checkpoint, num_threads):
    with pytest.raises(ValueError, match=rf"num_threads must be >= 1, got {num_threads}"):
        load_weights(checkpoint, [], dtype=torch.bfloat16, num_threads=num_threads)
