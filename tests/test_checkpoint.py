"""Checkpoint: what it reads from safetensors files, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import save_file

import moecore
from moecore.checkpoint import DTYPES, Checkpoint

TENSORS = {
    "embed": torch.arange(12, dtype=torch.float32).view(3, 4),
    "experts": torch.arange(24).view(4, 2, 3).bfloat16(),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 5),
}


def write_raw(path, header, data=b"", length=None):
    """A safetensors file of any header: a dict, or the bytes in its place."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(begin, end, shape=(4,), dtype="U8"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write_shards(folder, weight_map=None):
    """Two shards, and an index that is right unless `weight_map` replaces it."""
    names = list(TENSORS)
    files = {"one.safetensors": names[:2], "two.safetensors": names[2:]}
    for file, part in files.items():
        save_file({name: TENSORS[name] for name in part}, folder / file)
    right = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {}, "weight_map": right if weight_map is None else weight_map(right)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_single(folder):
    save_file(TENSORS, folder / "model.safetensors")


def write_lone(folder):
    save_file(TENSORS, folder / "weights.safetensors")


@pytest.mark.parametrize("write", [write_single, write_lone, write_shards])
def test_every_tensor_is_found_with_its_values(tmp_path, write):
    write(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        info = checkpoint.info(name)
        assert (info.name, info.shape) == (name, tuple(tensor.shape))
        assert info.nbytes == tensor.nbytes
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.info("experts").dtype == "BF16"
    for expert, matrix in enumerate(TENSORS["experts"]):
        assert torch.equal(checkpoint.expert("experts", expert), matrix)


def test_names_come_in_the_order_of_files_and_offsets(tmp_path):
    write_raw(tmp_path / "model.safetensors", {"b": entry(4, 8), "a": entry(0, 4)}, b"\0" * 8)
    assert Checkpoint.open(tmp_path).names == ["a", "b"]


def test_a_single_file_wins_over_an_index(tmp_path):
    write_shards(tmp_path)
    save_file({"only": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).names == ["only"]


def test_files_that_no_index_names_are_not_read(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "stray.safetensors").write_bytes(b"no header")
    assert len(Checkpoint.open(tmp_path).names) == len(TENSORS)


def test_metadata_is_no_tensor(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert Checkpoint.open(tmp_path).names == ["a"]


def test_an_unknown_name_is_a_key_error_with_the_folder(tmp_path):
    write_single(tmp_path)
    with pytest.raises(KeyError, match=rf"no tensor nope in {tmp_path}"):
        Checkpoint.open(tmp_path).info("nope")


@pytest.mark.parametrize(("name", "index"), [("experts", 4), ("experts", -1), ("scalar", 0)])
def test_an_expert_out_of_range_is_named(tmp_path, name, index):
    write_single(tmp_path)
    with pytest.raises(ValueError, match=rf"index must be in \[0, .*{name}.* got {index}"):
        Checkpoint.open(tmp_path).expert(name, index)


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_every_dtype_is_read_as_safetensors_writes_it(tmp_path, dtype):
    odd = torch.arange(3, dtype=torch.uint8)  # what follows it is not aligned
    tensor = torch.arange(6).view(2, 3).to(dtype)
    empty = torch.empty(0, 4, dtype=dtype)
    save_file({"a": odd, "b": tensor, "c": empty}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    for name, want in {"b": tensor, "c": empty}.items():
        got = checkpoint.tensor(name)
        assert (got.dtype, got.shape) == (dtype, want.shape)
        assert torch.equal(got.clone().view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(
        checkpoint.expert("b", 1).clone().view(torch.uint8), tensor[1].view(torch.uint8)
    )


def test_a_dtype_without_a_view_is_refused_with_those_that_have_one(tmp_path):
    header = {"w": entry(0, 8, (1,), "C64")}
    write_raw(tmp_path / "model.safetensors", header, b"12345678")
    with pytest.raises(moecore.FormatError, match="w in model.safetensors: .*BF16.*, found C64"):
        Checkpoint.open(tmp_path).tensor("w")


# header, data, and what the message must say
BAD_FILES = {
    "offsets-past-the-end": (
        {"a": entry(0, 4), "b": entry(4, 8)},
        b"\0" * 6,
        r"b in .* found a file of \d+ bytes",
    ),
    "overlap": (
        {"a": entry(0, 4), "b": entry(2, 6)},
        b"\0" * 6,
        r"b in .*model.safetensors: expected its first byte at \d+, where a ends, found .*overlap",
    ),
    "gap": ({"a": entry(0, 4), "b": entry(6, 10)}, b"\0" * 10, r"b in .* found \d+ \(gap\)"),
    "bytes-after-the-data": ({"a": entry(0, 4)}, b"\0" * 9, r"data in .* where a ends, found"),
    "unknown-dtype": (
        {"a": entry(0, 4, dtype="Q4_K")},
        b"\0" * 4,
        "a in .*expected a dtype among .*BF16.* found 'Q4_K'",
    ),
    "shape-of-other-size": (
        {"a": entry(0, 4, shape=(2, 3))},
        b"\0" * 4,
        r"a in .*expected 6 bytes for U8 of shape \[2, 3\], found data_offsets \[0, 4\], 4 bytes",
    ),
    "reversed-offsets": ({"a": entry(4, 0)}, b"\0" * 4, "a in .*found data_offsets"),
    "negative-offset": ({"a": entry(-4, 0)}, b"\0" * 4, "a in .*expected dtype, shape and two"),
    "negative-size": ({"a": entry(0, 4, shape=(-2, -2))}, b"\0" * 4, "a in .*expected dtype"),
    "boolean-size": ({"a": entry(0, 4, shape=(True, 4))}, b"\0" * 4, "a in .*expected dtype"),
    "three-offsets": (
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}},
        b"\0" * 4,
        "a in .*two data_offsets",
    ),
    "shape-is-an-object": ({"a": {**entry(0, 1), "shape": {}}}, b"\0", "a in .*expected dtype"),
    "no-shape": (
        {"a": {"dtype": "U8", "data_offsets": [0, 4]}},
        b"\0" * 4,
        "a in .*expected dtype",
    ),
    "entry-is-no-object": ({"a": 3}, b"", "a in .*expected dtype, shape and two data_offsets"),
    "dtype-is-a-list": ({"a": entry(0, 4, dtype=["U8"])}, b"\0" * 4, "a in .*expected dtype"),
    "half-a-byte": ({"a": entry(0, 2, shape=(3,), dtype="F4")}, b"\0\0", "expected 1.5 bytes"),
    "not-json": (b"{'a': 1}", b"", "header in .*expected a JSON object"),
    "not-utf-8": (b'{"\xff": 1}', b"", "header in .*expected a JSON object"),
    "a-list": (b"[]", b"", "header in .*expected a JSON object, found a list"),
    "deep-nesting": (b"[" * 200_000, b"", "header in .*expected a JSON object"),
    "a-name-twice": (
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}, "a": {}}',
        b"",
        "header in .*found the key a twice",
    ),
}


@pytest.mark.parametrize(("header", "data", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_lying_header_names_tensor_file_expected_and_found(tmp_path, header, data, message):
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(moecore.FormatError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("length", [3, 2**40, 2**64 - 1, 100_000_001])
def test_a_header_length_that_does_not_fit_is_refused(tmp_path, length):
    write_raw(tmp_path / "model.safetensors", {"a": entry(0, 4)}, b"\0" * 4, length=length)
    with pytest.raises(moecore.FormatError, match=r"header in .*model.safetensors: expected"):
        Checkpoint.open(tmp_path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_single(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(moecore.FormatError, match=r"model.safetensors: expected .* found"):
            Checkpoint.open(tmp_path)


BAD_INDEXES = {
    "missing-file": (
        lambda right: {**right, "scalar": "three.safetensors"},
        r"scalar in .*index.json: expected it in three.safetensors, found no such file",
    ),
    "missing-tensor": (
        lambda right: {**right, "ghost": "one.safetensors"},
        r"ghost in one.safetensors: expected the tensor, .* found no such tensor",
    ),
    "wrong-file": (
        lambda right: {**right, "embed": "two.safetensors"},
        r"embed in two.safetensors: expected the tensor, .* found it in one.safetensors",
    ),
    "outside-the-folder": (
        lambda right: {**right, "embed": "../one.safetensors"},
        r"embed in .*expected the name of a .* file in the same folder, found '../one.safetensors'",
    ),
    "absolute": (lambda right: {"embed": "/etc/passwd"}, "embed in .*found '/etc/passwd'"),
    "parent": (lambda right: {"embed": ".."}, "embed in .*found '..'"),
    "a-number": (lambda right: {"embed": 3}, "embed in .*found 3"),
    "a-list": (lambda right: [], "index in .*expected JSON with an object weight_map"),
}


@pytest.mark.parametrize(("change", "message"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_lies_is_refused(tmp_path, change, message):
    write_shards(tmp_path, change)
    with pytest.raises(moecore.FormatError, match=message):
        Checkpoint.open(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(moecore.FormatError, match="index in .*expected JSON"):
        Checkpoint.open(tmp_path)


def test_a_tensor_in_two_files_names_both(tmp_path):
    write_shards(tmp_path)
    save_file(
        {name: TENSORS[name] for name in ("embed", "scalar", "empty")}, tmp_path / "two.safetensors"
    )
    with pytest.raises(moecore.FormatError, match="embed in two.safetensors: .*in one.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("files", [[], ["a.safetensors", "b.safetensors"], ["pytorch_model.bin"]])
def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path, files):
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=rf"folder must hold .* got {tmp_path}") as caught:
        Checkpoint.open(tmp_path)
    assert ("pickled" in str(caught.value)) == ("pytorch_model.bin" in files)
