"""NumPy arrays in place of tensors: read and written in place, and negative strides are named."""

import numpy as np
import pytest
import torch

from moecore import ops


def arguments():
    generator = np.random.default_rng(0)
    return {
        "input": generator.normal(size=(6, 8)).astype(np.float32),
        "weights": generator.normal(size=(2, 4, 8)).astype(np.float32),
        "bias": generator.normal(size=(2, 4)).astype(np.float32),
        "expert_offsets": np.array([0, 2, 6]),
        "sorted_slots": np.arange(6, dtype=np.int32),
        "out": np.zeros((6, 4), dtype=np.float32),
    }


def test_arrays_give_the_bits_of_tensors():
    arrays = arguments()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    ops.grouped_gemm(**arrays)
    ops.grouped_gemm(**tensors)
    assert arrays["out"].any()
    assert np.array_equal(arrays["out"], tensors["out"].numpy())


def test_new_outputs_are_tensors_of_the_arrays_dtype():
    arrays = arguments()
    want = torch.from_numpy(arrays.pop("out"))
    got = ops.grouped_gemm(**arrays)
    ops.grouped_gemm(**arrays, out=want)
    assert torch.equal(got, want)
    assert torch.equal(
        ops.linear(arrays["input"], arrays["weights"][0]),
        ops.linear(torch.from_numpy(arrays["input"]), torch.from_numpy(arrays["weights"][0])),
    )
    logits = arrays["input"]
    assert torch.equal(
        ops.topk_routing(logits, 2).topk_ids, ops.topk_routing(torch.from_numpy(logits), 2).topk_ids
    )


@pytest.mark.parametrize(
    ("name", "axis"),
    [(name, axis) for name, array in arguments().items() for axis in range(array.ndim)],
)
def test_a_negative_stride_is_an_error_that_names_the_array(name, axis):
    arrays = arguments()
    arrays[name] = np.flip(arrays[name], axis)
    out = arrays["out"].copy()
    label = "output" if name == "out" else name
    with pytest.raises(ValueError, match=rf"grouped_gemm: {label} must .* got strides \[.*-"):
        ops.grouped_gemm(**arrays)
    assert np.array_equal(arrays["out"], out)


@pytest.mark.parametrize("name", ["input", "weights", "bias", "expert_offsets", "sorted_slots"])
def test_an_output_that_shares_memory_with_an_input_is_an_error(name):
    arrays = arguments()
    memory = np.zeros(200, dtype=np.float32)
    arrays["out"] = memory[:24].reshape(6, 4)
    shared = memory[20:].view(arrays[name].dtype)[: arrays[name].size].reshape(arrays[name].shape)
    shared[...] = arrays[name]
    arrays[name] = shared
    with pytest.raises(ValueError, match=f"output must not overlap {name}"):
        ops.grouped_gemm(**arrays)
