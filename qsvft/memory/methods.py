"""The methods that the profiler compares, each built through its own package.

A method is written ``name``, ``name:64`` (a rank) or ``name:key=value,key=value``. Every method takes
``chunked_loss=true`` (see :mod:`qsvft.lean.cross_entropy`); qsvft has it unless told otherwise.

===============  ==============================================================================
floor            NF4 base, no adapter: what no method can beat
full             full fine-tuning in bf16
lora             PEFT's LoRA on a bf16 base, rank 16 on all linears
qlora            the same on an NF4 base
qlora-kbit       the same after PEFT's prepare_model_for_kbit_training, as most tutorials do
dora, vera, boft PEFT's, on a bf16 base
svft             plain SVFT: U, s, V in bf16 at full rank in place of W, diagonal M
svft-authors     SVFT with the dense W' = U (S + M) Vᵀ rebuilt in each forward
qsvft            this package's default: NF4 base, dense M between 128 directions of each side
===============  ==============================================================================
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import (
    BOFTConfig,
    LoraConfig,
    PeftConfig,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..lean.chunked_loss import enable_chunked_loss
from ..lean.norms import lean_norms
from ..lean.offload import offload_checkpoints
from ..lean.tiles import tile_mlps
from ..lean.vocabulary import quantize_embeddings
from ..options.adapter import OPTIONS
from ..options.option import INTEGER
from ..options.switches import SWITCHES
from ..storage.experts import expert_parameters, split_experts
from ..storage.quantization import quantize
from ..storage.shapes_only import shapes_only
from ..tuner.config import QSVFTConfig
from ..tuner.targets import check_targets
from ..tuner.tasks import left_whole
from .factored import factor_linears
from .shapes import nf4_on_meta

COUNTED = {name: one for name, one in {**OPTIONS, **SWITCHES}.items() if one.counted}
"""The options that the ledger counts."""

WRITTEN = {
    name: one.kind for name, one in COUNTED.items() if one.kind.read is not None and name != "gradient_checkpointing"
}
"""Those that a method's text can say; gradient checkpointing is the whole profile's."""

PEFT = "peft"
"""The name of a method that a config stands for, and no text."""

_OLDER_NAMES = {"offload_checkpoints": "offload"}
_RANKED = {"lora": 16, "qlora": 16, "qlora-kbit": 16, "dora": 16, "vera": 256, "boft": 4}


@dataclass(frozen=True)
class Method:
    """A parsed method: ``label`` is what the user wrote."""

    label: str
    name: str
    options: dict[str, Any]

    @property
    def bits(self) -> int:
        """How the base is held."""
        if self.name in ("qsvft", PEFT):
            return int(self.options.get("bits", 4))
        return 4 if self.name in ("floor", "qlora", "qlora-kbit") else 16

    @property
    def chunked_loss(self) -> bool:
        """Whether the loss goes through the logits in chunks."""
        return bool(self.options.get("chunked_loss", self.name == "qsvft"))

    @classmethod
    def of(cls, label: str, config: PeftConfig, bits: int = 16, **options: Any) -> Method:
        """The method of any config of PEFT's.

        Args:
            label: its name in a report.
            config: the adapter's.
            bits: how the base is held: 16 or 4.
            **options: chunked_loss, offload, tile_mlp.
        """
        return cls(label, PEFT, {"config": config, "bits": bits, **options})

    def config(self) -> QSVFTConfig:
        """qsvft's."""
        fields = {key: value for key, value in self.options.items() if key in OPTIONS}
        return QSVFTConfig(task_type="CAUSAL_LM", **fields)


def parse_method(text: str) -> Method:
    """Parse ``qlora:64`` or ``qsvft:rank=1024,pattern=plain``.

    Raises:
        ValueError: one line naming what was found and what is allowed.
    """
    name, _, rest = text.partition(":")
    if name not in _BUILDERS or name == PEFT:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(written_methods())}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = "rank", key
        key = _OLDER_NAMES.get(key, key)
        options[key] = _value(text, name, key, value)
        if name == "qsvft" and key == "rank" and value == "full" and "pattern=" not in rest:
            raise ValueError(f"method {text!r}: a dense M takes a number as its rank; rank=full wants another pattern=")
    return Method(text, name, options)


def written_methods() -> list[str]:
    """The methods that have a text."""
    return [name for name in _BUILDERS if name != PEFT]


def _value(text: str, name: str, key: str, value: str) -> Any:
    allowed = ("bits", *WRITTEN) if name == "qsvft" else (*(("rank",) if name in _RANKED else ()), "chunked_loss")
    if key not in allowed:
        raise ValueError(f"method {text!r}: unknown option {key!r}; {name} takes {', '.join(allowed)}")
    if key == "rank" and value == "full" and name == "qsvft":
        return None
    kind = WRITTEN.get(key, INTEGER)
    assert kind.read is not None
    try:
        found = kind.read(value)
        if key == "rank" and found < 1:
            raise ValueError(value)
        return found
    except ValueError as error:
        raise ValueError(f"method {text!r}: {key} must be {kind.expected}, got {value!r}") from error


