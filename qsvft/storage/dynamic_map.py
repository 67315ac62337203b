"""bitsandbytes' 8-bit map for the maxima of double quantisation: the same 256 numbers on every processor.

Seven decades, 10^-6 to 1, each of 1, 2, 4, ... 64 means of neighbours among evenly spaced numbers between 0.1 and 1,
with either sign, and 0 and 1. ``bnb.functional.create_dynamic_map`` has torch space them out, which without fused
multiply-adds (``ATEN_CPU_CAPABILITY=default``) rounds 42 of the numbers otherwise, and so every weight. Here they are
rounded as with them.
"""

from __future__ import annotations

from functools import cache

import numpy
import numpy.typing
import torch
from torch import Tensor

_DECADES = 7


@cache
def dynamic_map() -> Tensor:
    """The numbers in ascending order, (256,) fp32 on the CPU."""
    numbers = numpy.array([0, 1], numpy.float32)
    for decade in range(_DECADES):
        means = numpy.float32(10.0 ** (decade + 1 - _DECADES)) * _means(2**decade)
        numbers = numpy.concatenate([numbers, means, -means])
    return torch.from_numpy(numpy.sort(numbers))


def _means(count: int) -> numpy.typing.NDArray[numpy.float32]:
    """The means of neighbours among ``count`` + 1 numbers from 0.1 to 1, each rounded once and counted from its end."""
    first, last = numpy.float32(0.1), numpy.float32(1)
    step = float((last - first) / numpy.float32(count))
    index = numpy.arange(count + 1)
    from_first, from_last = float(first) + step * index, float(last) - step * (count - index)
    numbers = numpy.where(index < (count + 1) // 2, from_first, from_last).astype(numpy.float32)
    return (numbers[:-1] + numbers[1:]) / numpy.float32(2)
