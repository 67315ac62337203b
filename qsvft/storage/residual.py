"""ResidualLinear: an NF4 base that the factors beside it make exact (``residual=True``).

    W = R + U_k diag(s) V_kᵀ,    R = NF4(W - U_k diag(s) V_kᵀ)
    y = R x + U_k (s * V_kᵀ x) + b

U and V are held anyway, in 16, 8 or 4 bits; R is taken from the vectors as they are held, so that what their
rounding loses is in R. The largest singular directions, which make NF4's blocks wide, are no longer in
R: with all directions W is exact to about 0.15 %. (Of the dense weight before it is quantised; the idea
is that of quantisation residuals in the principal directions, as in PiSSA, arXiv 2404.02948.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..maths.autocast import in_compute_dtype
from ..maths.decomposition import EXACT, Decomposer
from .factors import StoredBasis, make_bases
from .nf4_product import slice_products
from .quantization import nf4_linear
from .weights import HeldLinear, dense_dtype, dense_weight, describe_base, product_without_bias, stored_tensors

More = Callable[[Tensor], Tensor]


class ResidualLinear(HeldLinear):
    """y = R x + U (s * Vᵀ x) + b, with R in NF4.

    Args:
        residual: R, a bitsandbytes 4-bit layer that also holds the bias.
        U, V: the directions, (k, m) and (k, n) as rows.
        s: (k,) fp32.
        method: how the directions came about.
    """

    qsvft_s: Tensor

    def __init__(
        self, residual: nn.Module, U: StoredBasis, V: StoredBasis, s: Tensor, method: Decomposer = EXACT
    ) -> None:
        super().__init__()
        self.method = method
        self.residual = slice_products(residual)
        self.qsvft_bases = nn.ModuleDict({"U": U, "V": V})
        self.register_buffer("qsvft_s", s, persistent=False)
        self.out_features, self.in_features = U.size, V.size
        self.source_cls = getattr(residual, "source_cls", nn.Linear)

    @property
    def bias(self) -> Tensor | None:
        """The bias."""
        return cast("Tensor | None", self.residual.bias)

    @property
    def dense_dtype(self) -> torch.dtype:
        return dense_dtype(self.residual)

    def forward(self, x: Tensor, more: More | None = None) -> Tensor:
        """``more`` gives what else is added to the coefficients s * h, from h = Vᵀ x."""
        y: Tensor = self.residual(x)
        return in_compute_dtype(x, lambda a: self._add_directions(y, a, more))

    def product(self, x: Tensor) -> Tensor:
        y = product_without_bias(self.residual, x)
        assert y is not None
        return in_compute_dtype(x, lambda a: self._add_directions(y, a, None))

    def _add_directions(self, y: Tensor, x: Tensor, more: More | None) -> Tensor:
        U, V = self.basis("U"), self.basis("V")
        h = V.to_coefficients(x.reshape(-1, x.shape[-1]), V.rank)
        z = (h * self.qsvft_s).to(h.dtype)
        if more is not None:
            z = z + more(h)
        return U.from_coefficients(y.reshape(-1, y.shape[-1]), z).view(y.shape)

    def basis(self, side: str) -> StoredBasis:
        """ "U" or "V"."""
        return cast(StoredBasis, self.qsvft_bases[side])

    def dense_weight(self) -> Tensor:
        R = dense_weight(self.residual)
        assert R is not None
        U, V = (self.basis(side).dense(torch.float32) for side in "UV")
        return R.float() + (U.T * self.qsvft_s) @ V

    def stored_tensors(self) -> Iterator[Tensor]:
        yield from stored_tensors(self.residual)
        yield self.qsvft_s
        for side in "UV":
            yield from self.basis(side).stored.parts()

    def describe(self) -> dict[str, Any]:
        U = self.basis("U")
        return {**describe_base(self.residual), "residual_rank": U.rank, "factor_bits": U.stored.bits}

    def _apply(self, fn: Any, recurse: bool = True) -> ResidualLinear:
        """Move with the model; s stays fp32."""
        s = self.qsvft_s
        super()._apply(fn, recurse)
        if self.qsvft_s.dtype != s.dtype:
            self.qsvft_s = s.to(self.qsvft_s.device)
        return self


def residual_linear(
    layer: nn.Module,
    rank: int,
    bits: int,
    method: Decomposer = EXACT,
    bases: Mapping[str, StoredBasis] | None = None,
) -> ResidualLinear:
    """Decompose a dense layer's weight, and quantise what the rounded directions leave of it.

    Args:
        layer: an ``nn.Linear`` or ``Conv1D``, with a dense weight (m, n).
        rank: k.
        bits: 16, 8 or 4, how the directions are held.
        method: how the weight is decomposed, see :func:`~qsvft.maths.decomposition.chosen_method`.
        bases: "U" and "V", where they are known already.

    s_j is the weight's component along the rounded directions, u_jᵀ W v_j / (|u_j|² |v_j|²).
    """
    weight = dense_weight(layer)
    assert weight is not None
    bases = make_bases(weight, rank, "both", bits, method) if bases is None else bases
    if weight.is_meta:
        s = weight.new_empty(rank).float()
        return ResidualLinear(nf4_linear(layer, weight), bases["U"], bases["V"], s, method)
    W, U, V = weight.double(), bases["U"].dense(torch.float64), bases["V"].dense(torch.float64)
    lengths = U.square().sum(1) * V.square().sum(1)
    s = (((U @ W) * V).sum(1) / lengths).float()
    residual = W - (U.T * s.double()) @ V
    return ResidualLinear(nf4_linear(layer, residual), bases["U"], bases["V"], s, method)
