"""Factors read from safetensors files, where they would have to be computed; see :mod:`qsvft.storage.factor_names`.

They are copies, on the CPU as well: who writes into the file must not change a model. Everything read is treated as
hostile until it is checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from ..maths.updates import bounded_inverse
from .basis_key import BasisKey
from .factor_names import LENGTHS, PARTS, RESIDUAL, SCALE, SKETCH, FactorName, parse_name
from .factor_names import factor_tensors as factor_tensors  # what is read here is written under these names
from .factor_names import length_tensors as length_tensors
from .factor_names import residual_tensors as residual_tensors
from .factors import StoredBasis
from .stored_matrix import BLOCKS, STORED_DTYPE, StoredMatrix
from .tensor_files import TensorFiles
from .weights import all_finite


class FactorSource(Protocol):
    """Where factors are looked up before they are computed."""

    def basis(self, layer: str, key: BasisKey, rank: int, size: int, device: torch.device) -> StoredBasis | None:
        """The first ``rank`` directions of R^size, None if it has not that many."""

    def scale(self, layer: str, key: BasisKey, rank: int, device: torch.device) -> Tensor | None:
        """The scale 1/s of a layer's one-sided form, (rank,) fp32, None if it does not know it."""


class FactorFiles:
    """The factors in safetensors files. It can be pickled: it holds no tensor; it never changes, and is its own copy.

    Args:
        files: the file that holds it, for each tensor's name; names that are no factor's are passed over.

    Raises:
        ValueError: two tensors of the same name but for what stands before it.
    """

    def __init__(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
        self._stored: dict[FactorName, str] = {}
        for stored, path in files.items():
            if (name := parse_name(stored)) is None:
                continue
            if name in self._stored:
                raise ValueError(
                    f"{path}: holds the tensor {name} twice, as {stored} and as {self._stored[name]}; expected it "
                    "once. The file is damaged: copy it again, or make it again."
                )
            self._stored[name] = stored
        self._files = TensorFiles({stored: files[stored] for stored in self._stored.values()})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> FactorFiles:
        """Those of a single file, whatever else it holds; see :meth:`TensorFiles.from_file`."""
        return cls(TensorFiles.from_file(path).paths)

    def __deepcopy__(self, memo: dict[int, object]) -> FactorFiles:
        return self  # transformers copies a quantiser, which has this, for each tensor that it loads

    def __iter__(self) -> Iterator[FactorName]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def keys(self) -> list[tuple[str, BasisKey]]:
        """(layer, key) of each basis."""
        return list(dict.fromkeys(name[:2] for name in self._stored if name.of_basis))

    def rank(self, layer: str, key: BasisKey) -> int:
        """How many directions of a basis are stored, 0 for none."""
        names = [name for part in PARTS[4] + PARTS[16] if (name := FactorName(layer, key, part)) in self._stored]
        return min((self._rows(name) for name in names), default=0)

    def residuals(self) -> Iterator[tuple[str, BasisKey, int]]:
        """(layer, key, rank) of each residual base."""
        return ((name.layer, name.key, self._rows(name)) for name in self._stored if name.part == RESIDUAL)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name without what stands before it."""
        return {str(name): self._read(name) for name in self._stored}

    def basis(self, layer: str, key: BasisKey, rank: int, size: int, device: torch.device) -> StoredBasis | None:
        """The first ``rank`` directions that are stored.

        Args:
            layer: its module name.
            key: the basis's key.
            rank: k.
            size: n, the length of a direction.
            device: where it is put.

        Returns:
            None if there is no such basis, or it has fewer directions.

        Raises:
            ValueError: a part is missing, of another dtype or shape, or holds NaN or Inf.
        """
        bits = self._bits(layer, key)
        if bits is None:
            return None
        names = [FactorName(layer, key, part) for part in PARTS[bits]]
        rows = self._rows(names[0])
        parts: dict[str, Tensor] = {}
        for name in names:
            dtype, columns = _layout(bits, name.part, size)
            parts[name.part] = self._checked(name, dtype, (rows, columns), rank).to(device, copy=True)
        return StoredBasis(StoredMatrix(bits, size, parts)) if rows >= rank else None

    def lengths(self, layer: str, key: BasisKey, rank: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """What :func:`~qsvft.storage.factors.measured_scale` gives, for the first ``rank`` directions.

        Returns:
            s (rank,) and rms () in fp32; None if they are not stored, or for fewer directions.

        Raises:
            ValueError: one of the two is missing, of another dtype or shape, negative, NaN or Inf.
        """
        names = [FactorName(layer, key, part) for part in LENGTHS]
        if not any(name in self._stored for name in names):
            return None
        rows = self._rows(names[0])
        s, rms = self._checked(names[0], torch.float32, (rows,)), self._checked(names[1], torch.float32, ())
        for name, value in zip(names, (s, rms), strict=True):
            if bool((value < 0).any()):
                self._refuse(name, "negative in places", "lengths of at least 0")
        return (s[:rank].to(device, copy=True), rms.to(device, copy=True)) if rows >= rank else None

    def scale(self, layer: str, key: BasisKey, rank: int, device: torch.device) -> Tensor | None:
        """The stored scale of an adapter, or :func:`~qsvft.maths.updates.bounded_inverse` of the stored lengths.

        Returns:
            (rank,) fp32; None if neither is stored, or for fewer directions.

        Raises:
            ValueError: as :meth:`lengths`; a scale of another rank.
        """
        name = FactorName(layer, key, SCALE)
        if name in self._stored:
            return self._checked(name, torch.float32, (rank,)).to(device, copy=True)
        lengths = self.lengths(layer, key, rank, device)
        return None if lengths is None else bounded_inverse(*lengths)

    def residual_lengths(self, layer: str, key: BasisKey, rank: int, device: torch.device) -> Tensor:
        """s of a residual base, (rank,) fp32.

        Raises:
            ValueError: it is not there, of another dtype or shape, NaN or Inf.
        """
        return self._checked(FactorName(layer, key, RESIDUAL), torch.float32, (rank,)).to(device, copy=True)

    def sketch(self, layer: str, key: BasisKey, size: int) -> Tensor:
        """The fingerprint of a layer's weight that an adapter's file holds, (size,) fp32.

        Raises:
            ValueError: it is not there, of another dtype or shape, NaN or Inf.
        """
        return self._checked(FactorName(layer, key, SKETCH), torch.float32, (size,))

    def _bits(self, layer: str, key: BasisKey) -> int | None:
        """How a basis is held, from what there is of it; None if there is nothing."""
        if FactorName(layer, key, "values") in self._stored:
            return 16
        if not any(FactorName(layer, key, part) in self._stored for part in PARTS[4]):
            return None
        codes = FactorName(layer, key, "codes")
        dtype = self._read(codes).dtype
        if dtype not in (torch.int8, torch.uint8):
            self._refuse(codes, str(dtype), "torch.int8 or torch.uint8")
        return 8 if dtype == torch.int8 else 4

    def _read(self, name: FactorName) -> Tensor:
        if name not in self._stored:
            beside = (self._files.paths[stored] for known, stored in self._stored.items() if known[:2] == name[:2])
            raise ValueError(
                f"{next(beside, name.layer)}: expected the tensor {name}, found none. The file is incomplete: copy it "
                "again, or make it again."
            )
        return self._files.mapped(self._stored[name])

    def _rows(self, name: FactorName) -> int:
        tensor = self._read(name)
        return tensor.shape[0] if tensor.dim() else 0

    def _checked(self, name: FactorName, dtype: torch.dtype, shape: tuple[int, ...], rows: int | None = None) -> Tensor:
        """The first ``rows`` of a tensor of this dtype and shape, finite."""
        tensor = self._read(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            self._refuse(name, f"{tensor.dtype} of shape {tuple(tensor.shape)}", f"{dtype} of shape {shape}")
        tensor = tensor if rows is None else tensor[:rows]
        if tensor.is_floating_point() and not all_finite(tensor):
            self._refuse(name, "NaN or Inf in places", "finite numbers")
        return tensor

    def _refuse(self, name: FactorName, found: str, expected: str) -> NoReturn:
        stored = self._stored[name]
        raise ValueError(
            f"{self._files.paths[stored]}: the tensor {stored} is {found}, expected {expected}. The file is damaged or "
            "belongs to another model: copy it again, or make it again."
        )


def _layout(bits: int, part: str, size: int) -> tuple[torch.dtype, int]:
    """(dtype, columns) of a part of a matrix of ``size`` columns, as :meth:`StoredMatrix.hold` makes it."""
    block = BLOCKS[bits]
    blocks = -(-size // block)
    if part == "codes":
        return (torch.int8, blocks * block) if bits == 8 else (torch.uint8, blocks * block // 2)
    if part == "maxima":
        return torch.uint8, blocks
    return STORED_DTYPE, 1 if (bits, part) == (4, "scales") else blocks
