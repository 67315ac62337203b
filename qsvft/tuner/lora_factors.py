"""An adapter's change of one layer as a product of two factors, which is what LoRA holds: dW = B A of rank k.

two-sided            B = U M alpha (+ E)        A = Vᵀ
one-sided, input     B = W V N                  A = Vᵀ            N = S⁻¹ M alpha
one-sided, output    B = U N'                   A = Uᵀ W          N' = M S⁻¹ alpha
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import QSVFTLinear


@torch.no_grad()
def lora_factors(layer: QSVFTLinear, adapter: str, given_back: bool = True) -> tuple[Tensor, Tensor]:
    """B (m, k) and A (k, n) in fp32, whose product is :meth:`QSVFTLinear.get_delta_weight`.

    Args:
        layer: with its base.
        adapter: its name.
        given_back: with what the adapter gives back of the base's rounding (E), which a base that was not rounded
            has already.
    """
    form, pattern = layer.forms[adapter], layer.pattern(adapter)
    rank, M = pattern.rank, layer.M(adapter).detach()
    inward, outward = (layer.basis(key).dense(torch.float32, rank) for key in (form.inward, form.outward))
    unit = torch.eye(rank, dtype=torch.float32, device=M.device)
    N = pattern.product(unit, M, layer.scale_of(adapter), "columns" if form.kind == "output" else "rows").t()
    if form.kind == "input":
        return layer.original_weight().float() @ (inward.t() @ N), inward
    if form.kind == "output":
        return outward.t() @ N, inward @ layer.original_weight().float()
    B = outward.t() @ N
    if form.error is not None and given_back:
        B += layer.basis(form.error).dense(torch.float32, rank).t()
    return B, inward