def build(method: Method, model: PreTrainedModel) -> nn.Module:
    """Turn a frozen bf16 model (on meta or real) into one that the method trains, in place."""
    meta = next(model.parameters()).is_meta
    if method.bits == 4:
        if method.name in ("floor", "qsvft"):
            split_experts(model)
        # transformers' and bitsandbytes' 4 bits, which the others stand on, leave experts in parameters dense.
        dense = [name for name, module in model.named_modules() if expert_parameters(module)]
        left = [*(_residual_layers(method, model) if method.name == "qsvft" else ()), *_trained_whole(method, model)]
        model = nf4_on_meta(model, left) if meta else quantize(model, 4, dense, progress=False, skip_layers=left)
    with shapes_only():
        built = _BUILDERS[method.name](method, model)
    if method.chunked_loss:
        enable_chunked_loss(model)
    if method.options.get("offload"):
        offload_checkpoints(model)
    if method.options.get("tile_mlp"):
        tile_mlps(model)
    return built.to("meta") if meta else built


def _trained_whole(method: Method, model: PreTrainedModel) -> list[str]:
    """The layers of heads, which train whole and are therefore not quantised."""
    config = method.options.get("config")
    heads = [] if config is None else [*(getattr(config, "modules_to_save", None) or ()), *left_whole(config)]
    return [name for name, _ in model.named_modules() if any(part in heads for part in name.split("."))]


def _residual_layers(method: Method, model: PreTrainedModel) -> list[str]:
    """The layers that a residual base quantises by itself."""
    config = method.config()
    with shapes_only():
        return check_targets(model, config) if config.residual_base else []


def _floor(method: Method, model: PreTrainedModel) -> nn.Module:
    # Something has to ask for gradients, or there is no backward to count.
    model.enable_input_require_grads()
    return model


def _full(method: Method, model: PreTrainedModel) -> nn.Module:
    return model.requires_grad_(True)


def _peft(make: Callable[[int], PeftConfig], kbit: bool = False) -> Callable[[Method, PreTrainedModel], nn.Module]:
    def builder(method: Method, model: PreTrainedModel) -> nn.Module:
        if kbit:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return _with_adapter(model, make(method.options.get("rank", _RANKED[method.name])))

    return builder


def _any_of_peft(method: Method, model: PreTrainedModel) -> nn.Module:
    return _with_adapter(model, method.options["config"])


def _with_adapter(model: PreTrainedModel, config: PeftConfig) -> nn.Module:
    meta = next(model.parameters()).is_meta
    without_values = _boft_without_values() if meta and isinstance(config, BOFTConfig) else nullcontext()
    with warnings.catch_warnings(), without_values:
        # BOFT says that its CUDA extension could not be compiled; the bytes do not depend on it.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft.tuners.boft")
        return get_peft_model(model, config)


@contextmanager
def _boft_without_values() -> Iterator[None]:
    """PEFT fills BOFT's permutation matrices on the CPU, 27 GiB for a 7B model; on meta they get no values."""
    with torch.device("meta"), patch.object(BOFTLayer, "perm2mat", _square):
        yield


def _square(_: object, order: Tensor) -> Tensor:
    return torch.empty(2 * order.shape, dtype=torch.float32)


def _lora(rank: int) -> PeftConfig:
    return LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def _dora(rank: int) -> PeftConfig:
    return LoraConfig(r=rank, target_modules="all-linear", lora_dropout=0.0, use_dora=True, task_type="CAUSAL_LM")


def _vera(rank: int) -> PeftConfig:
    return VeraConfig(r=rank, target_modules="all-linear", vera_dropout=0.0, task_type="CAUSAL_LM")


def _boft(rank: int) -> PeftConfig:
    return BOFTConfig(boft_block_size=rank, target_modules="all-linear", boft_dropout=0.0, task_type="CAUSAL_LM")


def _svft(method: Method, model: PreTrainedModel) -> nn.Module:
    return factor_linears(model, rebuild=False)


def _authors(method: Method, model: PreTrainedModel) -> nn.Module:
    return factor_linears(model, rebuild=True)


def _qsvft(method: Method, model: PreTrainedModel) -> nn.Module:
    bits = method.options.get("quantize_embeddings", 16)
    if bits != 16:
        quantize_embeddings(model, bits)
    return get_peft_model(lean_norms(model), method.config())


_BUILDERS: dict[str, Callable[[Method, PreTrainedModel], nn.Module]] = {
    "floor": _floor,
    "full": _full,
    "lora": _peft(_lora),
    "qlora": _peft(_lora),
    "qlora-kbit": _peft(_lora, kbit=True),
    "dora": _peft(_dora),
    "vera": _peft(_vera),
    "boft": _peft(_boft),
    "svft": _svft,
    "svft-authors": _authors,
    "qsvft": _qsvft,
    PEFT: _any_of_peft,
}
