"""The public names; importing them registers the method with PEFT and prepared directories with transformers."""

from .storage import bitsandbytes_notices as bitsandbytes_notices  # before anything imports bitsandbytes

# isort: split
from .checkpoint.making.streaming import prepare_checkpoint
from .exporting import export
from .formats.conversion import convert_to_lora, save_as_lora
from .lean import vocabulary as vocabulary
from .lean.chunked_loss import disable_chunked_loss, enable_chunked_loss
from .loading import from_pretrained, load
from .memory import MemoryReport, Recommendation, describe, held_bytes, profile, recommend
from .prepare import prepare
from .storage import blocks_over_rows as blocks_over_rows
from .storage.quantization import quantize
from .tuner import QSVFTConfig, QSVFTModel, auto_classes
from .tuner.calibration import calibrate
from .tuner.learning_rate import suggest_learning_rate
from .tuner.sharding import make_shardable
from .tuner.stop_at_nan import StopAtNaN
from .use_factors import use_factors

auto_classes.register(load)

__all__ = [
    "MemoryReport",
    "QSVFTConfig",
    "QSVFTModel",
    "Recommendation",
    "StopAtNaN",
    "calibrate",
    "convert_to_lora",
    "describe",
    "disable_chunked_loss",
    "enable_chunked_loss",
    "export",
    "from_pretrained",
    "held_bytes",
    "load",
    "make_shardable",
    "prepare",
    "prepare_checkpoint",
    "profile",
    "quantize",
    "recommend",
    "save_as_lora",
    "suggest_learning_rate",
    "use_factors",
    "vocabulary",
]
