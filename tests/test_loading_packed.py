"""Weights packed straight out of a checkpoint's files, and what goes wrong on the way."""

import errno
import os
import re
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file

import moecore
from moecore import loading, weight_stream
from moecore.checkpoint import Checkpoint
from moecore.loading import Packing, Source, WeightSlot, load_weights
from moecore.models.layers import fill
from weight_slots import E, K, N, make_tensors, save

FUSED = "layers.0.experts.fused"
GATES = [f"layers.0.experts.{expert}.gate.weight" for expert in range(E)]
UPS = [f"layers.0.experts.{expert}.up.weight" for expert in range(E)]


@pytest.fixture
def tensors():
    return make_tensors()


@pytest.fixture
def checkpoint(tmp_path, tensors):
    """Two shards: gate and up of expert 3 are on different sides of the cut."""
    return save(tmp_path, tensors)


class Model:
    """Packed weights of every kind that models have, and slots that fill them."""

    def __init__(self, dtype):
        name = str(dtype).removeprefix("torch.")
        gate_up = moecore.PackedWeights(name, E, 2 * N, K, True)
        fused = moecore.PackedWeights(name, E, N, K, False)
        fused_gate_up = moecore.PackedWeights(name, E, N, K, True)
        stacked = moecore.PackedWeights(name, 1, 50 + 2 * N, K, False)
        self.weights = [gate_up, fused, fused_gate_up, stacked]
        self.loaded = 0  # by slots' load: not straight out of the file
        self.slots = []
        for e in range(E):
            self._add(gate_up, e, Source(GATES[e], (N, K)), Source(UPS[e], (N, K)))
            self._add(fused, e, Source(FUSED, (E, N, K), expert=e))
            self._add(fused_gate_up, e, Source(FUSED, (E, N, K), expert=e))
        embed = Source("embed.weight", (50, K))
        self._add(stacked, 0, embed, Source(UPS[4], (N, K)), Source(GATES[1], (N, K)))

    def _add(self, weights, group, *sources):
        def load(*parts):
            self.loaded += 1
            fill(weights, group, parts)

        self.slots.append(WeightSlot((sources,), load, packing=Packing(weights, group)))

    def products(self):
        """Of random rows with each group: any element in another place changes them."""
        for weights in self.weights:
            groups = weights.shape[0]
            x = torch.randn(groups, K, generator=torch.Generator().manual_seed(1))
            config = moecore.ops.GroupedGemmConfig(activation="swiglu" if weights.gated else "none")
            yield moecore.ops.grouped_gemm(
                x.to(getattr(torch, weights.dtype)),
                weights,
                torch.arange(groups + 1),
                config=config,
            )


def load(checkpoint, slots, dtype=torch.bfloat16, **options):
    return load_weights(checkpoint, slots, dtype=dtype, ignore=["."], progress=False, **options)


def check_as_by_tensor(checkpoint, model, dtype):
    other = Model(dtype)
    load(checkpoint, [replace(slot, packing=None) for slot in other.slots], dtype)
    assert other.loaded == len(other.slots)
    for got, want in zip(model.products(), other.products(), strict=True):
        assert torch.equal(got, want)
        assert got.abs().min() > 0


