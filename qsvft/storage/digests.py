"""The bytes of tensors, for SHA-256."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as they lie in memory, in the order of its indices."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    content: memoryview = flat.numpy().data
    return content
