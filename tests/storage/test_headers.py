"""Headers of safetensors files: what cannot be is refused before it is read by."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from qsvft.checkpoint.source.checkpoint import open_checkpoint
from qsvft.storage import headers
from qsvft.storage.headers import read_shard

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path / "model.safetensors"


def write(path, header, data=b""):
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"short",
        b"not a safetensors file at all",
        bytes(8),
        (2**63).to_bytes(8, "little") + b"{}",
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b" {",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_what_is_no_safetensors_file_is_refused(path, raw):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file: found"):
        read_shard(path)


@pytest.mark.parametrize("text", ["{", "{]", '{"a": }', '{"a":' * 50_000])
def test_a_header_that_is_no_json_is_refused(path, text):
    write(path, text)
    with pytest.raises(ValueError, match=r"the header of .*model\.safetensors: found \d+ bytes that are no valid JSON"):
        read_shard(path)


def test_every_truncation_is_refused(path):
    whole = save({"a": torch.randn(3, 2), "b": torch.randn(5)})
    path.write_bytes(whole)
    assert set(read_shard(path)[1]) == {"a", "b"}
    for length in range(len(whole)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_shard(path)
        path.write_bytes(whole)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=r"found \d+ bytes; expected \d+, as its header says"):
        read_shard(path)


def test_a_name_given_twice_is_refused(path):
    one = json.dumps(ONE)
    write(path, f'{{"a": {one}, "b": {json.dumps(ONE | {"data_offsets": [8, 16]})}, "a": {one}}}', bytes(16))
    with pytest.raises(ValueError, match=r"model\.safetensors.*the name 'a' is given twice"):
        read_shard(path)
    write(path, '{"a": {"dtype": "F32", "shape": [2], "shape": [1, 2], "data_offsets": [0, 8]}}', bytes(8))
    with pytest.raises(ValueError, match="the name 'shape' is given twice"):
        read_shard(path)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [3]},
        {"shape": [-2]},
        {"shape": [-1, -2]},
        {"shape": [2.0]},
        {"shape": [True, 2]},
        {"shape": "2"},
        {"shape": None},
        {"shape": [2**64]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"shape": [0, 2**63], "data_offsets": [0, 0]},
        {"shape": [2] + [1] * 64},
        {"data_offsets": [0, 9]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [-8, 0]},
        {"data_offsets": [8, 16]},
        {"data_offsets": [1, 9]},
        {"data_offsets": [0, 8, 8]},
        {"data_offsets": 8},
        {"data_offsets": [2**70, 2**70 + 8]},
    ],
)
def test_an_impossible_entry_is_refused(path, change):
    write(path, {"a": ONE | change}, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file: found (8|'a'|\d+ bytes)"):
        read_shard(path)


def test_tensors_that_overlap_or_leave_a_hole_are_refused(path):
    for offsets in ([4, 12], [0, 8], [12, 20]):
        write(path, {"a": ONE, "b": ONE | {"data_offsets": offsets}}, bytes(20))
        with pytest.raises(
            ValueError, match=r"found 'b' at byte \d+; expected byte \d+, where the tensor before it ends"
        ):
            read_shard(path)


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "Q4_0", "", None, 3, ["F32"]])
def test_a_dtype_that_torch_lacks_is_refused(path, kind):
    write(path, {"a": ONE | {"dtype": kind}}, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: found 'a' of dtype .* expected one of BOOL, U8"):
        read_shard(path)


@pytest.mark.parametrize("value", [None, 3, [], "F32"])
def test_an_entry_that_is_no_object_is_refused(path, value):
    write(path, {"a": value}, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: found 'a' of dtype None"):
        read_shard(path)


@pytest.mark.parametrize("metadata", [{"format": "tf"}, {"format": "flax"}, {"format": ["pt"]}, "pt2", None, 3])
def test_tensors_of_another_framework_are_refused(path, metadata):
    write(path, {"__metadata__": metadata, "a": ONE}, bytes(8))
    with pytest.raises(ValueError, match=r"model\.safetensors: found tensors of format"):
        read_shard(path)


def test_a_header_may_be_so_long_and_no_longer(path, monkeypatch):
    write(path, {"a": ONE}, bytes(8))
    length = len(json.dumps({"a": ONE}))
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", length)
    assert set(read_shard(path)[1]) == {"a"}
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", length - 1)
    with pytest.raises(ValueError, match=rf"found a header of {length} bytes; expected at most {length - 1}"):
        read_shard(path)


def test_a_file_without_tensors_is_refused(path):
    write(path, {"__metadata__": {"format": "pt"}})
    with pytest.raises(ValueError, match=r"model\.safetensors: found no tensors"):
        open_checkpoint(path.parent)


WHOLE = save({"a": torch.arange(6.0).reshape(3, 2), "b": torch.arange(5), "c": torch.ones(())}, {"format": "pt"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40)
)
def test_a_damaged_file_is_refused_or_read_within_its_bounds(path, changes, cut):
    raw = bytearray(WHOLE)
    for position, value in changes:
        raw[position] = value
    path.write_bytes(raw[: len(raw) - cut] if cut < 8 else raw)
    try:
        checkpoint = open_checkpoint(path.parent)
    except ValueError as error:
        if "model.safetensors" in str(error):
            return
        raise
    total = 0
    for key, entry in checkpoint.entries.items():
        tensor = checkpoint.read(key)
        assert tensor.shape == entry.shape and tensor.dtype == entry.dtype
        total += tensor.numel() * tensor.element_size()
    assert total < path.stat().st_size