@pytest.mark.parametrize("read_bytes", [None, 700, 1], ids=["all", "some", "each"])
@pytest.mark.parametrize("num_threads", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slots_that_pack_get_the_bits_of_those_that_load(
    tmp_path, tensors, monkeypatch, dtype, num_threads, read_bytes
):
    if read_bytes is not None:
        monkeypatch.setattr(weight_stream, "_READ_BYTES", read_bytes)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    checkpoint = save(tmp_path, tensors)
    model = Model(dtype)
    report = load(checkpoint, model.slots, dtype, num_threads=num_threads)
    assert model.loaded == 0
    assert report.bytes == sum(
        tensors[name].nbytes
        for name in (*GATES, *UPS, FUSED, FUSED, "embed.weight", UPS[0], UPS[0])
    )
    check_as_by_tensor(checkpoint, model, dtype)


def test_progress_is_told_between_batches_and_check_may_end_the_load(checkpoint, monkeypatch):
    """A batch is as many slots as have `_READ_BYTES` together."""
    slots = Model(torch.bfloat16).slots
    size = 2 * N * K * 2  # gate and up of an expert
    bar = MagicMock()
    monkeypatch.setattr(loading, "tqdm", bar)
    monkeypatch.setattr(weight_stream, "_READ_BYTES", 2 * size)
    checks = []
    gates_and_ups = [slot for slot in slots if slot.packing.weights is slots[0].packing.weights]
    for num_threads in (1, 3):
        load(checkpoint, gates_and_ups, num_threads=num_threads, check=lambda: checks.append(1))
    shown = bar.return_value.__enter__.return_value.update.call_args_list
    assert [call.args for call in shown] == [(2 * size,)] * (E // 2) * 2
    assert len(checks) == len(shown)

    def interrupt():
        raise KeyboardInterrupt

    shown.clear()
    files = os.listdir("/proc/self/fd")
    with pytest.raises(KeyboardInterrupt):
        load(checkpoint, gates_and_ups, num_threads=1, check=interrupt)
    assert len(shown) == 1
    assert len(os.listdir("/proc/self/fd")) == len(files)


def test_tensors_of_another_dtype_are_loaded_by_the_slot(tmp_path, tensors):
    other = (GATES[2], "embed.weight")
    mixed = {name: tensor.float() if name in other else tensor for name, tensor in tensors.items()}
    checkpoint = save(tmp_path, mixed)
    model = Model(torch.bfloat16)
    load(checkpoint, model.slots)
    assert model.loaded == len(other)
    check_as_by_tensor(checkpoint, model, torch.bfloat16)


def test_a_matrix_at_an_odd_byte_is_packed(tmp_path):
    values = torch.randn(5, 40).bfloat16()
    header = b'{"a": {"dtype": "BF16", "shape": [5, 40], "data_offsets": [0, 400]}}'
    header += b" " * (1 - len(header) % 2)
    data = len(header).to_bytes(8, "little") + header + values.view(torch.uint8).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    packed = moecore.PackedWeights("bfloat16", 1, 5, 40, False)
    slot = WeightSlot(((Source("a", (5, 40)),),), pytest.fail, packing=Packing(packed, 0))
    load(Checkpoint.open(tmp_path), [slot])
    x = torch.randn(3, 40).bfloat16()
    assert torch.equal(moecore.ops.linear(x, packed), moecore.ops.linear(x, values))


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"x"])
def test_a_file_that_changes_before_it_is_packed_is_named(checkpoint, change):
    path = checkpoint.folder / "b.safetensors"
    path.write_bytes(change(path.read_bytes()))
    files = os.listdir("/proc/self/fd")
    with pytest.raises(moecore.FormatError, match=r"data in .*b.safetensors: .* changed since"):
        load(checkpoint, Model(torch.bfloat16).slots)
    assert len(os.listdir("/proc/self/fd")) == len(files)


def test_a_file_that_is_cut_while_it_is_packed_is_named(checkpoint):
    """With its tensor, and how much of it was there."""
    weights = moecore.PackedWeights("bfloat16", E, 2 * N, K, True)
    other = moecore.PackedWeights("bfloat16", E, N, K, False)
    packings = [
        (other, 1, [checkpoint.part(GATES[0])]),
        (weights, 4, [checkpoint.part(GATES[4]), checkpoint.part(UPS[4])]),
    ]
    info = checkpoint.info(UPS[4])
    path = checkpoint.folder / info.file
    files = os.listdir("/proc/self/fd")
    with checkpoint.reader() as reader:
        reader.pack(packings, 1)
        os.truncate(path, info.offset + 11)
        text = f"{UPS[4]} in {path}: expected {info.nbytes} bytes from {info.offset}, found 11"
        with pytest.raises(moecore.FormatError, match=f"^{re.escape(text)}$"):
            reader.pack(packings, 1)
    assert len(os.listdir("/proc/self/fd")) == len(files)


def test_an_error_of_the_disk_names_tensor_and_file(checkpoint, monkeypatch):
    """Here of a directory, which cannot be read either."""
    weights = moecore.PackedWeights("bfloat16", E, N, K, False)
    info = checkpoint.info(FUSED)
    descriptor = os.open(checkpoint.folder, os.O_RDONLY)
    try:
        with checkpoint.reader() as reader:
            monkeypatch.setattr(reader, "_file", lambda file: descriptor)
            with pytest.raises(OSError, match=re.escape(FUSED)) as caught:
                reader.pack([(weights, 2, [checkpoint.part(FUSED, 2)])], 1)
    finally:
        os.close(descriptor)
    assert caught.value.errno == errno.EISDIR
    assert caught.value.filename == str(checkpoint.folder / info.file)
    size = info.nbytes // E
    assert f"expected {size} bytes from {info.offset + 2 * size}, found 0" in str(caught.value)


def test_a_packing_that_does_not_fit_is_an_error(tmp_path):
    save_file({"a": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for dtype, n, k_dim, text in (
        ("float32", 5, 4, "must have 5 rows together, got"),
        ("float32", 6, 5, "must have k_dim 5, got 4"),
        ("bfloat16", 6, 4, "a must be bfloat16, as the packed weights, got F32"),
    ):
        weights = moecore.PackedWeights(dtype, 1, n, k_dim, False)
        slot = WeightSlot(((Source("a", (6, 4)),),), pytest.fail, packing=Packing(weights, 0))
        with pytest.raises(ValueError, match=text):
            load(checkpoint, [slot], torch.float32)
