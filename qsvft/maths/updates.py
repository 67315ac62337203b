"""The adapted maps: from an activation to coefficients, through M, and back.

    two-sided (the paper's)      y = W x + U M Vᵀ x           or, where W is rounded, W x + (U M + E) Vᵀ x
    one-sided, input  (n <= m)   y = W (x + V N Vᵀ x)            N  = S⁻¹ M
    one-sided, output (m <  n)   y = W x + U N' Uᵀ (W x)         N' = M S⁻¹

The one-sided forms are the two-sided one rewritten with W V = U S and Uᵀ W = S Vᵀ: they hold one
factor in place of two and act on the activation alone, so W may be stored in any way. They need no
singular vectors: for any orthonormal V, s_j = |W v_j| makes W V S⁻¹ a matrix of unit columns.

U and V are bases (:mod:`qsvft.maths.basis`), or plain tensors of rows: U (k, m), V (k, n). What is kept for
the backward is h = Vᵀ x (or Uᵀ y) in the activation's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .basis import Basis
from .coefficients import Scale, ScaleSide
from .dense_update import dense_update
from .patterns import DensePattern, Pattern


def sparse_update(
    base: Tensor,
    a: Tensor,
    inward: Basis,
    outward: Basis,
    values: Tensor,
    pattern: Pattern,
    scale: Scale = None,
    scale_side: ScaleSide = "rows",
) -> Tensor:
    """base + outward · N · inwardᵀ · a, the one map behind all three forms.

    Args:
        base: (..., m'), what the update is added to.
        a: (..., n'), what the update reads.
        inward: V (or U), directions of R^n': a -> coefficients.
        outward: U (or V), directions of R^m': coefficients -> update.
        values: the entries of M, fp32, in the pattern's order.
        pattern: which entries they are.
        scale, scale_side: see :mod:`qsvft.maths.coefficients`.

    Returns:
        (..., m'), in base's dtype. With M = 0 it equals base bit for bit.
    """
    if a.numel() == 0 or base.numel() == 0:
        # Keeps the graph, so that a step on an empty batch still has a backward.
        return base + (a.sum() * 0 + values.sum() * 0).to(base.dtype)
    h = inward.to_coefficients(a.reshape(-1, a.shape[-1]), pattern.rank)
    z = pattern.product(h, values, scale, scale_side)
    if base.is_contiguous():
        return outward.from_coefficients(base.view(-1, base.shape[-1]), z).view(base.shape)
    # Keeps base's strides: another layout may take W's product on another path, with other roundings.
    return base + outward.from_coefficients(z.new_zeros(1), z).view(base.shape).to(base.dtype)


def two_sided_update(
    y: Tensor,
    x: Tensor,
    U: Basis,
    V: Basis,
    values: Tensor,
    pattern: Pattern,
    scale: Scale = None,
    E: Basis | None = None,
) -> Tensor:
    """y + U M Vᵀ x: the paper's form, or y + (U M + E) Vᵀ x.

    y (..., m), x (..., n), U of R^m, V of R^n, scale of the rows of M; E has a row of R^m for each direction of V.
    """
    if isinstance(pattern, DensePattern) and not isinstance(scale, Tensor) and y.is_contiguous() and x.numel():
        rows = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        error = None if E is None else E.held(pattern.rank)
        return dense_update(*rows, values, scale, V.held(pattern.rank), U.held(pattern.rank), error).view(y.shape)
    if E is not None and x.numel() and y.numel():
        h = V.to_coefficients(x.reshape(-1, x.shape[-1]), pattern.rank)
        y = y + E.from_coefficients(h.new_zeros(1), h).view(y.shape).to(y.dtype)
    return sparse_update(y, x, V, U, values, pattern, scale)


def input_side_update(
    inner: Tensor, x: Tensor, V: Basis, inverse_s: Tensor, values: Tensor, pattern: Pattern
) -> Tensor:
    """inner + V S⁻¹ M Vᵀ x, to be fed to W; inner is x itself, or x with another adapter's update.

    inner and x (..., n), V of R^n, inverse_s (k,).
    """
    return sparse_update(inner, x, V, V, values, pattern, inverse_s, "rows")


def output_side_update(y: Tensor, wx: Tensor, U: Basis, inverse_s: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """y + U M S⁻¹ Uᵀ (W x). y = W x + bias and wx = W x are (..., m), U of R^m, inverse_s (k,)."""
    return sparse_update(y, wx, U, U, values, pattern, inverse_s, "columns")


def unit_of(length: Tensor, entries: int, rank: int) -> Tensor:
    """alpha = (|W|_F / sqrt(k)) / e with e entries in a row of M: a row of alpha times ones sums to a typical |W v|.

    One step of AdamW at the learning rate r moves every entry by at most about r, and where all entries of a row move
    together, as they do while the gradient keeps its sign, the step changes W v by r of its size, |W|_F / sqrt(k) being
    the root mean square of |W v| over k directions that hold W. So one rate does whatever the pattern, the rank and the
    width. Counting the entries' squares in place of their sum (alpha = |W|_F / sqrt(entries), as for independent signs)
    left best rates apart by the square root of e; see ``docs/quality.md``.

    Args:
        length: |W|_F, a scalar; for directions from data what :mod:`qsvft.tuner.calibration` measures in its place.
        entries: how many entries of M train.
        rank: k, the rows of M.

    Returns:
        A scalar in fp32; 1 for a weight that is all zeros.
    """
    alpha = (length.double() * rank**0.5 / entries).float()
    return torch.where(alpha > torch.finfo(torch.float32).tiny, alpha, torch.ones_like(alpha))


TAIL_DAMPING = 0.1
"""tau: so far below the root mean square of all lengths a direction's own length no longer counts."""


def bounded_inverse(s: Tensor, rms: Tensor) -> Tensor:
    """1 / max(s_j, tau * rms): the scale of the one-sided forms, never infinite.

    Directions with s_j < tau * rms take smaller steps; none is lost, and rounding is not blown up along the smallest.

    Args:
        s: (k,) fp32, |W v_j| of the direction as it is held.
        rms: scalar, the root mean square of |W v| over a whole orthonormal basis.

    Returns:
        (k,) fp32; zeros for a weight that is all zeros.
    """
    bounded = torch.maximum(s, rms * TAIL_DAMPING)
    # Below the smallest normal number 1/s would overflow: such a weight is zero for every purpose.
    usable = bounded > torch.finfo(bounded.dtype).tiny
    return torch.where(usable, 1 / bounded, torch.zeros_like(bounded))
