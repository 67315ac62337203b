"""Each part of parts.py run by itself, on the tensors and with the functions of a built layer.

What autograd adds, views and the order of things are not in it: that is what a whole layer takes beyond the sum of its
parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from parts import BACKWARD, FORWARD, Linear
from torch import Tensor

from qsvft.memory.factored import FactoredLinear
from qsvft.storage.weights import dense_weight

Run = Callable[[], Any]
Runs = dict[tuple[str, str], Run]
"""By name and when."""

ADAPTER = "default"
DTYPE = torch.bfloat16


def alone(layer: Any, linear: Linear, tokens: int) -> Runs:
    """A function for each part of a layer."""
    if isinstance(layer, FactoredLinear):
        return (_rebuilt if linear.kind == "rebuilt" else _factored)(layer, linear, tokens)
    return (_lora if linear.kind == "lora" else _adapted)(layer, linear, tokens)


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, device=like.device, dtype=torch.float32).to(DTYPE)


def _weight(layer: Any, linear: Linear, tokens: int) -> Runs:
    base = layer.get_base_layer()
    W = dense_weight(base)
    assert W is not None
    W = W.to(DTYPE)
    x, g = _random(W, tokens, linear.n), _random(W, tokens, linear.m)
    runs: Runs = {("W", FORWARD): lambda: x @ W.t(), ("W", BACKWARD): lambda: g @ W}
    if linear.base_bits == 4:
        for when in (FORWARD, BACKWARD):
            runs["W made dense", when] = lambda: dense_weight(base)
    return runs


def _factor(runs: Runs, basis: Any, linear: Linear, name: str) -> Tensor:
    """The dense (k, size) rows of a factor; how it is made dense goes to the runs."""

    def make() -> None:
        read, parts = basis.held(linear.rank)
        for _ in read.by_rows(parts, DTYPE):
            pass

    if linear.factor_bits != 16:
        for when in (FORWARD, BACKWARD):
            runs[f"{name} made dense", when] = make
    dense: Tensor = basis.dense(DTYPE, linear.rank).contiguous()
    return dense


def _adapted(layer: Any, linear: Linear, tokens: int) -> Runs:
    runs, form, pattern = _weight(layer, linear, tokens), layer.forms[ADAPTER], layer.pattern(ADAPTER)
    inward, outward = layer.basis(form.inward), layer.basis(form.outward)
    F_in, F_out = _factor(runs, inward, linear, form.inward.side), _factor(runs, outward, linear, form.outward.side)
    a, base = _random(F_in, tokens, linear.inner), _random(F_in, tokens, linear.outer)
    h, g = _random(F_in, tokens, linear.rank), _random(F_in, tokens, linear.rank)
    runs["to coefficients", FORWARD] = lambda: a @ F_in.t()
    runs["to coefficients", BACKWARD] = lambda: h @ F_in
    runs["from coefficients", FORWARD] = lambda: torch.addmm(base, h, F_out)
    runs["from coefficients", BACKWARD] = lambda: base @ F_out.t()
    if form.error is not None:
        E = _factor(runs, layer.basis(form.error), linear, "E")
        runs["E", FORWARD] = lambda: torch.addmm(base, h, E)
        runs["E", BACKWARD] = lambda: base @ E.t()
    values, scale = layer.M(ADAPTER).detach().clone(), layer.scale_of(ADAPTER)
    side = "columns" if form.kind == "output" else "rows"
    return runs | _coefficients(lambda h, M: pattern.product(h, M, scale, side), h, values, g)


def _coefficients(product: Callable[[Tensor, Tensor], Tensor], h: Tensor, values: Tensor, g: Tensor) -> Runs:
    """M's product and its two gradients, each asked for alone."""
    of_h, of_values = h.clone().requires_grad_(), values.clone().requires_grad_()
    through, to_values = product(of_h, values), product(h, of_values)

    def forward() -> None:
        with torch.no_grad():
            product(h, values)

    return {
        ("M", FORWARD): forward,
        ("M", BACKWARD): lambda: torch.autograd.grad(through, of_h, g, retain_graph=True),
        ("gradient of M", BACKWARD): lambda: torch.autograd.grad(to_values, of_values, g, retain_graph=True),
    }


def _lora(layer: Any, linear: Linear, tokens: int) -> Runs:
    runs = _weight(layer, linear, tokens)
    A, B = (part[ADAPTER].weight.detach().to(DTYPE) for part in (layer.lora_A, layer.lora_B))
    x, g, h = _random(A, tokens, linear.n), _random(A, tokens, linear.m), _random(A, tokens, linear.rank)
    runs["A", FORWARD] = lambda: x @ A.t()
    runs["B", FORWARD] = lambda: h @ B.t()
    runs["B", BACKWARD] = lambda: g @ B
    runs["gradient of B", BACKWARD] = lambda: g.t() @ h
    runs["A", BACKWARD] = lambda: h @ A
    runs["gradient of A", BACKWARD] = lambda: h.t() @ x
    return runs


def _factored(layer: Any, linear: Linear, tokens: int) -> Runs:
    U, V, s = layer.U, layer.V, layer.s
    x, y = _random(U, tokens, linear.n), _random(U, tokens, linear.m)
    h, g = _random(U, tokens, linear.rank), _random(U, tokens, linear.rank)
    M = layer.M.detach().clone()
    runs: Runs = {
        ("to coefficients", FORWARD): lambda: x @ V.t(),
        ("to coefficients", BACKWARD): lambda: h @ V,
        ("from coefficients", FORWARD): lambda: h @ U.t(),
        ("from coefficients", BACKWARD): lambda: y @ U,
    }
    return runs | _coefficients(lambda h, M: h * (s + M.to(s.dtype)), h, M, g)


def _rebuilt(layer: Any, linear: Linear, tokens: int) -> Runs:
    U, V, s = layer.U, layer.V, layer.s
    x, g = _random(U, tokens, linear.n), _random(U, tokens, linear.m)
    M = layer.M.detach().clone().requires_grad_()
    with torch.enable_grad():
        W = U @ torch.diag(s + M.to(s.dtype)) @ V
    of_W = _random(U, linear.m, linear.n)
    dense = W.detach()

    def rebuild() -> None:
        with torch.no_grad():
            U @ torch.diag(s + M.to(s.dtype)) @ V

    return {
        ("W' = U (s + M) V", FORWARD): rebuild,
        ("W", FORWARD): lambda: x @ dense.t(),
        ("W", BACKWARD): lambda: g @ dense,
        ("gradient of W'", BACKWARD): lambda: g.t() @ x,
        ("gradient of M", BACKWARD): lambda: torch.autograd.grad(W, M, of_W, retain_graph=True),
    }
