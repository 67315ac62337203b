"""A reader of prepared directories in numpy alone, by docs/prepared-format.md, finds what the library holds."""

import json

import numpy
import pytest
import torch
from small_models import load
from transformers import AutoModelForCausalLM

import qsvft
from qsvft.storage.weights import dense_weight

DTYPES = {"U8": numpy.uint8, "I8": numpy.int8, "F32": numpy.float32, "BF16": numpy.uint16}


def read(folder):
    """Every tensor of a directory; bf16 as fp32."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        content = (folder / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        for name, entry in header.items():
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            values = numpy.frombuffer(content[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = widened(values) if entry["dtype"] == "BF16" else values
    assert tensors.keys() == index["weight_map"].keys()
    return tensors


def widened(bf16):
    return (bf16.astype(numpy.uint32) << 16).view(numpy.float32)


def rounded(values):
    """fp32 to the nearest bf16, ties to even, as fp32."""
    bits = numpy.ascontiguousarray(values, numpy.float32).view(numpy.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(numpy.float32)


def codes(packed):
    """Two codes a byte, the first in the upper four bits."""
    return numpy.stack([packed >> 4, packed & 15], -1).reshape(*packed.shape[:-1], -1)


def nf4_weight(tensors, name):
    part = {leaf: tensors[f"{name}.{leaf}"] for leaf in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")}
    state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    blocks = numpy.arange(part["absmax"].size)
    absmax = part["nested_quant_map"][part["absmax"]] * part["nested_absmax"][blocks // state["nested_blocksize"]]
    absmax = absmax + numpy.float32(state["nested_offset"])
    found = codes(tensors[name].reshape(-1)).reshape(-1, state["blocksize"])
    values = (part["quant_map"][found] * absmax[:, None]).reshape(state["shape"])
    return rounded(values) if state["dtype"] == "bfloat16" else values


def basis(tensors, name, size, quant_map):
    """A stored basis, dense."""
    if f"{name}.values" in tensors:
        return tensors[f"{name}.values"]
    found, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"]
    if found.dtype == numpy.int8:
        return rounded(found * numpy.repeat(scales, 64, axis=1))[:, :size]
    absmax = tensors[f"{name}.maxima"].astype(numpy.float32) * rounded(scales / numpy.float32(255))
    return rounded(quant_map[codes(found)] * numpy.repeat(absmax, 128, axis=1))[:, :size]


ONE_SIDED = [{"factor_bits": bits, "sides": "one"} for bits in (16, 8, 4)]
FORMS = [*ONE_SIDED, *({"factor_bits": bits} for bits in (16, 8, 4))]


@pytest.fixture(scope="module", params=FORMS, ids=str)
def directory(request, llama, tmp_path_factory):
    """A prepared llama, and what numpy reads of it."""
    folder = tmp_path_factory.mktemp("format") / "prepared"
    qsvft.prepare_checkpoint(llama, folder, dtype="bfloat16", progress=False, **request.param)
    return folder, read(folder)


@pytest.mark.anywhere
def test_weights(directory):
    folder, tensors = directory
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        held = dense_weight(model.get_submodule(name)).float().numpy()
        assert numpy.array_equal(nf4_weight(tensors, f"{name}.weight"), held)


@pytest.mark.anywhere
def test_int8_weights(llama, tmp_path):
    folder = qsvft.prepare_checkpoint(llama, tmp_path / "prepared", 8, progress=False)
    tensors, name = read(folder), "model.layers.0.mlp.up_proj"
    held = dense_weight(AutoModelForCausalLM.from_pretrained(folder).get_submodule(name)).numpy()
    found = tensors[f"{name}.weight"] * (tensors[f"{name}.SCB"] / numpy.float32(127))[:, None]
    assert numpy.allclose(found, held, rtol=1e-6)


def stored_bases(tensors):
    """(layer, key, rows) of each basis; layers as they stand in the names."""
    for name, values in sorted(tensors.items()):
        start, _, part = name.rpartition(".")
        if start.startswith("qsvft.") and part in ("values", "codes"):
            _, layer, key = start.split(".")
            yield layer, key, values.shape[0]


@pytest.mark.anywhere
@pytest.mark.parametrize("directory", ONE_SIDED, indirect=True, ids=str)
def test_factors_and_their_lengths(directory, llama):
    _, tensors = directory
    model = qsvft.quantize(load(llama), progress=False)
    quant_map = tensors["model.layers.0.mlp.up_proj.weight.quant_map"]
    stored = list(stored_bases(tensors))
    assert len(stored) == 14
    for layer, key, _ in stored:
        W = dense_weight(model.get_submodule(layer.replace("/", "."))).double().numpy()
        W = W if key[0] == "V" else W.T
        rows = basis(tensors, f"qsvft.{layer}.{key}", W.shape[1], quant_map).astype(numpy.float64)
        s, rms = (tensors[f"qsvft.{layer}.{key}.{part}"] for part in ("s", "rms"))
        assert numpy.allclose(s, numpy.linalg.norm(W @ rows.T, axis=0), rtol=1e-6)
        assert numpy.allclose(rms, numpy.linalg.norm(W) / W.shape[1] ** 0.5, rtol=1e-6)


@pytest.mark.anywhere
def test_the_library_reads_the_same_entries(directory, llama):
    folder, tensors = directory
    files = AutoModelForCausalLM.from_pretrained(folder).qsvft_factors
    quant_map = tensors["model.layers.0.mlp.up_proj.weight.quant_map"]
    shapes = {name: weight.shape for name, weight in load(llama).named_parameters()}
    for layer, key, rank in stored_bases(tensors):
        name = layer.replace("/", ".")
        size = shapes[f"{name}.weight"][key[0] == "V"]
        held = files.basis(name, key, rank, size, torch.device("cpu")).dense(torch.float32)
        assert numpy.array_equal(basis(tensors, f"qsvft.{layer}.{key}", size, quant_map), held.numpy())


@pytest.mark.anywhere
def test_both_sides_are_singular_vectors_of_the_weight_as_held(llama, tmp_path):
    options = {"dtype": "bfloat16", "factor_bits": 16, "progress": False}
    tensors = read(qsvft.prepare_checkpoint(llama, tmp_path / "prepared", **options))
    model = qsvft.quantize(load(llama), progress=False)
    layers = {layer for layer, _, _ in stored_bases(tensors)}
    assert len(layers) == 14
    for layer in layers:
        W = dense_weight(model.get_submodule(layer.replace("/", "."))).double().numpy()
        U, V = (tensors[f"qsvft.{layer}.{side}_bf16.values"].astype(numpy.float64) for side in "UV")
        s = numpy.linalg.svd(W, compute_uv=False)
        assert numpy.allclose(U @ W @ V.T, numpy.diag(s), atol=0.02 * s[0])
