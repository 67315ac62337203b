"""The same values at another address: what comes out may not depend on where a tensor lies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

OFFSETS = (4, 38, 56)
"""Bytes past a multiple of 64: seen in mapped files. 38 is no multiple of an fp32 number's four bytes."""


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A contiguous copy of a tensor that begins at ``offset`` bytes past a multiple of 64."""
    nbytes = tensor.numel() * tensor.element_size()
    room = torch.empty(nbytes + 128, dtype=torch.uint8).untyped_storage()
    begin = -room.data_ptr() % 64 + offset
    # Of a slice of storage torch takes any address; a view must begin at a whole number of elements.
    copy = torch.tensor([], dtype=torch.uint8).set_(room[begin : begin + nbytes]).view(tensor.dtype)
    copy = copy.view(tensor.shape).copy_(tensor)
    assert copy.data_ptr() % 64 == offset
    return copy


def place_data(path: Path, offset: int) -> None:
    """Let the data of a safetensors file begin at ``offset`` bytes past a multiple of 64: the format allows it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip(b" ")
    header += b" " * ((offset - 8 - len(header)) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
