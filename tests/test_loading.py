"""load_weights and dummy_weights: what arrives, in which order, through how much memory."""

import subprocess
import sys
import textwrap
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file

import moecore
from moecore import loading, weight_stream
from moecore.checkpoint import Checkpoint, Reader
from moecore.loading import Source, WeightSlot, dummy_weights, load_weights
from weight_slots import E, K, Model, N, make_tensors, save


@pytest.fixture
def tensors():
    return make_tensors()


@pytest.fixture
def checkpoint(tmp_path, tensors):
    """Two shards: gate and up of expert 3 are on different sides of the cut."""
    return save(tmp_path, tensors)


def check_values(model, tensors, dtype=torch.bfloat16):
    want = {
        f"gate_up.{expert}": [
            tensors[f"layers.0.experts.{expert}.{part}.weight"] for part in ("gate", "up")
        ]
        for expert in range(E)
    }
    fused = tensors["layers.0.experts.fused"]
    want |= {f"layers.0.experts.fused[{expert}]": [fused[expert]] for expert in range(E)}
    want |= {name: [tensors[name]] for name in ("norm.weight", "embed.weight")}
    assert model.got.keys() == want.keys()
    for key, parts in want.items():
        for got, part in zip(model.got[key], parts, strict=True):
            assert got.dtype == dtype, key
            assert torch.equal(got, part.to(dtype)), key


@pytest.mark.parametrize("mapped_bytes", [None, 3 * 1024, 512, 1], ids=lambda n: f"mapped-{n}")
@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_every_slot_gets_its_tensors(checkpoint, tensors, monkeypatch, num_threads, mapped_bytes):
    if mapped_bytes is not None:  # so small that some slots, or all, are loaded alone
        monkeypatch.setattr(weight_stream, "_MAPPED_BYTES", mapped_bytes)
    model, bar = Model(tensors), MagicMock()
    monkeypatch.setattr(loading, "tqdm", bar)
    report = load_weights(
        checkpoint, model.slots, dtype=torch.bfloat16, num_threads=num_threads, progress=False
    )
    check_values(model, tensors)
    assert report.bytes == sum(tensor.nbytes for tensor in tensors.values())
    shown = bar.return_value.__enter__.return_value.update.call_args_list
    assert sum(call.args[0] for call in shown) == report.bytes
    assert report.seconds > 0


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floats_become_the_dtype_asked_for(tmp_path, tensors, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    model = Model(tensors)
    load_weights(save(tmp_path, tensors), model.slots, dtype=dtype, progress=False)
    check_values(model, tensors, dtype)


def test_a_slot_may_have_a_dtype_of_its_own(tmp_path):
    tensors = {"bias": torch.tensor([1.0 + 2**-20]), "table": torch.arange(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    model = Model(make_tensors())
    slots = [
        model.slot(Source("bias", (1,)), dtype=torch.float32),
        model.slot(Source("table", (5,)), dtype=torch.int64),
    ]
    load_weights(Checkpoint.open(tmp_path), slots, dtype=torch.bfloat16, progress=False)
    assert torch.equal(model.got["bias"][0], tensors["bias"])
    assert torch.equal(model.got["table"][0], tensors["table"])


def test_a_file_whose_data_begins_at_an_odd_byte_is_read(tmp_path):
    header = b'{"a": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}}'
    header += b" " * (1 - len(header) % 2)
    values = torch.arange(5).bfloat16()
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        len(header).to_bytes(8, "little") + header + values.view(torch.uint8).numpy().tobytes()
    )
    got = []
    slot = WeightSlot(
        ((Source("a", (5,)),),), lambda x: got.append((x.clone(), x.data_ptr() % x.element_size()))
    )
    load_weights(Checkpoint.open(tmp_path), [slot], dtype=torch.bfloat16, progress=False)
    assert torch.equal(got[0][0], values)
    assert got[0][1] == 0


def test_slots_load_in_the_order_of_the_files(checkpoint, tensors):
    model = Model(tensors)
    load_weights(checkpoint, model.slots, dtype=torch.bfloat16, num_threads=1, progress=False)
    places = [
        (checkpoint.names.index(slot.alternatives[0][0].name), slot.alternatives[0][0].expert or 0)
        for slot in model.slots
    ]
    keys = [f"gate_up.{expert}" for expert in range(E)]
    keys += [f"layers.0.experts.fused[{expert}]" for expert in reversed(range(E))]
    keys += ["norm.weight", "embed.weight"]
    assert model.order == [key for _, key in sorted(zip(places, keys, strict=True))]


def test_the_first_alternative_that_is_there_is_used(checkpoint):
    got = []
    alternatives = (
        (Source("no.gate", (N, K)), Source("no.up", (N, K))),
        (Source("norm.weight", (K,)), Source("no.bias", (K,))),  # half of it is no alternative
        (Source("embed.weight", (50, K)),),
        (Source("norm.weight", (K,)),),
    )
    slots = [WeightSlot(alternatives, lambda *parts: got.extend(p.shape for p in parts))]
    load_weights(checkpoint, slots, dtype=torch.bfloat16, ignore=["layers"], progress=False)
    assert got == [(50, K)]


def test_several_slots_may_read_one_tensor(checkpoint, tensors):
    model = Model(tensors)
    slots = [*model.slots, model.slot(Source("embed.weight", (50, K)), key="lm_head")]
    load_weights(checkpoint, slots, dtype=torch.bfloat16, progress=False)
    assert torch.equal(model.got["lm_head"][0], tensors["embed.weight"])


def test_threads_of_torch_and_the_core_are_as_before(checkpoint, tensors):
    before = torch.get_num_threads(), moecore.num_threads()
    inside = []
    slots = Model(tensors).slots
    slots[-1] = WeightSlot(
        slots[-1].alternatives,
        lambda _: inside.append((torch.get_num_threads(), moecore.num_threads())),
    )
    for chosen in (1, 3, 0):
        moecore.set_num_threads(chosen)
        load_weights(checkpoint, slots[-1:], dtype=torch.bfloat16, ignore=["."], progress=False)
        assert torch.get_num_threads() == before[0]
        assert moecore.num_threads() == (chosen or before[1])
        with ThreadPoolExecutor(1) as pool:  # a new thread asks torch what is set for all
            assert pool.submit(torch.get_num_threads).result() == before[0]
    assert inside == [(1, 1)] * 3


@pytest.mark.parametrize(("least", "alone"), [(None, False), (1, True)], ids=["small", "large"])
def test_a_slot_larger_than_its_share_has_all_threads(checkpoint, monkeypatch, least, alone):
    if least is not None:
        monkeypatch.setattr(weight_stream, "_LEAST_MAPPED_BYTES", least)
    inside = []
    slot = WeightSlot(
        ((Source("embed.weight", (50, K)),),), lambda _: inside.append(moecore.num_threads())
    )
    moecore.set_num_threads(3)
    try:
        load_weights(checkpoint, [slot], dtype=torch.bfloat16, ignore=["."], progress=False)
    finally:
        moecore.set_num_threads(0)
    assert inside == [3 if alone else 1]


def test_an_error_in_a_slot_stops_the_loading_and_is_raised(checkpoint, tensors):
    def fail(*_):
        raise RuntimeError("the slot of the embedding")

    slots = Model(tensors).slots
    slots[-1] = WeightSlot(slots[-1].alternatives, fail)
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="the slot of the embedding"):
        load_weights(checkpoint, slots, dtype=torch.bfloat16, progress=False)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"x"])
