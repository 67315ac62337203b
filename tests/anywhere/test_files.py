"""Wherever a file has its tensors: what is read of it is the same, and lies where it can be computed with."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from placed import OFFSETS, place_data
from safetensors.torch import load_file, save_file
from small_models import coefficients, load, logits, randomize, same_tensors, state
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.storage.weights import HeldLinear, stored_tensors

pytestmark = pytest.mark.anywhere

ONE_SIDED = {"sides": "one", "pattern": "banded"}
FORMS = [
    {},
    ONE_SIDED,
    {"bits": 8, "rank": 12, **ONE_SIDED},
    {"bits": 16, "rank": 16},
    {"factor_bits": 4, **ONE_SIDED},
    {"factor_bits": 8, "pattern": "banded"},
    {"sides": "both", "residual": True, "rank": 24, "factor_bits": 4},
]
PLACES = pytest.mark.parametrize("offset", OFFSETS)


def prepared(source, target, **options):
    return qsvft.prepare_checkpoint(source, target, progress=False, **options)


def loaded(folder, **options):
    return qsvft.from_pretrained(folder, progress=False, **options)


def at(folder, offset, target):
    """A copy of a directory, as safetensors' own writer orders the tensors, whose data begin at an offset."""
    shutil.copytree(folder, target)
    for path in target.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
        place_data(path, offset)
    return target


def in_use(model):
    """Every tensor that a model computes with."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        if isinstance(module, HeldLinear) or isinstance(getattr(module, "weight", None), torch.Tensor):
            yield from stored_tensors(module)
        if (quantised := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            yield from (quantised.code, quantised.state2.code)


def in_place(tensors):
    return all(tensor.data_ptr() % 64 == 0 for tensor in tensors if tensor.element_size() > 1)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_prepared_directory_is_the_same_wherever_its_tensors_lie(llama, tmp_path, options):
    folder = prepared(llama, tmp_path / "prepared", **options)
    expected = randomize(loaded(folder))
    assert in_place(in_use(expected))
    for offset in OFFSETS:
        found = randomize(loaded(at(folder, offset, tmp_path / str(offset))))
        assert in_place(in_use(found)), offset
        assert same_tensors(state(found), state(expected)), offset
        assert torch.equal(logits(found), logits(expected)), offset


@PLACES
def test_a_checkpoint_gives_the_same_directory_wherever_its_tensors_lie(llama, tmp_path, offset):
    source = at(llama, offset, tmp_path / "source")
    residual = {"sides": "both", "residual": True, "rank": 24, "factor_bits": 4}
    for options in ({}, ONE_SIDED, {"bits": 16, "rank": 16}, residual):
        shutil.rmtree(tmp_path / "found", ignore_errors=True)
        shutil.rmtree(tmp_path / "expected", ignore_errors=True)
        found = prepared(source, tmp_path / "found", **options)
        expected = prepared(llama, tmp_path / "expected", **options)
        names = sorted(path.name for path in expected.glob("*.safetensors"))
        assert names == sorted(path.name for path in found.glob("*.safetensors"))
        assert all(same_tensors(load_file(found / name), load_file(expected / name)) for name in names)


@PLACES
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_model_in_memory_gives_the_same_adapter_wherever_its_weights_lie(llama, tmp_path, options, offset):
    source = at(llama, offset, tmp_path / "source")
    found, expected = (
        qsvft.prepare(load(folder, torch.float32), progress=False, **options) for folder in (source, llama)
    )
    assert same_tensors(state(found), state(expected))


@PLACES
@pytest.mark.parametrize("options", [{}, ONE_SIDED], ids=str)
def test_an_adapter_is_the_same_wherever_its_tensors_lie(llama, tmp_path, options, offset):
    folder = prepared(llama, tmp_path / "prepared", **options)
    model = randomize(loaded(folder, include_factors=True))
    model.save_pretrained(tmp_path / "adapter")
    moved = at(tmp_path / "adapter", offset, tmp_path / "moved")
    bases = {
        "with those of the directory": AutoModelForCausalLM.from_pretrained(folder),
        "with its own factors": qsvft.quantize(load(llama, torch.float32), progress=False),
    }
    for how, base in bases.items():
        for assigned in (False, True):
            again = PeftModel.from_pretrained(base, moved, low_cpu_mem_usage=assigned, adapter_name=f"a{assigned}")
            again.set_adapter(f"a{assigned}")
            held = [tensor for name, tensor in again.named_buffers() if ".qsvft_" in name]
            assert held and in_place([*held, *(p for p in again.parameters() if p.requires_grad)]), how
            assert torch.equal(logits(again), logits(model)), how
            values = coefficients(again, f"a{assigned}").values()
            assert all(torch.equal(a, b) for a, b in zip(values, coefficients(model).values(), strict=True)), how
            base = again.unload()


@PLACES
@pytest.mark.parametrize("options", [{}, ONE_SIDED], ids=str)
def test_a_directory_gives_its_factors_wherever_they_lie(llama, tmp_path, options, offset):
    folder = prepared(llama, tmp_path / "prepared", dtype="bfloat16", **options)
    model, expected = load(llama), load(llama)
    for one, directory in ((model, at(folder, offset, tmp_path / "moved")), (expected, folder)):
        qsvft.quantize(one, progress=False)
        qsvft.use_factors(one, directory)
    found, expected = (randomize(qsvft.prepare(one, progress=False, **options)) for one in (model, expected))
    assert in_place(tensor for name, tensor in found.named_buffers() if ".qsvft_" in name)
    assert same_tensors(state(found), state(expected))
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize(("offset", "odd"), [(56, False), (38, True)])
def test_in_memory_only_numbers_at_odd_addresses_are_moved(llama, tmp_path, offset, odd):
    """The others stay, so that M at zero computes what the base computed, bit for bit."""
    base = load(at(llama, offset, tmp_path / "moved"), torch.float32)
    before, expected = {id(p): p.data_ptr() for p in base.parameters()}, logits(base)
    assert any(place % 4 for place in before.values()) == odd
    model = qsvft.prepare(base, 16, rank=16, progress=False)
    after = {id(p): p.data_ptr() for p in model.parameters()}
    assert all(place % 4 == 0 for place in after.values())
    assert all(after[key] == place for key, place in before.items() if place % 4 == 0)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert odd or torch.equal(logits(model), expected)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_every_written_tensor_lies_at_a_multiple_of_64_or_of_its_own_divisor(llama, tmp_path, options):
    sizes = {"F32": 4, "BF16": 2, "U8": 1, "I8": 1}
    for path in prepared(llama, tmp_path / "prepared", dtype="bfloat16", **options).glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            assert (8 + length + begin) % sizes[entry["dtype"]] == 0, name
            assert (end - begin) % 64 or (8 + length + begin) % 64 == 0, name
