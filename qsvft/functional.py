"""The adapted maps on plain tensors: from an activation to coefficients, through M, and back.

    two-sided (the paper's)      y = W x + U M Vᵀ x
    one-sided, input  (n <= m)   y = W (x + V N Vᵀ x)            N  = S⁻¹ M
    one-sided, output (m <  n)   y = W x + U N' Uᵀ (W x)         N' = M S⁻¹

The one-sided forms are the two-sided one rewritten with W V = U S and Uᵀ W = S Vᵀ: they hold one
factor in place of two and act on the activation alone, so W may be stored in any way.

Factors are held as rows: U is (k, m), V is (k, n), row j is the j-th singular vector. They may be
in another dtype than the activation; they are cast where they are used and never kept in the cast
form by autograd. What is kept for the backward is h = Vᵀ x (or Uᵀ y) in the activation's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coefficients import ScaleSide
from .patterns import Pattern


class _ToCoefficients(torch.autograd.Function):
    """h = a Fᵀ. Keeps the factor as it is held, not the activation."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return a @ factor.to(a.dtype).t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:
        (factor,) = ctx.saved_tensors
        return (g @ factor.to(g.dtype) if ctx.needs_input_grad[0] else None), None


class _FromCoefficients(torch.autograd.Function):
    """base + z F. In one dtype the sum is taken inside the matrix product, before rounding."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, z: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = z.dtype
        if base.dtype == z.dtype:
            return torch.addmm(base, z, factor.to(z.dtype))
        return base + (z @ factor.to(z.dtype)).to(base.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (factor,) = ctx.saved_tensors
        grad_z = None
        if ctx.needs_input_grad[1]:
            grad_z = g.to(ctx.dtype) @ factor.to(ctx.dtype).t()
        return (g if ctx.needs_input_grad[0] else None), grad_z, None


def to_coefficients(a: Tensor, factor: Tensor) -> Tensor:
    """h = Fᵀ a, token by token: (tokens, n) and (k, n) give (tokens, k)."""
    result: Tensor = _ToCoefficients.apply(a, factor)
    return result


def from_coefficients(base: Tensor, z: Tensor, factor: Tensor) -> Tensor:
    """base + F z, token by token: (tokens, n), (tokens, k) and (k, n) give (tokens, n)."""
    result: Tensor = _FromCoefficients.apply(base, z, factor)
    return result


def sparse_update(
    base: Tensor,
    a: Tensor,
    inward: Tensor,
    outward: Tensor,
    values: Tensor,
    pattern: Pattern,
    scale: Tensor | None = None,
    scale_side: ScaleSide = "rows",
) -> Tensor:
    """base + outward · N · inwardᵀ · a, the one map behind all three forms.

    Args:
        base: (..., m'), what the update is added to.
        a: (..., n'), what the update reads.
        inward: (k, n'), V (or U) as rows: a -> coefficients.
        outward: (k, m'), U (or V) as rows: coefficients -> update.
        values: the entries of M, fp32, in the pattern's order.
        pattern: which entries they are.
        scale, scale_side: see :mod:`qsvft.coefficients`.

    Returns:
        (..., m'), in base's dtype. With M = 0 it equals base bit for bit.
    """
    if a.numel() == 0 or base.numel() == 0:
        # Keeps the graph, so that a step on an empty batch still has a backward.
        return base + (a.sum() * 0 + values.sum() * 0).to(base.dtype)
    h = to_coefficients(a.reshape(-1, a.shape[-1]), inward)
    z = pattern.product(h, values, scale, scale_side)
    if base.is_contiguous():
        return from_coefficients(base.view(-1, base.shape[-1]), z, outward).view(base.shape)
    # Keeps base's strides: another layout may take W's product on another path, with other roundings.
    return base + from_coefficients(z.new_zeros(1), z, outward).view(base.shape).to(base.dtype)


def two_sided_update(y: Tensor, x: Tensor, U: Tensor, V: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """y + U M Vᵀ x: the paper's form. y (..., m), x (..., n), U (k, m), V (k, n)."""
    return sparse_update(y, x, inward=V, outward=U, values=values, pattern=pattern)


def input_side_update(
    inner: Tensor, x: Tensor, V: Tensor, inverse_s: Tensor, values: Tensor, pattern: Pattern
) -> Tensor:
    """inner + V S⁻¹ M Vᵀ x, to be fed to W; inner is x itself, or x with another adapter's update.

    inner and x (..., n), V (k, n), inverse_s (k,).
    """
    return sparse_update(inner, x, V, V, values, pattern, inverse_s, "rows")


def output_side_update(y: Tensor, wx: Tensor, U: Tensor, inverse_s: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """y + U M S⁻¹ Uᵀ (W x). y = W x + bias and wx = W x are (..., m), U (k, m), inverse_s (k,)."""
    return sparse_update(y, wx, U, U, values, pattern, inverse_s, "columns")


def bounded_inverse(s: Tensor, rms: Tensor, tail_damping: float) -> Tensor:
    """1 / max(s_j, tau * rms): the scale of the one-sided forms, never infinite.

    Args:
        s: (k,) fp32, |W v_j| of the factor as it is held.
        rms: scalar, the root mean square of all min(m, n) singular values.
        tail_damping: tau. Directions with s_j < tau * rms take smaller steps; none is lost.

    Returns:
        (k,) fp32; zeros for a weight that is all zeros.
    """
    floor = rms * max(tail_damping, 1e-7)
    bounded = torch.maximum(s, floor)
    # Below the smallest normal number 1/s would overflow: such a weight is zero for every purpose.
    usable = bounded > torch.finfo(bounded.dtype).tiny
    return torch.where(usable, 1 / bounded, torch.zeros_like(bounded))
