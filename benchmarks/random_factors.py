"""Random numbers in place of singular vectors, for what does not depend on their values: the bytes and time of a step.

Decomposing the 224 matrices of a 7B model takes longer than measuring it. The probe and the digest of the base, which
would check the decomposition, are left out with it, and directions that would come from data need no data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from qsvft.maths.decomposition import Decomposition
from qsvft.storage import factors
from qsvft.storage.basis_key import BasisKey
from qsvft.storage.factors import StoredBasis
from qsvft.storage.stored_matrix import StoredMatrix
from qsvft.tuner import bases
from qsvft.tuner import layer as adapted
from qsvft.tuner.config import QSVFTConfig
from qsvft.tuner.form import Form
from qsvft.tuner.probe import SIZE


@contextmanager
def random_factors() -> Iterator[None]:
    """Meanwhile adapters and plain SVFT get random directions of the right shape and dtype."""
    with (
        patch.object(factors, "decompose", _random_decomposition),  # of a residual base
        patch.object(bases, "_computed", _random_bases),
        patch.object(adapted, "measured_scale", _no_scale),
        patch.object(adapted, "weight_digest", lambda _: bytes(32)),
        patch.object(adapted.QSVFTLinear, "compute_probe", _no_probe),
        patch.object(torch.linalg, "svd", _random_svd),
    ):
        yield


def _random(like: Tensor, *shape: int) -> Tensor:
    """Numbers of the size that entries of singular vectors have."""
    return torch.randn(shape, device=like.device, dtype=torch.bfloat16).mul_(shape[-1] ** -0.5)


def _random_decomposition(weight: Tensor, rank: int, sides: Any, method: Any) -> Decomposition:
    m, n = weight.shape
    needs_u, needs_v = factors.needed_sides(sides, weight.shape)
    U = _random(weight, rank, m) if needs_u else None
    V = _random(weight, rank, n) if needs_v else None
    return Decomposition(U, torch.ones(rank, device=weight.device), V)


def _no_scale(weight: Tensor, basis: Any, side: str, rank: int) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, device=weight.device), torch.ones((), device=weight.device)


def _no_probe(layer: adapted.QSVFTLinear, adapter: str, weight: Tensor) -> Tensor:
    return torch.zeros(SIZE, device=weight.device)


def _random_svd(weight: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    (m, n), k = weight.shape, min(weight.shape)
    s = torch.ones(k, device=weight.device, dtype=torch.bfloat16)
    return _random(weight, m, k), s, _random(weight, k, n)


def _random_bases(
    layer: str, form: Form, weight: Tensor, rank: int, config: QSVFTConfig, held: Mapping[BasisKey, StoredBasis]
) -> dict[BasisKey, StoredBasis]:
    sizes, bits = form.sizes((weight.shape[0], weight.shape[1])), config.stored_bits
    return {key: StoredBasis(StoredMatrix.hold(_random(weight, rank, size), bits)) for key, size in sizes.items()}
