"""qsvft: SVFT fine-tuning of quantised models, as a PEFT method.

    model = qsvft.prepare(model, bits=4)

Importing this package registers the method with PEFT.
"""

from .prepare import prepare
from .quantization import quantize
from .tuner import QSVFTConfig, QSVFTModel, held_bytes
from .version import __version__

__all__ = ["QSVFTConfig", "QSVFTModel", "__version__", "held_bytes", "prepare", "quantize"]
