"""The best product of a smaller rank for a product of two factors, without the SVD of what they make.

    B A = Q_B (R_B R_Aᵀ) Q_Aᵀ,    the core R_B R_Aᵀ is (k, k), and its SVD that of B A

B is (m, k), A (k, n). By Eckart and Young the first r of these singular directions are the best fit of rank r, and
what it leaves out has the norm of the other singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CORE, _MOST = 1024, 512
"""Above this k the core is not taken apart as a whole: so many of its leading directions are found by iteration."""


@dataclass(frozen=True)
class Spectrum:
    """A product's leading singular directions.

    Attributes:
        left: (m, q), s_j u_j in its columns.
        right: (q, n), v_j in its rows.
        s: (q,) the singular values, the largest first.
        norm: |B A|_F.
    """

    left: Tensor
    right: Tensor
    s: Tensor
    norm: float

    def error(self, rank: int) -> float:
        """|B A - best of this rank|_F."""
        return max(self.norm**2 - float(self.s[:rank].double().square().sum()), 0.0) ** 0.5

    def least(self, part: float) -> int:
        """The smallest rank whose best fit has this part of |B A|_F^2, between 0 and 1."""
        energy = self.s.double().square().cumsum(0)
        return min(int((energy < part * self.norm**2).sum()) + 1, len(self.s))


def spectrum(B: Tensor, A: Tensor) -> Spectrum:
    """The singular directions of B A: all k of them, or the leading 512 where k is above 1024.

    Args:
        B: (m, k).
        A: (k, n), fp32 or fp64 as B.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.t())
    core = R_B @ R_A.t()
    if len(core) <= _CORE:
        U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, s, V = torch.svd_lowrank(core, q=_MOST, niter=4)
        Vh = V.t()
    norm = float(torch.linalg.matrix_norm(core.double()))
    return Spectrum((Q_B @ U) * s, Vh @ Q_A.t(), s, norm)


def distance(B: Tensor, A: Tensor, other_B: Tensor, other_A: Tensor) -> float:
    """|B A - B' A'|_F, from the factors' Gram matrices, (k + k', k + k')."""
    left = torch.cat([B.double(), -other_B.double()], dim=1)
    right = torch.cat([A.double(), other_A.double()])
    return max(float(((left.t() @ left) * (right @ right.t())).sum()), 0.0) ** 0.5
