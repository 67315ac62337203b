"""A written file is safetensors to every reader, and its tensors lie where they can be computed with."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import same_tensors

from qsvft.storage.headers import read_shard
from qsvft.storage.tensor_files import TensorFiles
from qsvft.storage.tensor_writer import DTYPES, write_tensors


def filled(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    return (torch.arange(nbytes) % 2).to(torch.uint8).view(dtype).view(shape)


def extents(path):
    """(begin in the file, bytes, bytes of one number) of each tensor."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield 8 + length + begin, end - begin, DTYPES[entry["dtype"]].itemsize


tensor_sets = st.dictionaries(
    st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 9), max_size=3)),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(tensor_sets, st.text(max_size=70))
def test_any_reader_finds_what_was_written_and_every_number_in_its_place(tmp_path_factory, described, note):
    path = tmp_path_factory.mktemp("written") / "a.safetensors"
    tensors = {name: filled(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in described.items()}
    write_tensors(tensors, path, {"note": note})
    assert same_tensors(load_file(path), tensors)
    with safe_open(path, framework="pt") as handle:
        assert handle.metadata() == {"note": note}
    _, entries = read_shard(path)
    assert entries.keys() == tensors.keys()
    for begin, nbytes, size in extents(path):
        assert begin % size == 0
        assert nbytes % 64 or begin % 64 == 0


def test_the_largest_divisor_comes_first_whatever_the_names(tmp_path):
    tensors = {"a": filled(torch.uint8, (3,)), "b": filled(torch.float32, (1,)), "c": filled(torch.float32, (16,))}
    write_tensors(tensors, tmp_path / "a.safetensors", {})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as handle:
        assert handle.offset_keys() == ["c", "b", "a"]


def test_what_is_read_of_it_is_mapped_at_a_multiple_of_64(tmp_path):
    tensors = {str(i): torch.randn(16 * (i + 1)) for i in range(5)} | {"single": torch.tensor(1.0)}
    write_tensors(tensors, tmp_path / "a.safetensors", {})
    files = TensorFiles.from_file(tmp_path / "a.safetensors")
    for name in tensors:
        assert files.read(name).data_ptr() == files.mapped(name).data_ptr()
        assert files.read(name).data_ptr() % 64 == 0


@pytest.mark.parametrize("turn", [lambda t: t, lambda t: t.requires_grad_()], ids=["plain", "trained"])
def test_parameters_are_written_by_their_values(tmp_path, turn):
    tensor = turn(torch.randn(4))
    write_tensors({"a": tensor}, tmp_path / "a.safetensors", {})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], tensor.detach())
