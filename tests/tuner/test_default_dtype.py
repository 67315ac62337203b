"""No tensor takes the process's default dtype, which trainers set to bf16 or a library to fp64."""

import ast
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_models import load, randomize, tokens

import qsvft
from qsvft.tuner import QSVFTLinear

PACKAGE = Path(qsvft.__file__).parent
OF_THE_DEFAULT = {"zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace", "logspace", "scalar_tensor"}
"""torch's functions whose result has the default dtype where none is given."""

WAYS = {
    "default": {"rank": 16},
    "residual": {"rank": 16, "residual": True},
    "one-sided": {"sides": "one", "pattern": "banded", "factor_bits": 4},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
    "data": {"rank": 16, "calibration": [{"input_ids": tokens(), "labels": tokens()}]},
}


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def made_and_merged(folder, dtype, options):
    """What an adapter consists of, and the weights with it merged, both under a default dtype."""
    model = load(folder)
    with default_dtype(dtype):
        model = randomize(qsvft.prepare(model, 4, progress=False, **options))
        layers = {n: m for n, m in model.named_modules() if isinstance(m, QSVFTLinear)}
        found = {
            f"{name} {key}": tensor.clone()
            for name, layer in layers.items()
            for key, tensor in layer.state_dict().items()
        }
        found |= {f"{name} dW": layer.get_delta_weight("default") for name, layer in layers.items()}
        found |= {
            f"{name} alpha": torch.tensor(layer.units["default"], dtype=torch.float64) for name, layer in layers.items()
        }
        found |= model.merge_and_unload().state_dict()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_under_another_default_dtype_an_adapter_and_its_merge_are_the_same_bits(llama, way, dtype):
    expected = made_and_merged(llama, torch.float32, WAYS[way])
    found = made_and_merged(llama, dtype, WAYS[way])
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_every_tensor_that_is_made_names_its_dtype():
    silent = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if made and ast.unparse(node.func.value) == "torch" and node.func.attr in OF_THE_DEFAULT:
                named = {keyword.arg for keyword in node.keywords}
                if "dtype" not in named:
                    silent.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}")
    assert silent == []
