"""The memory of a training step, predicted: ``qsvft.profile`` and what it is made of."""

from ..options.choices import CARDS_GIB, DEFAULT_METHODS, METHODS, PRESETS
from .description import Description, describe
from .fit.recommend import Recommendation, recommend
from .held import held_bytes
from .methods import Method, parse_method
from .profiler import profile
from .report import MemoryReport
from .rows import Measurement, Row

__all__ = [
    "CARDS_GIB",
    "DEFAULT_METHODS",
    "METHODS",
    "PRESETS",
    "Description",
    "Measurement",
    "MemoryReport",
    "Method",
    "Recommendation",
    "Row",
    "describe",
    "held_bytes",
    "parse_method",
    "profile",
    "recommend",
]
