"""Factors by name in safetensors files: read as they were written, and refused by name where they are not."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from placed import place_data
from safetensors.torch import load_file, save_file
from stored_models import factors_in
from torch import Tensor

from qsvft.maths.updates import bounded_inverse
from qsvft.storage.factor_files import FactorFiles, factor_tensors, length_tensors, residual_tensors
from qsvft.storage.factor_names import FactorName, adapter_tensors, parse_name
from qsvft.storage.factors import StoredBasis, make_bases, measured_scale
from qsvft.storage.tensor_writer import write_tensors

LAYER, KEY, CPU = "model.layers.0.self_attn.o_proj", "V_x", torch.device("cpu")
BITS = pytest.mark.parametrize("bits", [16, 8, 4])
ROWS, COLUMNS = 40, 75  # no multiple of a block


def weight() -> Tensor:
    return torch.randn(90, COLUMNS, generator=torch.Generator().manual_seed(0))


def basis(bits: int, rank: int = ROWS) -> StoredBasis:
    return make_bases(weight(), rank, "one", bits)["V"]


def tensors(bits: int) -> dict[str, Tensor]:
    held = basis(bits)
    return factor_tensors(LAYER, KEY, held) | length_tensors(LAYER, KEY, *measured_scale(weight(), held, "V", ROWS))


def written(folder: Path, bits: int, prefix: str = "", **changes: Tensor | None) -> FactorFiles:
    """The factors in a file, some parts of them changed or left out."""
    named = tensors(bits)
    for part, tensor in changes.items():
        name = str(FactorName(LAYER, KEY, part))
        del named[name]
        if tensor is not None:
            named[name] = tensor
    save_file({prefix + name: tensor for name, tensor in named.items()}, folder / "model.safetensors")
    return factors_in(folder)


def read(files: FactorFiles, rank: int = ROWS, size: int = COLUMNS) -> StoredBasis | None:
    return files.basis(LAYER, KEY, rank, size, CPU)


def same_parts(left: StoredBasis, right: StoredBasis) -> bool:
    pairs = zip(left.stored.parts(), right.stored.parts(), strict=True)
    return left.stored.layout == right.stored.layout and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "model.", "a.qsvfty."])
@pytest.mark.parametrize("layer", [LAYER, "", "0", "h.0.mlp"])
def test_a_name_is_read_back_whatever_stands_before_it(prefix, layer):
    for part in ("values", "codes", "maxima", "scales", "s", "rms", "residual_s", "scale", "sketch"):
        name = FactorName(layer, "V_int8_randomized_64_original", part)
        assert parse_name(f"{prefix}{name}") == name


@pytest.mark.parametrize(
    "name",
    [
        *("model.layers.0.o_proj.weight", "model.layers.0.o_proj.qsvft_M.weight", "qsvft", "qsvft.", "qsvft.a.b"),
        *("qsvft.a.b.c", "qsvft.a.V_bf16.weight", "qsvft.a.b.V_bf16.values", "notqsvft.a.V_bf16.values"),
    ],
)
def test_another_name_is_no_factors(name):
    assert parse_name(name) is None


def test_names_are_those_of_the_format():
    assert set(tensors(4)) == {
        f"qsvft.model/layers/0/self_attn/o_proj.V_x.{part}" for part in ("codes", "maxima", "scales", "s", "rms")
    }
    assert set(tensors(16)) == {f"qsvft.model/layers/0/self_attn/o_proj.V_x.{part}" for part in ("values", "s", "rms")}


@BITS
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_a_basis_is_read_bit_for_bit(tmp_path, bits, prefix):
    files = written(tmp_path, bits, prefix)
    assert same_parts(read(files), basis(bits))
    assert files.keys() == [(LAYER, KEY)] and files.rank(LAYER, KEY) == ROWS


@BITS
@pytest.mark.parametrize("rank", [1, 17, ROWS])
def test_the_first_directions_are_those_of_the_longer_basis(tmp_path, bits, rank):
    found = read(written(tmp_path, bits), rank)
    assert torch.equal(found.dense(torch.float32), basis(bits).dense(torch.float32)[:rank])


@BITS
def test_what_is_not_stored_is_not_found(tmp_path, bits):
    files = written(tmp_path, bits)
    assert read(files, ROWS + 1) is None
    assert files.basis(LAYER, "U_x", 1, COLUMNS, CPU) is None and files.rank(LAYER, "U_x") == 0
    assert files.lengths(LAYER, KEY, ROWS + 1, CPU) is None and files.lengths("other", KEY, 1, CPU) is None
    assert files.scale("other", KEY, 1, CPU) is None


@pytest.mark.parametrize("rank", [1, 17, ROWS])
def test_lengths_and_the_scale_of_them_are_as_measured(tmp_path, rank):
    files, expected = written(tmp_path, 8), measured_scale(weight(), basis(8), "V", rank)
    s, rms = files.lengths(LAYER, KEY, rank, CPU)
    assert torch.equal(s, expected[0]) and torch.equal(rms, expected[1])
    assert torch.equal(files.scale(LAYER, KEY, rank, CPU), bounded_inverse(*expected))


def test_an_adapters_own_scale_is_taken_before_lengths(tmp_path):
    own = adapter_tensors(LAYER, KEY, torch.arange(8.0), torch.full((ROWS,), 3.0))
    save_file(tensors(8) | own, tmp_path / "model.safetensors")
    files = factors_in(tmp_path)
    assert torch.equal(files.scale(LAYER, KEY, ROWS, CPU), torch.full((ROWS,), 3.0))
    assert torch.equal(files.sketch(LAYER, KEY, 8), torch.arange(8.0))
    with pytest.raises(ValueError, match=r"V_x\.scale is torch.float32 of shape \(40,\), expected .* \(39,\)"):
        files.scale(LAYER, KEY, ROWS - 1, CPU)


def test_a_residual_bases_own_lengths_are_found_with_its_rank(tmp_path):
    save_file(residual_tensors(LAYER, KEY, -torch.arange(5.0)), tmp_path / "model.safetensors")
    files = factors_in(tmp_path)
    assert list(files.residuals()) == [(LAYER, KEY, 5)] and files.keys() == []
    assert torch.equal(files.residual_lengths(LAYER, KEY, 5, CPU), -torch.arange(5.0))
    with pytest.raises(ValueError, match=r"residual_s is .* expected torch.float32 of shape \(6,\)"):
        files.residual_lengths(LAYER, KEY, 6, CPU)


def test_all_tensors_come_under_their_plain_names(tmp_path):
    found = written(tmp_path, 8, "base_model.model.").tensors()
    assert found.keys() == tensors(8).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(8).items())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda files: pickle.loads(pickle.dumps(files))])
def test_a_copy_reads_the_files_by_itself(tmp_path, again):
    files = written(tmp_path, 8)
    read(files)
    assert same_parts(read(again(files)), basis(8))


@BITS
@pytest.mark.parametrize("rank", [17, 64])
def test_a_basis_stays_what_it_is_when_the_file_is_overwritten(tmp_path, bits, rank):
    path = tmp_path / "model.safetensors"
    write_tensors(factor_tensors(LAYER, KEY, basis(bits, 64)), path, {})
    found, size = read(factors_in(tmp_path), rank), path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\1" * size)
    assert all(
        torch.equal(a, b) for a, b in zip(found.stored.parts(), basis(bits, 64).stored.parts(0, rank), strict=True)
    )


@BITS
@pytest.mark.parametrize("rank", [17, ROWS])
def test_what_lies_elsewhere_in_a_file_is_copied_to_where_it_can_be_computed_with(tmp_path, bits, rank):
    files = written(tmp_path, bits)
    place_data(tmp_path / "model.safetensors", 38)
    found = read(files, rank).stored
    assert all(part.data_ptr() % 64 == 0 for part in found.parts() if part.element_size() > 1)
    assert all(torch.equal(a, b) for a, b in zip(found.parts(), basis(bits).stored.parts(0, rank), strict=True))


@BITS
def test_a_stored_basis_can_be_extended_and_leaves_the_file_alone(tmp_path, bits):
    files = written(tmp_path, bits)
    found, before = read(files, 17), (tmp_path / "model.safetensors").read_bytes()
    found.extend(basis(bits))
    assert same_parts(found, basis(bits))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_shards_are_found_through_the_index(tmp_path):
    named = tensors(4)
    shards = {name: f"model-{number}.safetensors" for number, name in enumerate(named)}
    for name, tensor in named.items():
        save_file({name: tensor}, tmp_path / shards[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert same_parts(read(factors_in(tmp_path)), basis(4))


DAMAGE = {
    "values of another dtype": (16, "values", lambda t: t.float(), "torch.float32 of shape"),
    "values too narrow": (16, "values", lambda t: t[:, 1:], r"shape \(40, 74\), expected .*\(40, 75\)"),
    "values flat": (16, "values", lambda t: t.flatten(), r"of shape \(3000,\)"),
    "values a number": (16, "values", lambda t: t[0, 0], r"of shape \(\)"),
    "values NaN": (16, "values", lambda t: t.clone().index_fill_(0, torch.tensor(3), torch.nan), "NaN or Inf"),
    "codes of another dtype": (8, "codes", lambda t: t.to(torch.int16), "torch.int16, expected torch.int8 or"),
    "codes of another size": (8, "codes", lambda t: t[:, :64], r"shape \(40, 64\), expected .*\(40, 128\)"),
    "scales of another dtype": (8, "scales", lambda t: t.float(), "torch.float32 of shape"),
    "scales of fewer rows": (8, "scales", lambda t: t[1:], r"shape \(39, 2\), expected .*\(40, 2\)"),
    "scales NaN": (8, "scales", lambda t: t * torch.nan, "NaN or Inf"),
    "scales infinite": (4, "scales", lambda t: t / 0, "NaN or Inf"),
    "codes of NF4 too wide": (4, "codes", lambda t: torch.cat([t, t], 1), r"expected torch.uint8 of shape \(40, 64\)"),
    "maxima of another dtype": (4, "maxima", lambda t: t.to(torch.int8), "torch.int8 of shape"),
    "maxima of another size": (4, "maxima", lambda t: t[:, :0], r"shape \(40, 0\), expected"),
}


@pytest.mark.parametrize(("bits", "part", "damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_part_that_does_not_fit_is_refused_with_file_and_name(tmp_path, bits, part, damage, message):
    name = str(FactorName(LAYER, KEY, part))
    files = written(tmp_path, bits, **{part: damage(tensors(bits)[name]).contiguous()})
    with pytest.raises(ValueError, match=rf"{name} is .*{message}.* copy it again") as refusal:
        read(files)
    assert str(refusal.value).startswith(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("bits", "part"), [(8, "codes"), (8, "scales"), (4, "codes"), (4, "maxima"), (4, "scales")], ids=str
)
def test_a_missing_part_is_refused_by_its_name(tmp_path, bits, part):
    with pytest.raises(ValueError, match=rf"model.safetensors: expected the tensor qsvft\S+V_x\.{part}, found none"):
        read(written(tmp_path, bits, **{part: None}))


LENGTHS = {
    "s of another dtype": ({"s": torch.ones(ROWS).double()}, r"V_x\.s is torch.float64 .* expected torch.float32"),
    "s no vector": ({"s": torch.ones(ROWS, 1)}, r"V_x\.s is .*\(40, 1\)"),
    "s NaN": ({"s": torch.full((ROWS,), torch.nan)}, r"V_x\.s is NaN or Inf"),
    "s negative": ({"s": -torch.ones(ROWS)}, r"V_x\.s is negative in places, expected lengths"),
    "s missing": ({"s": None}, r"expected the tensor qsvft\S+V_x\.s, found none"),
    "rms no scalar": ({"rms": torch.ones(1)}, r"V_x\.rms is .*\(1,\), expected .*\(\)"),
    "rms infinite": ({"rms": torch.tensor(torch.inf)}, r"V_x\.rms is NaN or Inf"),
    "rms missing": ({"rms": None}, r"expected the tensor qsvft\S+V_x\.rms, found none"),
}


@pytest.mark.parametrize(("changes", "message"), LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths_that_do_not_fit_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        written(tmp_path, 16, **changes).scale(LAYER, KEY, ROWS, CPU)


def test_a_sketch_that_is_not_there_is_asked_for_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"expected the tensor qsvft\S+V_x\.sketch, found none"):
        written(tmp_path, 16).sketch(LAYER, KEY, 8)


def test_a_basis_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"values is .*\(40, 75\), expected .*\(40, 80\)"):
        read(written(tmp_path, 16), size=80)


def test_a_factor_that_is_there_twice_is_refused(tmp_path):
    named = tensors(16)
    twice = named | {f"model.{name}": tensor.clone() for name, tensor in named.items()}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds the tensor qsvft\S+ twice, as"):
        factors_in(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused_by_its_path(tmp_path, size):
    written(tmp_path, 16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file.* copy or download"):
        factors_in(tmp_path)


def test_a_file_that_was_exchanged_after_it_was_listed_is_refused(tmp_path):
    files = written(tmp_path, 16)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not the one that was listed"):
        read(files)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors\.index\.json or model\.safetensors"):
        factors_in(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../other.safetensors"}}'],
)
def test_a_damaged_index_is_refused_by_its_path(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: found .*expected"):
        factors_in(tmp_path)


def test_other_tensors_of_the_file_are_passed_over(tmp_path):
    written(tmp_path, 16)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(3)}, path)
    files = factors_in(tmp_path)
    assert {str(name) for name in files} == set(tensors(16)) and len(files) == 3
