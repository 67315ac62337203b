"""A fingerprint of one layer's adapted map, saved with an adapter and checked when it is loaded.

The probe applies dW = U M V^T with a fixed pseudo-random M (on the adapter's own pattern) to a fixed
pseudo-random x and projects the result to eight numbers. It therefore changes by about the
relative error that a real adapter would suffer from another basis: another checkpoint, other bits,
a flipped sign, another rank or pattern. What does not change dW, such as W times a constant, does not
change the probe. Recomputing the factors elsewhere stays far below TOLERANCE; a wrong basis is at 1 or above.

It is computed in fp64, which sums to about 1e-15 in any order, and kept to 18 bits, which hide that: the same weight
and factors give the same probe wherever they lie in memory, on any number of threads and on any processor, but for
one number in some thousand million that lies so near the middle between two.
"""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

import torch
from torch import Tensor

from ..maths.aligned import aligned
from ..storage.digests import tensor_bytes

TOLERANCE = 1e-2
SIZE = 8
DIGEST_SIZE = 32
OTHER_FACTORS = (
    "If it was trained with factors computed elsewhere, give it those: load the base from the prepared directory "
    "(qsvft.from_pretrained(DIR) or AutoModelForCausalLM.from_pretrained(DIR)), or call qsvft.use_factors(model, DIR) "
    "before (--base DIR on the command line), or save the adapter where it was trained with "
    "save_pretrained(..., include_factors=True)."
)
"""What to do where the weight is right and the singular vectors are not."""


_ROWS_AT_ONCE = 512
_DROPPED = 6  # of fp32's 24 bits
_GOLDEN_RATIO = 0.6180339887498949


def fixed_noise(size: int, salt: int, device: torch.device | None = None) -> Tensor:
    """A reproducible sequence in [-1, 1], the same on every machine: cos of a quadratic phase."""
    return _noise(size, salt).to(device)


@lru_cache(maxsize=64)  # a model's layers have few sizes
def _noise(size: int, salt: int) -> Tensor:
    # On the CPU whatever the default device is: another one's products of large numbers end in other digits.
    index = torch.arange(1, size + 1, dtype=torch.float64, device="cpu")
    phase = torch.frac(index * torch.frac(index * _GOLDEN_RATIO) + salt * math.sqrt(2) * index)
    return torch.cos(2 * math.pi * phase)


def sketch(vector: Tensor) -> Tensor:
    """Project a vector to eight numbers with fixed noise, in fp64; they are fp32, of 18 bits."""
    flat = vector.detach().double().flatten()
    rows = [fixed_noise(flat.numel(), salt, flat.device) @ flat for salt in range(10, 10 + SIZE)]
    return _shortened(torch.stack(rows))


def _shortened(values: Tensor) -> Tensor:
    """The nearest fp32 numbers whose last bits are zero: sums in another order give the same."""
    half, bits = 1 << (_DROPPED - 1), values.float().view(torch.int32)
    return (bits + half & -(1 << _DROPPED)).view(torch.float32)


def times_transpose(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ in x's dtype for x (t, n) and W (m, n), without a whole copy of W in it."""
    return torch.cat([x @ aligned(part.to(x.dtype)).T for part in W.split(_ROWS_AT_ONCE)], dim=1)


def weight_sketch(weight: Tensor) -> Tensor:
    """Eight numbers in fp32 that depend on all of a weight (m, n), computed and kept as a probe."""
    x = fixed_noise(weight.shape[1], 1, weight.device).unsqueeze(0)
    return sketch(times_transpose(x, weight))


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, and 0 for two zeros."""
    difference = torch.linalg.vector_norm(found.double() - expected.double())
    scale = torch.linalg.vector_norm(expected.double())
    if float(scale) == 0:
        return 0.0 if float(difference) == 0 else math.inf
    ratio = float(difference / scale)
    return math.inf if math.isnan(ratio) else ratio


def content_digest(*parts: Tensor | str) -> Tensor:
    """SHA-256 of tensors' bytes and strings, as a uint8 tensor of 32."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            sha.update(part.encode())
        else:
            sha.update(tensor_bytes(part))
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
