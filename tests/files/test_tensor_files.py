"""One refusal for every safetensors file that is missing or damaged, and indexes that stay in their folder."""

import json

import pytest
import torch
from safetensors.torch import load_file

from wandistiller.errors import UserError
from wandistiller.files.tensor_files import indexed_files, open_safetensors, read_header, write_tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
READERS = [read_header, open_safetensors]


@pytest.fixture
def file(tmp_path):
    write_tensors(tmp_path / "a.safetensors", TENSORS, {"made": "caf\udce9"})  # of a path that is no UTF-8
    return tmp_path / "a.safetensors"


def test_what_was_written_is_read_back(file):
    header, tensors = read_header(file), load_file(file)
    assert {name: (stored.shape, stored.dtype) for name, stored in header.tensors.items()} == {
        "a": ((2, 3), "F32"),
        "b": ((4,), "BF16"),
    }
    assert header.metadata == {"made": "caf?"}
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    with open_safetensors(file) as opened:
        assert torch.equal(opened.get_tensor("b"), TENSORS["b"])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_file_cut_short_is_refused_by_name_in_one_line(file, read, keep):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.safetensors: is not a whole safetensors file .*copy it again") as told:
        read(file)
    assert "\n" not in str(told.value)
    file.unlink()
    with pytest.raises(UserError, match=r"a\.safetensors: there is no such file"):
        read(file)


def write_index(folder, weight_map):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


def test_an_index_gives_its_shards_once_each_in_its_order(tmp_path, file):
    write_tensors(tmp_path / "0.safetensors", TENSORS)
    index = write_index(tmp_path, {"x": "a.safetensors", "y": "0.safetensors", "z": "a.safetensors"})
    assert indexed_files(index) == [tmp_path / "a.safetensors", tmp_path / "0.safetensors"]


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({}, "has no weight_map"),
        (["a.safetensors"], "has no weight_map"),
        ({"x": "a.safetensors", "y": "gone.safetensors"}, r"'gone\.safetensors', which is not there \(1 of 2"),
        ({"x": "../a.safetensors"}, r"'\.\./a\.safetensors', which lies outside its folder"),
        ({"x": "/a.safetensors", "y": "a.safetensors"}, "outside its folder"),
        ({"x": "b/../../a.safetensors"}, "outside its folder"),
        ({"x": "..\\a.safetensors"}, "outside its folder"),
        ({"x": "a.bin"}, "is no .safetensors file"),
        ({"x": None}, "names None, which lies outside its folder"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(file, weight_map, said):
    with pytest.raises(UserError, match=said):
        indexed_files(write_index(file.parent, weight_map))
