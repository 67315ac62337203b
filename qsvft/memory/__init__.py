"""The memory of a training step, predicted: ``qsvft.profile`` and what it is made of."""

from .held import held_bytes
from .methods import DEFAULT_METHODS, METHODS, Method, parse_method
from .presets import PRESETS
from .profiler import profile
from .report import CARDS_GIB, Measurement, MemoryReport, Row

__all__ = [
    "CARDS_GIB",
    "DEFAULT_METHODS",
    "METHODS",
    "PRESETS",
    "Measurement",
    "MemoryReport",
    "Method",
    "Row",
    "held_bytes",
    "parse_method",
    "profile",
]
