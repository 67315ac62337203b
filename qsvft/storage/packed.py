"""Linear layers as other libraries pack them: which they are, their weight made dense, and their gradient.

torchao and quanto put a tensor of their own into an ``nn.Linear``; HQQ, GPTQ and AWQ have layers of their own. Of each
two things are wanted, whatever is in it: W x, and W once. W is what its own ``dequantize()`` gives, where that is what
the layer multiplies with, and else the layer's answer to the identity, some rows at a time:

    W[:, i] = f(e_i) - f(0)

Kernels made for inference give no gradient, and say nothing: torchao's that round x to int8 cut it, others raise in the
backward. Such a layer gets one of the same weight, dL/dx = g W, with W made dense meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .disguise import disguised, undisguise

_DENSE = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 512
TOLERANCE = 0.25
"""Relative, above which a layer computes something else: x rounded to 4 bits changes W x by 0.1."""


def is_packed_tensor(tensor: object) -> bool:
    """Whether a tensor is of another library's class, which stands for a dense one and holds it in its own way."""
    kind = type(tensor)
    # torch has such classes too, which are other things: distributed tensors, nested ones.
    return (
        isinstance(tensor, Tensor) and hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.")
    )


def is_packed(layer: nn.Module) -> bool:
    """Whether a layer looks like a linear one that another library than bitsandbytes has packed."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not all(isinstance(size, int) for size in sizes) or next(layer.children(), None) is not None:
        return False
    if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt, Conv1D)):
        return False
    weight = getattr(layer, "weight", None)
    if is_packed_tensor(weight):
        return True
    if type(layer) is nn.Linear or (isinstance(weight, Tensor) and weight.dtype in _DENSE):
        return False
    return any(tensor.dtype not in _DENSE for tensor in (*layer.parameters(), *layer.buffers()))


def packing(layer: nn.Module) -> str:
    """The class that holds the weight: the tensor's, or the layer's."""
    weight = getattr(layer, "weight", None)
    return type(weight if is_packed_tensor(weight) else layer).__name__


def packed_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of a dense layer in its place: its tensor's, or that of the model, or what it has of its own."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    known: list[Any] = [weight.dtype] if isinstance(weight, Tensor) and is_packed_tensor(weight) else []
    known += [getattr(layer, "qsvft_dtype", None), bias.dtype if isinstance(bias, Tensor) else None]
    known += [getattr(layer, "compute_dtype", None), *(t.dtype for t in (*layer.parameters(), *layer.buffers()))]
    return next((dtype for dtype in known if dtype in _DENSE), torch.float32)


def ready_packed(model: nn.Module) -> None:
    """Let every packed layer of a model, adapted or not, know the model's dtype and give a gradient, in place."""
    note_dtype(model)
    for module in model.modules():
        if is_packed(module) and not on_meta(module) and _not_linear(module) is None and not _gives_gradient(module):
            cls: Any = type(module)
            module.__class__ = _class_with_gradient(cls)


def note_dtype(model: nn.Module) -> None:
    """Note at packed layers what the model computes in: GPTQ's and AWQ's compute in whatever x is in."""
    plain = (p for p in model.parameters() if p.dtype in _DENSE and not is_packed_tensor(p))
    dtype = next((p.dtype for p in plain), None)
    for module in model.modules():
        if is_packed(module):
            vars(module).setdefault("qsvft_dtype", dtype)


def plain_packed(model: nn.Module) -> None:
    """Undo :func:`ready_packed`."""
    for module in undisguise(model, _class_with_gradient).modules():
        if is_packed(module):
            vars(module).pop("qsvft_dtype", None)


def on_meta(layer: nn.Module) -> bool:
    """Whether a layer has no values."""
    return any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def check_product(name: str, layer: nn.Module) -> None:
    """Refuse a layer of unknown storage that does not compute W x + b.

    Raises:
        TypeError: naming it, with what was found.
    """
    if not on_meta(layer) and (found := _not_linear(layer)) is not None:
        raise TypeError(
            f"{name}: cannot adapt a {packing(layer)}: {found}; expected a layer that computes W x + b on this device. "
            "Move the model to the device that its kernels are for, quantise its weights alone and no activations, or "
            "add it to exclude_modules."
        )


@torch.no_grad()
def _not_linear(layer: nn.Module) -> str | None:
    """What a layer computes in place of W x + b, in words; None for a linear one."""
    zero, x, y = _inputs(layer)
    try:
        found: Any = layer(torch.stack([zero, x, y, x + y]))
    except Exception as error:  # whatever its kernels say
        return f"its forward raised {type(error).__name__}: {error}"
    m, n = _shape(layer)
    if not isinstance(found, Tensor) or found.shape != (4, m):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        return f"its forward gave {shape} of (4, {n}), where (4, {m}) was expected"
    f = found.double()
    difference = _relative(f[3] - f[1] - f[2] + f[0], f[3] - f[0])
    if difference <= TOLERANCE:
        return None
    return (
        f"f(x + y) - f(x) - f(y) + f(0) is {difference:.3g} of f(x + y) - f(0), where at most {TOLERANCE} was expected"
    )


