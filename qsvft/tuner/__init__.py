"""QSVFT as a PEFT method."""

from .config import QSVFTConfig
from .layer import QSVFTLinear
from .model import QSVFTModel
from .registration import register

register()

__all__ = ["QSVFTConfig", "QSVFTLinear", "QSVFTModel"]
