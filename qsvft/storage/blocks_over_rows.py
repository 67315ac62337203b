"""Mend bitsandbytes' 4-bit weights on CPUs with AVX512 where a block of 64 numbers reaches from one row into the next.

Blocks are counted through the whole weight. On such a CPU bitsandbytes (0.50 at least) reads a row of 16 j numbers as
if it began with a block of its own: with Gaussian weights and 4304 inputs, as in the vision towers of many models, what
it gives back is a fifth off, where NF4 is a tenth off, in training, when merging and without any adapter alike. A
weight read as one long row is right. Where a small weight comes back wrong, that is what is done from then on, in this
process, with weights of such shapes; all others, and all on CPUs and versions without the fault, are read as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import prod
from typing import Any

import bitsandbytes as bnb  # noqa: F401, whose kernels it registers
import torch
from torch import Tensor

OPERATOR = "bitsandbytes::dequantize_4bit"
BLOCK, ROWS, COLUMNS = 64, 4, 48


def reads_blocks_over_rows() -> bool:
    """Whether a weight whose blocks reach over its rows comes back as it is held."""
    absmax = torch.arange(1.0, 1.0 + ROWS * COLUMNS // BLOCK)
    codes = torch.full((ROWS * COLUMNS // 2, 1), 0xFF, dtype=torch.uint8)  # the last code: 1 of the block's maximum
    read = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, BLOCK, "nf4", [ROWS, COLUMNS], torch.float32)
    return torch.equal(read.flatten(), absmax.repeat_interleave(BLOCK))


def mend() -> torch.library.Library:
    """Read weights whose rows are no whole blocks as one long row; as before once what is returned is deleted."""
    previous = torch.library.get_kernel(OPERATOR, "CPU")

    def read(
        keys: Any, A: Tensor, absmax: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        if shape[-1] % block == 0 or shape[-1] % 2:  # odd rows are read by other code of bitsandbytes, which is right
            whole: Tensor = previous.call_boxed(keys, A, absmax, block, kind, shape, dtype)
            return whole
        row: Tensor = previous.call_boxed(keys, A, absmax, block, kind, [1, prod(shape)], dtype)
        return row.reshape(shape)

    library = torch.library.Library(OPERATOR.partition("::")[0], "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl("dequantize_4bit", read, "CPU", with_keyset=True, allow_override=True)  # as since torch 2.13
    return library


MENDED = None if reads_blocks_over_rows() else mend()
