"""A linear layer around a weight that is there already."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def layer_as_stored(weight: Tensor, bias: Tensor | None = None, conv: bool = False) -> nn.Module:
    """A frozen ``nn.Linear`` (m, n), or ``Conv1D`` (n, m), with a weight as a checkpoint has it; copies nothing."""
    new: Any = Conv1D(1, 1) if conv else nn.Linear(1, 1, bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    if conv:
        new.nx, new.nf = weight.shape
    else:
        new.out_features, new.in_features = weight.shape
    layer: nn.Module = new
    return layer
