"""base + U N Vᵀ a for a dense small M, in one node of the graph.

    forward     h = a Vᵀ,      z = h Nᵀ,      base + z U
    backward    dL/dz = g Uᵀ,  dL/dh = dL/dz N,  dL/da = dL/dh V,  dL/dN = (dL/dz)ᵀ h

The same products as :func:`qsvft.maths.updates.sparse_update` takes one node each for; of a k in the hundreds they are
so small that on a card the time goes into starting them. Kept for the backward is h, (tokens, k).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .basis import Held, Reader, times, times_transpose
from .dense_coefficients import dense_gradient, scaled


class _DenseUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        a: Tensor,
        values: Tensor,
        scale: float | None,
        reads: tuple[Reader, Reader],
        of_V: int,
        *parts: Tensor,
    ) -> Tensor:
        V, U = Held(reads[0], parts[:of_V]), Held(reads[1], parts[of_V:])
        h = times_transpose(a, V)
        N = scaled(values.view(h.shape[1], -1), scale, "rows").to(h.dtype)
        ctx.save_for_backward(h, values)
        ctx.scale, ctx.V, ctx.U = scale, V, U
        z = h @ N.t()
        return times(z, U, base) if base.dtype == z.dtype else base + times(z, U).to(base.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        h, values = ctx.saved_tensors
        grad_z = times_transpose(g.to(h.dtype), ctx.U)
        grad_a = grad_values = None
        if ctx.needs_input_grad[1]:
            N = scaled(values.view(h.shape[1], -1), ctx.scale, "rows").to(h.dtype)
            grad_a = times(grad_z @ N, ctx.V)
        if ctx.needs_input_grad[2]:
            grad_values = scaled(dense_gradient(grad_z, h), ctx.scale, "rows").to(values.dtype).view(-1)
        frozen = (None,) * (3 + len(ctx.V.parts) + len(ctx.U.parts))
        return g if ctx.needs_input_grad[0] else None, grad_a, grad_values, *frozen


def dense_update(base: Tensor, a: Tensor, values: Tensor, scale: float | None, V: Held, U: Held) -> Tensor:
    """base + U N Vᵀ a, N = scale * M.

    Args:
        base: (tokens, m), contiguous.
        a: (tokens, n), any floating dtype.
        values: the k * k entries of M, row-major, fp32.
        scale: one number for all of M; None for 1.
        V, U: k directions of R^n and of R^m, as they are held.

    Returns:
        (tokens, m), in base's dtype. With M = 0 it equals base bit for bit.
    """
    parts = (*V.parts, *U.parts)
    result: Tensor = _DenseUpdate.apply(base, a, values, scale, (V.read, U.read), len(V.parts), *parts)
    return result
