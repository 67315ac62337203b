"""qsvft: SVFT fine-tuning of quantised models, as a PEFT method.

    model = qsvft.prepare(model, bits=4)
    print(qsvft.profile("llama-3-8b"))

Importing this package registers the method with PEFT.
"""

from . import import_notices as import_notices  # before anything imports bitsandbytes
from .memory import MemoryReport, held_bytes, profile
from .prepare import prepare
from .quantization import quantize
from .tuner import QSVFTConfig, QSVFTModel
from .version import __version__

__all__ = [
    "MemoryReport",
    "QSVFTConfig",
    "QSVFTModel",
    "__version__",
    "held_bytes",
    "prepare",
    "profile",
    "quantize",
]
