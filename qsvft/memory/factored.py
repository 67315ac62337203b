"""SVFT as the paper's memory limitation describes it: U, s and V in place of W. Rivals for the profiler.

    plain      y = U ((s + M) (Vᵀ x))          the factors applied one after the other
    rebuilt    y = W' x, W' = U (s + M) Vᵀ      the dense weight rebuilt in each forward

Diagonal M, both factors in the model's dtype at full rank, W itself not kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..storage.quantization import partition_linears


class FactoredLinear(nn.Module):
    """A linear layer given by U (m, k), s (k,), V (k, n) and a diagonal M, k = min(m, n)."""

    U: Tensor
    s: Tensor
    V: Tensor

    def __init__(self, layer: Any, rebuild: bool) -> None:
        super().__init__()
        self.rebuild = rebuild
        weight: Tensor = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
        m, n = weight.shape
        k = min(m, n)
        if weight.is_meta:
            U, s, V = (weight.new_empty(shape) for shape in ((m, k), (k,), (k, n)))
        else:
            U, s, V = (t.to(weight.dtype) for t in torch.linalg.svd(weight.float(), full_matrices=False))
        self.register_buffer("U", U.contiguous())
        self.register_buffer("s", s)
        self.register_buffer("V", V.contiguous())
        self.M = nn.Parameter(torch.zeros(k, dtype=torch.float32, device=weight.device))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        diagonal = self.s + self.M.to(self.s.dtype)
        if self.rebuild:
            return nn.functional.linear(x, self.U @ torch.diag(diagonal) @ self.V, self.bias)
        return nn.functional.linear(nn.functional.linear(x, self.V) * diagonal, self.U, self.bias)


def factor_linears(model: PreTrainedModel, rebuild: bool) -> PreTrainedModel:
    """Replace every linear layer but the output head by its factors."""
    targets, _ = partition_linears(model, [])
    for name in targets:
        model.set_submodule(name, FactoredLinear(model.get_submodule(name), rebuild))
    return model