def test_a_file_that_changes_after_it_was_opened_is_named(checkpoint, tensors, change):
    path = checkpoint.folder / "b.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(moecore.FormatError, match=r"data in .*b.safetensors: .* changed since"):
        load_weights(checkpoint, Model(tensors).slots, dtype=torch.bfloat16, progress=False)


def test_packed_weights_hold_what_the_file_holds(tmp_path, tensors):
    """The product of weights packed while loading has the bits of the plain product."""
    packed = moecore.PackedWeights("bfloat16", E, N, K, False)
    slots = [
        WeightSlot(
            ((Source("layers.0.experts.fused", (E, N, K), expert=expert),),),
            lambda weight, expert=expert: packed.pack(expert, weight),
        )
        for expert in range(E)
    ]
    load_weights(save(tmp_path, tensors), slots, dtype=torch.bfloat16, ignore=["."], progress=False)
    x = torch.randn(E, K).bfloat16()
    offsets = torch.arange(E + 1)
    assert torch.equal(
        moecore.ops.grouped_gemm(x, packed, offsets),
        moecore.ops.grouped_gemm(x, tensors["layers.0.experts.fused"], offsets),
    )


@pytest.mark.parametrize(("num_threads", "limit"), [(1, 600), (2, 1500)])
def test_a_mapping_ends_with_its_share_of_the_limit_or_one_slot(
    checkpoint, tensors, monkeypatch, num_threads, limit
):
    monkeypatch.setattr(weight_stream, "_MAPPED_BYTES", limit)
    read = defaultdict(list)  # reader -> bytes of the tensors it gave

    def recording(method):
        def give(reader, *args):
            tensor = method(reader, *args)
            read[reader].append(tensor.nbytes)
            return tensor

        return give

    monkeypatch.setattr(Reader, "view", recording(Reader.view))
    monkeypatch.setattr(weight_stream, "_LEAST_MAPPED_BYTES", 1)
    slots = Model(tensors).slots
    load_weights(checkpoint, slots, dtype=torch.bfloat16, num_threads=num_threads, progress=False)
    assert sum(map(sum, read.values())) == sum(tensor.nbytes for tensor in tensors.values())
    pair = 2 * N * K * 2  # gate and up of an expert, of one slot
    assert all(
        sum(sizes) <= limit // num_threads or len(sizes) == 1 or sizes == [pair // 2] * 2
        for sizes in read.values()
    )
    assert len(read) < len(slots)


