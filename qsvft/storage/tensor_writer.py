"""Writing a safetensors file whose tensors can be computed with where they lie in it.

    8 bytes     length of the header
    header      JSON, padded with spaces so that the data begins at a multiple of 64 bytes
    data        the tensors one after the other, without gaps

The format allows no gaps, so the order does it: first the tensors whose bytes are a multiple of 64, then those of 32,
16 and so on. Each then begins at a multiple of the power of two that divides its own bytes, up to 64: never within
one of its own numbers, and at a multiple of 64 wherever its bytes are one. A file is mapped at a page, so that
the same holds of addresses. (safetensors' own writer goes by dtype and name, after a header of any multiple of 8.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from ..maths.aligned import ALIGNMENT
from .digests import tensor_bytes

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The dtypes that a file may hold, by safetensors' names."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""And back."""


def write_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Write a file.

    Args:
        tensors: by name.
        path: where to.
        metadata: ``__metadata__`` of the header.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_divisor(item[1].nbytes), item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in ordered:
        extent = [position, position + tensor.nbytes]
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": extent}
        position = extent[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor_bytes(tensor))


def _divisor(nbytes: int) -> int:
    """The largest power of two, up to 64, that divides a number of bytes."""
    return min(nbytes & -nbytes, ALIGNMENT) or ALIGNMENT
