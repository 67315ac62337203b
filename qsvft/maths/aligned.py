"""Tensors at addresses that suit the processor: multiples of 64 bytes.

torch allocates there. A tensor that is mapped from a file lies where the file has it, and elsewhere two things differ:
BLAS takes other paths and sums in another order, so that a result depends on where its input happens to lie; and a
number at an address that is no multiple of its own size is undefined on some machines.
"""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 64
"""Bytes: a cache line, and a register of AVX-512."""


def aligned(tensor: Tensor, odd_only: bool = False) -> Tensor:
    """A tensor itself, or a copy of one in the CPU's memory that does not begin at a multiple of 64 bytes.

    Single bytes may lie anywhere: nothing sums them as they are.

    Args:
        tensor: of any dtype, on any device.
        odd_only: copy only what does not begin at a multiple of its own numbers' size.
    """
    multiple = tensor.element_size() if odd_only else ALIGNMENT
    if tensor.device.type != "cpu" or tensor.element_size() == 1 or tensor.data_ptr() % multiple == 0:
        return tensor
    return tensor.clone()
