"""The leading directions of vectors that come by in batches: eigenvectors of C = Σ x xᵀ from one pass.

    Y = C Ω = Σ x (xᵀ Ω),      C ≈ Y (Ωᵀ Y)⁻¹ Yᵀ

Only Y is kept, n x l with l a little over k, and never C. Ω comes from integer arithmetic, so that the same vectors
give the same directions everywhere. Where l would reach n, Ω is the identity and C exact. (The Nyström approximation
in its stable form: Tropp, Yurtsever, Udell, Cevher, arXiv 1706.05736, algorithm 3.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .subspace import start

OVERSAMPLING = 32
"""Columns of Ω beyond k."""

_TOKENS = 4096


class CovarianceSketch:
    """Y, while the vectors come by.

    Args:
        size: n, the length of a vector.
        rank: k, how many directions will be asked for.
        device: where Y is, fp32.

    Attributes:
        energy: Σ |x|², fp64 on the CPU.
        count: how many vectors came by.
    """

    def __init__(self, size: int, rank: int, device: torch.device | None = None) -> None:
        self.size, self.rank = size, rank
        width = min(rank + OVERSAMPLING, size)
        self._omega = None if width == size else start(size, 0, width).float().to(device)
        self._Y = torch.zeros(size, width, dtype=torch.float32, device=device)
        self.energy, self.count = 0.0, 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Vectors as rows (tokens, n), of any floating dtype. They stay where they are: only n x l numbers move."""
        omega = None if self._omega is None else self._omega.to(x.device)
        Y = torch.zeros_like(self._Y, device=x.device)
        for rows in x.split(_TOKENS):
            rows = rows.float()
            Y.addmm_(rows.t(), rows if omega is None else rows @ omega)
        self._Y += Y.to(self._Y.device)
        self.energy += float(torch.linalg.vector_norm(x, dtype=torch.float64).square())
        self.count += x.shape[0]

    @torch.no_grad()
    def directions(self) -> tuple[Tensor, Tensor]:
        """The first k eigenvalues of C, (k,), descending, and its eigenvectors as rows (k, n); fp64, orthonormal."""
        Y = self._Y.double()
        if self._omega is None:
            values, vectors = torch.linalg.eigh((Y + Y.T) / 2)
            return values.flip(0)[: self.rank].clamp_min(0), vectors.flip(1)[:, : self.rank].T.contiguous()
        omega = self._omega.double()
        shift = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(Y)
        Y = Y + shift * omega
        core = omega.T @ Y
        inner, turn = torch.linalg.eigh((core + core.T) / 2)
        half = turn * inner.clamp_min(torch.finfo(torch.float32).eps * float(inner[-1].clamp_min(0)) + 1e-300).rsqrt()
        B = Y @ half  # B Bᵀ is C's approximation; its left singular vectors come through the small BᵀB
        values, turn = torch.linalg.eigh(B.T @ B)
        left = torch.linalg.qr(B @ turn.flip(1)[:, : self.rank])[0]
        return (values.flip(0)[: self.rank] - shift).clamp_min(0), left.T.contiguous()
