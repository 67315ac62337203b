"""Which layers compute W x + b and nothing else, and which of them somebody else computes.

A subclass of ``nn.Linear`` may do so in its own words (Falcon's), or something else (a router that returns a tuple, a
layer that scales or drops): it is asked, with small numbers in place of its weight. A layer may also never be called:
WavLM's attention and Mamba's mixer read ``self.dt_proj.weight`` themselves, so that what is put around the layer does
nothing, and a packed weight is no matrix to them. That is seen in the parent's source.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .packed import is_packed

_OUTPUTS, _INPUTS = 7, 5
_DENSE = (torch.float32, torch.bfloat16, torch.float16)


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a dense ``nn.Linear`` or ``Conv1D``, or of a subclass whose forward is nn.Linear's map."""
    if type(layer) in (nn.Linear, Conv1D):
        return not is_packed(layer)
    return _is_dense_subclass(layer) and _computes_linear_map(layer)


def is_other_linear(layer: nn.Module) -> bool:
    """Whether a layer is of a subclass of ``nn.Linear``, dense, and computes something else."""
    return _is_dense_subclass(layer) and not _computes_linear_map(layer)


def _is_dense_subclass(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.Linear) or type(layer) is nn.Linear:
        return False
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter) and weight.dtype in _DENSE


def _computes_linear_map(layer: nn.Module) -> bool:
    if type(layer).forward is nn.Linear.forward:
        return True
    held = {name for name, _ in layer.named_parameters()} | {name for name, _ in layer.named_buffers()}
    if not held <= {"weight", "bias"}:
        return False
    small: Any = type(layer).__new__(type(layer))
    nn.Module.__init__(small)
    small.__dict__.update({name: value for name, value in vars(layer).items() if name not in vars(small)})
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    W, x = noise(_OUTPUTS, _INPUTS), noise(2, 3, _INPUTS)
    b = noise(_OUTPUTS) if layer.bias is not None else None
    for name, values in (("weight", W), ("bias", b)):
        small.register_parameter(name, None if values is None else nn.Parameter(values, requires_grad=False))
    small.in_features, small.out_features = _INPUTS, _OUTPUTS
    expected = nn.functional.linear(x, W, b)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found = type(layer).forward(small, x)
        except Exception:  # whatever it does, it is not this map
            return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)


def read_directly(model: nn.Module) -> dict[str, str]:
    """The linear layers whose weight their parent reads: their names, with the parent's class."""
    found: dict[str, str] = {}
    for name, parent in model.named_modules():
        linear = {leaf for leaf, child in parent.named_children() if isinstance(child, nn.Linear | Conv1D)}
        if linear and not isinstance(parent, nn.MultiheadAttention):
            linear &= {leaf for kind in type(parent).__mro__ for leaf in _weights_read(kind)}
        found |= {f"{name}.{leaf}" if name else leaf: type(parent).__name__ for leaf in sorted(linear)}
    return found


_MAKING = {"init", "reset_parameters", "init_weights", "tie_weights"}
"""Methods that make a layer, with or without underscores around their names."""
_ASKING = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "is_cuda", "is_meta", "requires_grad", "stride"}
_ASKING |= {"data_ptr", "element_size", "is_contiguous"}
_INSPECTING = {"isinstance", "hasattr", "getattr", "id", "type"}


@cache
def _weights_read(kind: type) -> frozenset[str]:
    """The x of every ``self.x.weight`` whose numbers the methods of a class read; of a part of it (Bloom, where the
    slices of its training are asked for) they do not count."""
    if kind.__module__.startswith("torch."):
        return frozenset()  # torch's own fused paths are not taken where the weight is no plain tensor
    methods = [
        inspect.unwrap(one)
        for name, one in vars(kind).items()
        if inspect.isfunction(one) and name.strip("_") not in _MAKING
    ]
    return frozenset(leaf for method in methods if _names(method.__code__, "weight") for leaf in _read_in(method))


def _names(code: CodeType, name: str) -> bool:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return name in code.co_names or any(_names(one, name) for one in inner)


def _read_in(method: FunctionType) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return  # made in a shell, or without its source
    around = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.value, ast.Attribute)):
            continue
        use = around[node]
        asked = isinstance(use, ast.Attribute) and use.attr in _ASKING
        inspected = isinstance(use, ast.Call) and isinstance(use.func, ast.Name) and use.func.id in _INSPECTING
        compared = isinstance(use, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in use.ops)
        if not (asked or inspected or compared or isinstance(use, ast.Subscript)):
            yield node.value.attr
