"""QSVFT as a PEFT method: the only place that knows PEFT."""

from .config import QSVFTConfig
from .layer import QSVFTLinear
from .model import QSVFTModel
from .registration import register

register()

__all__ = ["QSVFTConfig", "QSVFTLinear", "QSVFTModel"]
