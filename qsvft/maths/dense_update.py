"""base + U N Vᵀ a for a dense small M, in one node of the graph; or base + (U N + E) Vᵀ a.

    forward     h = a Vᵀ,      z = h Nᵀ,               base + z U + h E
    backward    dL/dz = g Uᵀ,  dL/dh = dL/dz N + g Eᵀ,  dL/da = dL/dh V,  dL/dN = (dL/dz)ᵀ h

The same products as :func:`qsvft.maths.updates.sparse_update` takes one node each for; of a k in the hundreds they are
so small that on a card the time goes into starting them. Kept for the backward is h, (tokens, k); it is
an output of the node too, which no one reads but a second backward: through it that one reaches a.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

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
        reads: tuple[Reader, ...],
        counts: tuple[int, ...],
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor]:
        V, U, *rest = _held(reads, counts, parts)
        E = rest[0] if rest else None
        h = times_transpose(a, V)
        N = scaled(values.view(h.shape[1], -1), scale, "rows").to(h.dtype)
        ctx.save_for_backward(h, values)
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.V, ctx.U, ctx.E, ctx.frozen = scale, V, U, E, len(parts)
        base = _plus(base, h, E) if E is not None else base
        return _plus(base, h @ N.t(), U), h

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
        h, values = ctx.saved_tensors
        grad_a = grad_values = None
        grad_z = None if g is None else times_transpose(g.to(h.dtype), ctx.U)
        if ctx.needs_input_grad[1]:
            if g is not None and grad_z is not None:
                N = scaled(values.view(h.shape[1], -1), ctx.scale, "rows").to(h.dtype)
                through = grad_z @ N
                if ctx.E is not None:
                    through += times_transpose(g.to(h.dtype), ctx.E)
                grad_h = through if grad_h is None else grad_h + through
            grad_a = None if grad_h is None else times(grad_h, ctx.V)
        if ctx.needs_input_grad[2] and grad_z is not None:
            grad_values = scaled(dense_gradient(grad_z, h), ctx.scale, "rows").to(values.dtype).view(-1)
        frozen = (None,) * (3 + ctx.frozen)
        return g if ctx.needs_input_grad[0] else None, grad_a, grad_values, *frozen


def _held(reads: tuple[Reader, ...], counts: tuple[int, ...], parts: tuple[Tensor, ...]) -> list[Held]:
    ends = list(accumulate(counts, initial=0))
    return [Held(read, parts[start:end]) for read, start, end in zip(reads, ends, ends[1:], strict=False)]


def _plus(base: Tensor, z: Tensor, F: Held) -> Tensor:
    return times(z, F, base) if base.dtype == z.dtype else base + times(z, F).to(base.dtype)


def dense_update(
    base: Tensor, a: Tensor, values: Tensor, scale: float | None, V: Held, U: Held, E: Held | None = None
) -> Tensor:
    """base + (U N + E) Vᵀ a, N = scale * M.

    Args:
        base: (tokens, m), contiguous.
        a: (tokens, n), any floating dtype.
        values: the k * k entries of M, row-major, fp32.
        scale: one number for all of M; None for 1.
        V, U: k directions of R^n and of R^m, as they are held.
        E: k rows of R^m, what is added for each direction of V whatever M is; None for nothing.

    Returns:
        (tokens, m), in base's dtype. With M = 0 and without E it equals base bit for bit.
    """
    held = (V, U) if E is None else (V, U, E)
    reads, counts = tuple(F.read for F in held), tuple(len(F.parts) for F in held)
    parts = (part for F in held for part in F.parts)
    result: Tensor = _DenseUpdate.apply(base, a, values, scale, reads, counts, *parts)[0]
    return result
