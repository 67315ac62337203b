"""A base quantised in the frame of a basis: with a whole orthonormal V, W x = P (Vᵀ x) with P = W V held in NF4.

The output side is y = U (P x), P = Uᵀ W. What the study trains on is the weight that such a base stands for: P Vᵀ or
U P, held densely, with the Hadamard basis.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import qsvft
from qsvft.storage.quantization import dequantize

Directions = Callable[[int], Tensor]
"""The rows of an orthonormal matrix of a size."""


@torch.no_grad()
def rounded_in_frame(model: Any) -> dict[str, Tensor]:
    """The weight of every linear layer but the head, by its parameter's name."""
    head = model.get_output_embeddings()
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}
    turned = nn.Sequential(*(_linear(to_frame(layer.weight.float(), hadamard)) for layer in layers.values()))
    rounded = dequantize(qsvft.quantize(turned, bits=4, progress=False))
    pairs = zip(layers, rounded, strict=True)
    return {f"{name}.weight": from_frame(one.weight.float(), hadamard) for name, one in pairs}


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight.to(torch.bfloat16))
    layer.out_features, layer.in_features = weight.shape
    return layer


def to_frame(W: Tensor, directions: Directions) -> Tensor:
    """W V, or Uᵀ W of a matrix that is wider than it is tall."""
    V = directions(min(W.shape))
    return W @ V.t() if W.shape[1] <= W.shape[0] else V @ W


def from_frame(P: Tensor, directions: Directions) -> Tensor:
    """The weight that P stands for."""
    V = directions(min(P.shape))
    return P @ V if P.shape[1] <= P.shape[0] else V.t() @ P


@cache
def hadamard(size: int) -> Tensor:
    """H D: D random signs, H block diagonal with a Walsh-Hadamard matrix for each power of two in the size."""
    draw = random.Random(f"0:{size}")
    signs = torch.tensor([1.0 - 2 * draw.getrandbits(1) for _ in range(size)])
    blocks = [1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1]
    return torch.block_diag(*(_walsh_hadamard(block) for block in blocks)) * signs


def _walsh_hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * 0.5 ** (matrix.shape[0].bit_length() / 2 - 0.5)
