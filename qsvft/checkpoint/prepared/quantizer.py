"""How transformers loads and saves a prepared model: a quantiser registered under ``quant_method: "qsvft"``.

    import qsvft
    model = AutoModelForCausalLM.from_pretrained(prepared)      # NF4 weights; the factors stay on disk
    model.save_pretrained(other)                                # weights and factors again, bit for bit

The weights are bitsandbytes' and go through transformers' own integration of it. The factors are further
tensors of the same files (:mod:`qsvft.storage.factor_files`), which the loader passes over: adapters read those that
they need, when they are attached. All is copied from the files. ``docs/prepared-format.md`` has the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from ...options.choices import BASE_BITS
from ...storage.alignment import own_tensors
from ...storage.factor_files import FactorFiles
from ...storage.quantization import disable_cpu_repacking, linear_names
from ...storage.tensor_index import INDEX_NAME, SINGLE_NAME
from ...storage.weights import dtype_name
from ...tuner.config import QSVFTConfig
from ...tuner.targets import shape_of
from ...version import __version__
from .check import Prepared, open_prepared
from .digests import CONFIG, TENSORS, as_text, config_sha256, tensor_record
from .layers import names_in_files, split_as_held, with_directions
from .model_state import state_of
from .record import METHOD, recorded_fields

FORMAT_VERSION = 1
_IGNORED = r"(^|\.)qsvft\."


@register_quantization_config(METHOD)
class PreparedConfig(BitsAndBytesConfig):
    """``quantization_config`` of a prepared model.

    Args:
        bits: 4 (NF4, double quantisation), 8 (int8) or 16 (the weights as they are), how the base is held.
        compute_dtype: the dtype that the weights had, by its name.
        skip_modules: linear layers that are left as they are.
        adapter: the fields of the :class:`~qsvft.QSVFTConfig` that the factors were made for.
        format_version: of the directory; a newer one than this library knows is refused.
        versions: what made the directory.
    """

    def __init__(
        self,
        bits: int = 4,
        compute_dtype: str = "bfloat16",
        skip_modules: list[str] | None = None,
        adapter: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        versions: dict[str, str] | None = None,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"quantization_config: found format_version {format_version!r}, this qsvft ({__version__}) reads "
                f"{FORMAT_VERSION}. Upgrade qsvft, or prepare the checkpoint again."
            )
        if bits not in BASE_BITS:
            raise ValueError(f"quantization_config: found bits={bits!r}, expected 4, 8 or 16; config.json is damaged")
        dtype = getattr(torch, str(compute_dtype), None)
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"quantization_config: found compute_dtype={compute_dtype!r}, expected float32, bfloat16 or float16; "
                "config.json is damaged"
            )
        super().__init__(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(skip_modules or []),
        )
        self.quant_method, self.bits = METHOD, bits
        self.adapter = recorded_fields(adapter or {}, "quantization_config")
        self.format_version, self.versions = format_version, versions or _versions()

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json; ``load_in_4bit`` is not, transformers would take it for bitsandbytes'."""
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "bits": self.bits,
            "compute_dtype": dtype_name(self.bnb_4bit_compute_dtype),
            "skip_modules": sorted(self.llm_int8_skip_modules or []),
            "adapter": self.adapter,
            "versions": self.versions,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "bitsandbytes")
    return {"qsvft": __version__, **{name: version(name).split("+")[0] for name in packages}}


