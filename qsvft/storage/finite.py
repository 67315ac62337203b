"""Whether a tensor is free of NaN and Inf, in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or Inf. Reads the smallest and the largest entry: isfinite would make a mask first."""
    if tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor.detach()))
