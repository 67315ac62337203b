"""qsvft: SVFT fine-tuning of quantised models, as a PEFT method.

    model = qsvft.prepare(model, bits=4)
    print(qsvft.profile("llama-3-8b"))
    print(qsvft.recommend("llama-3-8b", card_gib=8))

Importing this package registers the method with PEFT.
"""

from . import import_notices as import_notices  # before anything imports bitsandbytes
from .checkpoint.loading import from_pretrained
from .checkpoint.streaming import prepare_checkpoint
from .chunked_loss import disable_chunked_loss, enable_chunked_loss
from .memory import MemoryReport, Recommendation, describe, held_bytes, profile, recommend
from .prepare import prepare
from .quantization import quantize
from .tuner import QSVFTConfig, QSVFTModel
from .use_factors import use_factors
from .version import __version__

__all__ = [
    "MemoryReport",
    "QSVFTConfig",
    "QSVFTModel",
    "Recommendation",
    "__version__",
    "describe",
    "disable_chunked_loss",
    "enable_chunked_loss",
    "from_pretrained",
    "held_bytes",
    "prepare",
    "prepare_checkpoint",
    "profile",
    "quantize",
    "recommend",
    "use_factors",
]