@register_quantizer(METHOD)
class PreparedQuantizer(HfQuantizer):
    """The quantiser of a prepared model; one for each number of bits of the base, chosen when it is made."""

    quantization_config: PreparedConfig

    def __new__(cls, quantization_config: PreparedConfig | None = None, **_: Any) -> PreparedQuantizer:
        chosen = cls if quantization_config is None else _BY_BITS[quantization_config.bits]  # none where it is copied
        return object.__new__(chosen)

    def __init__(self, quantization_config: PreparedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: PreparedConfig describes a directory that qsvft prepared, found another model. "
                "Make one with qsvft.prepare_checkpoint(source, target), or load it with qsvft.from_pretrained(source)."
            )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of what is not quantised: what was asked for, or that of the weights before."""
        return self.quantization_config.bnb_4bit_compute_dtype if dtype is None else dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        prepared = open_prepared(_folder(model.name_or_path, kwargs.get("checkpoint_files")))
        prepared.check()
        self.folder, self._files = prepared.folder, FactorFiles(prepared.files.paths)
        split_as_held(prepared, model)
        held = {name: _quantised_shape(prepared, model, name) for name in linear_names(model)}
        _check_shapes(prepared, model, held)
        # Another class may have linear layers that the directory does not: a fresh head is no layer of 4 bits.
        self.quantization_config.llm_int8_skip_modules = [name for name, shape in held.items() if shape is None]
        result = super()._process_model_before_weight_loading(model, **kwargs)
        ignored = model._keys_to_ignore_on_load_unexpected  # a set; a list or None in the first releases of 5
        model._keys_to_ignore_on_load_unexpected = (
            {*ignored, _IGNORED} if isinstance(ignored, set) else [*(ignored or ()), _IGNORED]
        )
        return result

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        result = super()._process_model_after_weight_loading(model, **kwargs)
        files, config = self._files, self.quantization_config
        own_tensors(model)
        _settle(model, config)
        if config.adapter.get("residual"):
            _add_directions(model, files, config)
        model.qsvft_factors = files
        return result

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *_: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The weights as bitsandbytes saves them, without adapters, and the factors; and their digests."""
        tensors = state_of(model)
        if getattr(model, "_hf_peft_config_loaded", False) or not all(map(_in_memory, tensors.values())):
            return tensors, {}  # an adapter alone is saved; or what is on a disk, or another rank's
        records = {name: tensor_record(tensor) for name, tensor in tensors.items()}
        config = {**json.loads(model.config.to_json_string()), "dtype": dtype_name(model.dtype)}
        return tensors, {TENSORS: as_text(records), CONFIG: config_sha256(config)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Those of the quantiser alone: a prepared directory has the model's names, and its tensors as the model has
        them."""
        found: list[Any] = super().update_weight_conversions([], model)
        return found

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _in_memory(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta


class _NF4(PreparedQuantizer, Bnb4BitHfQuantizer):
    pass


class _Int8(PreparedQuantizer, Bnb8BitHfQuantizer):
    pass


class _AsItIs(PreparedQuantizer):
    pass


_BY_BITS = {4: _NF4, 8: _Int8, 16: _AsItIs}


def _folder(name: str, files: Sequence[str] | None) -> Path:
    """The directory that a model is loaded from, or the snapshot of its hub id."""
    if not files:
        raise ValueError(
            f"{name or 'the model'}: found a state dict, expected the files of a prepared directory, {SINGLE_NAME} or "
            f"{INDEX_NAME}: the factors are beside the weights. Load it by its path: from_pretrained(directory)."
        )
    folders = {Path(os.path.abspath(file)).parent for file in files}
    own = Path(os.path.abspath(name))
    if len(folders) > 1 or (own.is_dir() and not min(folders).is_relative_to(own)):
        raise ValueError(
            f"{Path(name) / INDEX_NAME}: it names files in {', '.join(map(str, sorted(folders)))}, expected the plain "
            "names of files in the same folder. Do not use this directory, or correct the index."
        )
    return Path(files[0]).parent


def _quantised_shape(prepared: Prepared, model: PreTrainedModel, name: str) -> list[int] | None:
    """Of a linear layer's weight, if the directory holds it quantised, under its name with or without a prefix."""
    found = (prepared.quantised_shape(one) for one in names_in_files(model, name))
    return next((shape for shape in found if shape is not None), None)


def _check_shapes(prepared: Prepared, model: PreTrainedModel, held: Mapping[str, list[int] | None]) -> None:
    for name, found in held.items():
        expected = list(shape_of(model.get_submodule(name), name))
        if found is not None and found != expected:
            raise ValueError(
                f"{prepared.folder}: found {name} quantised with the shape {found}; expected {expected}, which "
                f"{type(model).__name__} has by config.json. Copy the directory again, or prepare the checkpoint again."
            )


def _settle(model: PreTrainedModel, config: PreparedConfig) -> None:
    """What a model quantised in memory has, and one that transformers loads has not."""
    _keep_names(model)
    if config.bits == 16:
        return
    # transformers, accelerate and Trainer know by this name that the model must not be moved or cast.
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    disable_cpu_repacking(model)
    for module in model.modules():
        if hasattr(module, "source_cls"):
            module.qsvft_dtype = config.bnb_4bit_compute_dtype


def _keep_names(model: PreTrainedModel) -> None:
    """Save every tensor by its name in the model: transformers would take back the conversions of its loading."""
    vars(model)["_weight_conversions"] = []


def _add_directions(model: PreTrainedModel, files: FactorFiles, config: PreparedConfig) -> None:
    """Put the singular directions beside the quantised residuals."""
    adapter = QSVFTConfig(**config.adapter)
    for name, key, rank in files.residuals():
        model.set_submodule(name, with_directions(model.get_submodule(name), name, key, rank, files, adapter))


def mark_prepared(model: nn.Module, adapter: dict[str, Any]) -> None:
    """Let ``model.save_pretrained`` write a model that was prepared in memory as a prepared directory.

    Left as it is: what is no transformers model, a base that is not quantised or not in the format's NF4, a model that
    came from a prepared directory.

    Args:
        model: with adapters or without.
        adapter: the factor options of the adapter that it was prepared for.
    """
    held: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if not isinstance(model, PreTrainedModel) or type(held) is not BitsAndBytesConfig:
        return
    if held.load_in_4bit and (held.bnb_4bit_quant_type != "nf4" or not held.bnb_4bit_use_double_quant):
        return
    bits, dtype = 4 if held.load_in_4bit else 8, dtype_name(held.bnb_4bit_compute_dtype)
    record = PreparedConfig(bits, str(dtype), held.llm_int8_skip_modules, adapter)
    model.config.quantization_config = record
    model.hf_quantizer = PreparedQuantizer(record, pre_quantized=True)
    _keep_names(model)