def test_small_slots_share_a_mapping(checkpoint, tensors, monkeypatch):
    opened = []
    reader = Checkpoint.reader
    monkeypatch.setattr(Checkpoint, "reader", lambda self: opened.append(1) or reader(self))
    load_weights(checkpoint, Model(tensors).slots, dtype=torch.bfloat16, progress=False)
    assert len(opened) == 1


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_memory_stays_at_the_weights_plus_a_tensor_and_200_mb(tmp_path, kind):
    """500 MB of experts and one tensor of 75 MB, in a process of its own: the high-water mark."""
    script = """
        import sys, torch, moecore
        from dataclasses import replace
        from safetensors.torch import save_file
        from moecore.checkpoint import Checkpoint
        from moecore.loading import Packing, Source, WeightSlot, load_weights
        folder, write, packs = sys.argv[1], sys.argv[2] == "write", sys.argv[3] == "packed"
        E, N, K, V = 80, 1024, 3072, 12288
        if write:
            for part in range(2):
                save_file(
                    {f"{part}.experts": torch.ones(E // 2, N, K, dtype=torch.bfloat16),
                     **({"embed": torch.ones(V, K, dtype=torch.bfloat16)} if part else {})},
                    f"{folder}/{part}.safetensors")
            names = {"0.experts": "0.safetensors", "1.experts": "1.safetensors",
                     "embed": "1.safetensors"}
            text = str({"weight_map": names}).replace("'", '"')
            open(f"{folder}/model.safetensors.index.json", "w").write(text)
            sys.exit()
        def peak():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))
        experts = torch.empty(E, N, K, dtype=torch.bfloat16)
        embed = torch.empty(V, K, dtype=torch.bfloat16)
        shape = (E // 2, N, K)
        slots = [WeightSlot(((Source(f"{i // (E // 2)}.experts", shape, i % (E // 2)),),),
                            experts[i].copy_) for i in range(E)]
        slots.append(WeightSlot(((Source("embed", (V, K)),),), embed.copy_))
        packed = moecore.PackedWeights("bfloat16", E, N, K, False)
        if packs:
            slots[:E] = [replace(slots[i], packing=Packing(packed, i)) for i in range(E)]
        before = peak()
        load_weights(Checkpoint.open(folder), slots, dtype=torch.bfloat16, progress=False)
        assert packs or experts.sum(dim=(1, 2)).eq(N * K).all()
        assert embed.min() == 1
        print(peak() - before - experts.nbytes - embed.nbytes, embed.nbytes)
    """
    for mode in ("write", "load"):
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), mode, kind],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()  # pytest keeps the folder
    excess, tensor = map(int, result.stdout.split())
    assert excess <= tensor + 200e6


def dummies(slots_of, dtype=torch.bfloat16, seed=3):
    model = Model(make_tensors())
    dummy_weights(slots_of(model), dtype=dtype, seed=seed)
    return model.got


def test_dummy_weights_are_small_and_normal():
    source = Source("w", (3000, 2000))
    [[values]] = dummies(lambda model: [model.slot(source)], dtype=torch.float32).values()
    assert values.shape == (3000, 2000)
    assert values.mean().abs() < 1e-4
    assert values.std().sub(0.02).abs() < 3e-5
    # The table of values is shorter than the tensor; no row repeats for that.
    assert values[:, 0].unique().numel() > 2900
    assert torch.equal(values.flatten()[:1000], values.flatten()[loading._DUMMY_VALUES :][:1000])


def test_dummy_weights_depend_on_seed_name_and_expert_only():
    whole = dummies(lambda model: model.slots)
    rank = dummies(lambda model: list(reversed(model.slots))[2:5])
    assert len(rank) == 3
    for key, parts in rank.items():
        assert [part.shape for part in parts] == [(N, K)]
        assert torch.equal(parts[0], whole[key][0]), key
    other = dummies(lambda model: model.slots, seed=4)
    flat = [
        part.flatten()[:8].tolist() for got in (whole, other) for p in got.values() for part in p
    ]
    assert len({tuple(values) for values in flat}) == len(flat)


def test_dummy_integers_are_zero():
    [[values]] = dummies(lambda m: [m.slot(Source("t", (9,)), dtype=torch.int64)]).values()
    assert torch.equal(values, torch.zeros(9, dtype=torch.int64))