def _gives_gradient(layer: nn.Module) -> bool:
    """Whether <dL/dx, x> = <g, f(x) - f(0)> for g = f(x) - f(0)."""
    zero, x, _ = (row.unsqueeze(0) for row in _inputs(layer))
    with torch.enable_grad():
        try:
            y = layer(x.requires_grad_())
            g = (y - layer(zero)).detach()
            (grad,) = torch.autograd.grad(y, x, g)
        except Exception:  # there is none, or its kernel has none
            return False
    expected = g.double().square().sum()
    return _relative((grad.double() * x.detach().double()).sum() - expected, expected) <= TOLERANCE


@functools.cache
def _class_with_gradient(plain: Any) -> type:
    @functools.wraps(plain.forward)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not torch.is_grad_enabled():
            return plain.forward(self, x, *args, **kwargs)
        return _Product.apply(x, getattr(self, "bias", None), self, plain.forward)

    return disguised(plain, _class_with_gradient, forward)


class _Product(torch.autograd.Function):
    """A layer's own forward; g W as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: nn.Module, run: Any) -> Tensor:
        ctx.layer, ctx.dtype, ctx.bias_dtype = layer, x.dtype, None if bias is None else bias.dtype
        result: Tensor = run(layer, x)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            W = read_packed(ctx.layer)
            grad_x = (g.to(W.dtype) @ W).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = g.flatten(0, -2).sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None, None


@torch.no_grad()
def read_packed(layer: nn.Module) -> Tensor:
    """The weight (m, n), dense: dequantised by its library, or read through the layer's own forward."""
    if on_meta(layer):
        return torch.empty(_shape(layer), dtype=packed_dtype(layer), device="meta")
    W = _dequantized(layer)
    if W is not None:
        zero, x, _ = _inputs(layer)
        f = layer(torch.stack([zero, x])).double()
        if _relative(W.double() @ x.double() - (f[1] - f[0]), f[1] - f[0]) <= TOLERANCE:
            return W
    return read_through(layer)


def _dequantized(layer: nn.Module) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    holder: Any = weight if is_packed_tensor(weight) else layer
    own = getattr(type(holder), "dequantize", Tensor.dequantize)
    if own is Tensor.dequantize:  # every tensor has that one
        return None
    try:
        W = own(holder)
    except NotImplementedError:
        return None
    fits = isinstance(W, Tensor) and W.shape == _shape(layer) and W.dtype in _DENSE
    return W.detach() if fits else None


@torch.no_grad()
def read_through(layer: nn.Module) -> Tensor:
    """The weight (m, n) of a layer as it computes: its answer to the identity, without the bias."""
    (_, n), dtype = _shape(layer), packed_dtype(layer)
    device, bias = _device(layer), getattr(layer, "bias", None)
    columns = []
    module: Any = layer
    try:
        if isinstance(bias, Tensor):
            module.bias = None  # rather than rounding W + b and taking b away again
        zero = layer(torch.zeros(1, n, device=device, dtype=dtype))
        for start in range(0, n, _ROWS):
            rows = torch.arange(start, min(start + _ROWS, n), device=device)
            unit = torch.zeros(len(rows), n, device=device, dtype=dtype)
            unit[rows - start, rows] = 1
            columns.append((layer(unit) - zero).t())
    finally:
        if isinstance(bias, Tensor):
            module.bias = bias
    return torch.cat(columns, dim=1)


def _inputs(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """0 and two vectors of fixed noise (n,)."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, _shape(layer)[1], generator=generator, dtype=torch.float32, device="cpu")
    x, y = noise.to(_device(layer), packed_dtype(layer))
    return torch.zeros_like(x), x, y


def _shape(layer: Any) -> tuple[int, int]:
    """(outputs, inputs)."""
    return layer.out_features, layer.in_features


def _device(layer: nn.Module) -> torch.device:
    held = next((tensor for tensor in (*layer.parameters(), *layer.buffers())), None)
    return held.device if held is not None else torch.device("cpu")


def _relative(difference: Tensor, expected: Tensor) -> float:
    """|difference| / |expected|, and 0 for two zeros."""
    found, size = float(difference.norm()), float(expected.norm())
    return found / size if size else (0.0 if found == 0 else float("inf"))
