"""StoredMatrix: a frozen matrix held in 16, 8 or 4 bits, dequantised where it is used.

====  ===========================================================================  =================
bits  how a row of n columns is held                                               bytes an entry
====  ===========================================================================  =================
16    bf16                                                                         2
8     int8 codes in blocks of 64, one bf16 scale a block                           1 + 2/64
4     bitsandbytes' NF4 codes in blocks of 128; double quantisation: the blocks'   1/2 + 1/128 + 2/n
      absolute maxima as 8-bit fractions of one bf16 scale a row
====  ===========================================================================  =================

A row depends on no other row (rows are padded with zeros to whole blocks), so that any rows can be read
and more be added without touching the others. Whatever the bits, the entries *are* the bf16 numbers that
:meth:`StoredMatrix.dense` gives: forward, backward, probe and merge all see one matrix.

int8 is linear: on singular vectors that is one and a half times as exact as bitsandbytes' dynamic 8-bit map,
which spends its codes on small entries (``benchmarks/factor_bits.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..options.choices import STORED_BITS
from .nf4 import dense_codes, nf4_codes

STORED_DTYPE = torch.bfloat16
BLOCKS = {16: 1, 8: 64, 4: 128}
_ROWS_AT_ONCE = 1024

Parts = tuple[Tensor, ...]


SLICE_BYTES = 8 * 2**20
"""The largest dense stretch that is made at a time."""


class Layout(NamedTuple):
    """What the parts of a stored matrix mean: its bits and its shape."""

    bits: int
    rows: int
    columns: int

    def by_rows(self, parts: Parts, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their dense part), in stretches of at most SLICE_BYTES where the matrix has to be made dense."""
        for rows in self._stretches(parts, dtype, parts[0].shape[0], self.columns):
            yield rows, dense_rows(self, tuple(part[rows] for part in parts), dtype)

    def by_columns(self, parts: Parts, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(columns, their dense part), likewise."""
        for columns in self._stretches(parts, dtype, self.columns, parts[0].shape[0], BLOCKS[self.bits]):
            chosen = parts if columns == slice(0, self.columns) else self._columns(parts, columns)
            yield columns, dense_rows(Layout(self.bits, self.rows, columns.stop - columns.start), chosen, dtype)

    def _stretches(
        self, parts: Parts, dtype: torch.dtype, count: int, other: int, multiple: int = 1
    ) -> Iterator[slice]:
        if (self.bits == 16 and parts[0].dtype == dtype) or torch.compiler.is_compiling():
            return iter([slice(0, count)])  # nothing has to be made, or the compiler decides
        return slices(count, other * dtype.itemsize, multiple)

    def _columns(self, parts: Parts, columns: slice) -> Parts:
        """Whole blocks of columns: a part has the same number of entries for each block, or one for the whole row."""
        block = BLOCKS[self.bits]
        first, last = columns.start // block, -(-columns.stop // block)
        blocks = -(-self.columns // block)
        chosen = []
        for part in parts:
            if self.bits == 16:
                chosen.append(part[:, columns])
            else:
                width = part.shape[1] // blocks
                chosen.append(part if part.shape[1] < blocks else part[:, first * width : last * width].contiguous())
        return tuple(chosen)


def slices(count: int, bytes_each: int, multiple: int = 1, most: int | None = None) -> Iterator[slice]:
    """Stretches of 0 to ``count``, whole multiples, that take at most ``most`` bytes (SLICE_BYTES), or one multiple."""
    most = SLICE_BYTES if most is None else most
    step = max(multiple, most // max(bytes_each, 1) // multiple * multiple)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def dense_rows(layout: Layout, parts: Parts, dtype: torch.dtype) -> Tensor:
    """The rows that ``parts`` hold, (rows, columns) in a floating dtype; a view where nothing has to be done."""
    if layout.bits == 16:
        return parts[0].to(dtype)
    make = _uncompiled_values if torch.compiler.is_compiling() else _values
    values: Tensor = make(layout.bits, list(parts))
    return values[:, : layout.columns].to(dtype)


def _values(bits: int, parts: list[Tensor]) -> Tensor:
    """bf16, with whole blocks of columns."""
    return _int8_values(*parts) if bits == 8 else _nf4_values(*parts)


@torch.library.custom_op("qsvft::stored_values", mutates_args=())
def _uncompiled_values(bits: int, parts: list[Tensor]) -> Tensor:
    """The same where torch.compile does not look: Inductor would leave out roundings, and the map be another one."""
    return _values(bits, parts)


@_uncompiled_values.register_fake
def _(bits: int, parts: list[Tensor]) -> Tensor:
    codes = parts[0]
    return codes.new_empty(codes.shape[0], codes.shape[1] * (2 if bits == 4 else 1), dtype=STORED_DTYPE)


def _int8_values(codes: Tensor, scales: Tensor) -> Tensor:
    if codes.is_cuda:  # one kernel in place of two; a CPU takes up to three times as long for it
        return torch.mul(codes.view(*scales.shape, BLOCKS[8]), scales.unsqueeze(-1)).view(codes.shape)
    values = codes.to(STORED_DTYPE)
    values.view(*scales.shape, BLOCKS[8]).mul_(scales.unsqueeze(-1))
    return values


def _nf4_values(codes: Tensor, maxima: Tensor, scales: Tensor) -> Tensor:
    absmax = maxima.to(torch.float32).mul_(scales / 255)
    return dense_codes(codes, absmax, BLOCKS[4], STORED_DTYPE)


class StoredMatrix(nn.Module):
    """A frozen matrix in 16, 8 or 4 bits, made by :meth:`hold`. It moves with its model and keeps its dtypes.

    Attributes:
        bits: 16, 8 or 4.
        rows, columns: the matrix's shape.
        disguised: the true dtypes of the parts that :meth:`be_sharded` made parameters of.
    """

    def __init__(self, bits: int, columns: int, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.bits, self.columns = bits, columns
        self.disguised: dict[str, torch.dtype] = {}
        self._names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(name, part, persistent=False)

    @classmethod
    def hold(cls, matrix: Tensor, bits: int) -> StoredMatrix:
        """Round a matrix for holding.

        Args:
            matrix: (rows, columns), finite, any floating dtype. On the meta device only shapes are made.
            bits: 16, 8 or 4.

        Raises:
            ValueError: other bits.
        """
        if bits not in STORED_BITS:
            raise ValueError(f"bits of a stored matrix: expected 16 (bf16), 8 (int8) or 4 (NF4), got {bits!r}")
        if matrix.is_meta:
            return cls(bits, matrix.shape[1], _empty(matrix.shape[0], matrix.shape[1], bits))
        chunks = [_MAKERS[bits](chunk) for chunk in matrix.detach().split(_ROWS_AT_ONCE)]
        if len(chunks) == 1:
            return cls(bits, matrix.shape[1], chunks[0])
        return cls(bits, matrix.shape[1], {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})

    def append(self, other: StoredMatrix, start: int = 0) -> None:
        """Add the rows of another matrix from ``start`` on below; the rows held stay as they are, bit for bit."""
        for name, part in other.named_buffers():
            setattr(self, name, torch.cat([getattr(self, name), part[start:]]))

    def be_sharded(self, dtype: torch.dtype) -> None:
        """Hold the parts as frozen parameters, which FSDP and ZeRO-3 split between processes, their bytes in tensors of
        a floating ``dtype`` as bitsandbytes' ``quant_storage`` does. A part whose rows do not fill whole numbers of it
        stays a buffer."""
        for name, part in list(self.named_buffers()):
            if part.shape[1] * part.element_size() % dtype.itemsize == 0:
                delattr(self, name)
                self.disguised[name] = part.dtype
                self.register_parameter(name, nn.Parameter(part.contiguous().view(dtype), requires_grad=False))

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return self._held()[0].shape[0]

    @property
    def layout(self) -> Layout:
        """How :meth:`parts` are read."""
        return Layout(self.bits, self.rows, self.columns)

    def parts(self, start: int = 0, stop: int | None = None) -> Parts:
        """The tensors that hold rows [start, stop), as views."""
        return tuple(part[start:stop] for part in self._held())

    def dense(self, dtype: torch.dtype = STORED_DTYPE, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop), dense; a view of what is held where nothing has to be done."""
        return dense_rows(self.layout, self.parts(start, stop), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in self._held())

    def _held(self) -> Parts:
        if self.disguised:
            return tuple(self._part(name) for name in self._names)
        return tuple(self._buffers.values())  # type: ignore[arg-type]  # all of them tensors, in every forward

    def _part(self, name: str) -> Tensor:
        part: Tensor = getattr(self, name)
        return part.detach().view(self.disguised[name]) if name in self.disguised else part

    def _apply(self, fn: Any, recurse: bool = True) -> StoredMatrix:
        """Move with the model, but keep dtypes: a cast of the scales would be another matrix."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, old in before.items():
            if (new := getattr(self, name)).dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, bits={self.bits}"


def _blocks(matrix: Tensor, block: int) -> Tensor:
    """(rows, columns) -> (rows, blocks, block) fp32, padded with zeros."""
    rows, columns = matrix.shape
    missing = -columns % block
    padded = nn.functional.pad(matrix.to(torch.float32), (0, missing))
    return padded.view(rows, (columns + missing) // block, block)


def _rounded_up(values: Tensor) -> Tensor:
    """bf16 numbers not below positive fp32 ones, so that nothing scaled by them overflows its codes."""
    nearest = values.to(STORED_DTYPE)
    above = torch.nextafter(nearest, nearest.new_full((), torch.inf))
    return torch.where(nearest.to(torch.float32) < values, above, nearest)


def _fractions(values: Tensor, scales: Tensor, steps: int) -> Tensor:
    """round(steps * values / scales), 0 where the scale is."""
    return torch.where(scales > 0, values * (steps / scales.clamp_min(1e-38)), 0.0).round()


def _make_bf16(matrix: Tensor) -> dict[str, Tensor]:
    return {"values": matrix.to(STORED_DTYPE).contiguous()}


def _make_int8(matrix: Tensor) -> dict[str, Tensor]:
    blocks = _blocks(matrix, BLOCKS[8])
    scales = _rounded_up(blocks.abs().amax(-1) / 127)
    held = scales.to(torch.float32).unsqueeze(-1)
    codes = _fractions(blocks, held, 1).to(torch.int8)
    return {"codes": codes.flatten(1), "scales": scales}


def _make_nf4(matrix: Tensor) -> dict[str, Tensor]:
    blocks = _blocks(matrix, BLOCKS[4])
    absmax = blocks.abs().amax(-1)
    scales = _rounded_up(absmax.amax(-1, keepdim=True))
    maxima = _fractions(absmax, scales.to(torch.float32), 255).to(torch.uint8)
    codes = nf4_codes(blocks.reshape(-1), BLOCKS[4])[0].view(matrix.shape[0], -1)
    return {"codes": codes, "maxima": maxima, "scales": scales}


def _empty(rows: int, columns: int, bits: int) -> dict[str, Tensor]:
    """The parts' shapes alone."""
    block = BLOCKS[bits]
    blocks = -(-columns // block)
    shapes = {
        16: {"values": (columns, STORED_DTYPE)},
        8: {"codes": (blocks * block, torch.int8), "scales": (blocks, STORED_DTYPE)},
        4: {
            "codes": (blocks * block // 2, torch.uint8),
            "maxima": (blocks, torch.uint8),
            "scales": (1, STORED_DTYPE),
        },
    }
    return {name: torch.empty(rows, each, dtype=kind, device="meta") for name, (each, kind) in shapes[bits].items()}


_MAKERS: dict[int, Callable[[Tensor], dict[str, Tensor]]] = {16: _make_bf16, 8: _make_int8, 4: _make_nf4}
