"""The model that a checkpoint is of, on the meta device: class, shapes, dtypes and ties as from_pretrained has them."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...storage.left_dense import under
from ...storage.split_weights import whole_weights
from ...storage.tensor_index import INDEX_NAME, read_index
from .checkpoint import Checkpoint
from .index import CONFIG
from .renames import dtype_pattern

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes that a floating-point weight may be stored in."""


_LAYERS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of ``config.architectures[0]``.

    Raises:
        ValueError: no architecture is named, transformers has no such model, or the checkpoint is quantised already.
    """
    where = _place(config)
    _check_not_quantised(config)
    names = getattr(config, "architectures", None)
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(
            f"{where}: found architectures = {names!r}, expected the name of a transformers class, e.g. "
            "['LlamaForCausalLM']. Load the checkpoint with the class that you want and save it with save_pretrained()."
        )
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        own_code = " The config asks for custom code (auto_map), which is not run." if _auto_map(config) else ""
        raise ValueError(
            f"{where}: found the architecture {names[0]!r}, expected a model of transformers "
            f"{transformers.__version__}.{own_code} Upgrade transformers if it is a newer model; load a model of "
            "custom code by yourself and use qsvft.prepare()."
        )
    return found


def _place(config: PretrainedConfig) -> str:
    return os.path.join(config.name_or_path, "config.json") if config.name_or_path else type(config).__name__


def _check_not_quantised(config: PretrainedConfig) -> None:
    for field in ("quantization_config", "compression_config"):
        if (quantised := getattr(config, field, None)) is not None:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
            raise ValueError(
                f"{_place(config)}: found a checkpoint that is quantised already ({field}, method {method!r}), "
                "expected weights in 16 or 32 bits. Use the checkpoint that it was made from."
            )


_OF_VALUES = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)
"""What a model's own code raises for values in a config that it did not foresee."""


def load_base(
    config: PretrainedConfig | None,
    path_or_id: str | os.PathLike[str],
    brought: Collection[str] = (),
    kind: Any = None,
    **options: Any,
) -> Any:
    """The model of a checkpoint, of the class that its config names, a causal language model where it names none.

    Args:
        config: the checkpoint's.
        path_or_id: where it is.
        brought: modules that it may lack, by any part of their names, since an adapter has them.
        kind: another class than the config names, whose head an adapter brings.
        **options: as in transformers' ``from_pretrained``.

    Raises:
        ValueError: weights are missing, which transformers would make up; the index places some elsewhere; a config
            holds values that make no model.
    """
    index = Path(path_or_id, INDEX_NAME)
    if index.is_file():
        read_index(index)  # transformers would go where it points
    cls: Any = kind if kind is not None else getattr(transformers, _class_name(config), AutoModelForCausalLM)
    if kind is not None:  # the base may have a head of its own, of another size
        options["ignore_mismatched_sizes"] = True
    try:
        with whole_weights():
            model, report = cls.from_pretrained(
                path_or_id, output_loading_info=True, trust_remote_code=False, **options
            )
    except _OF_VALUES as error:
        raise ValueError(
            f"{path_or_id}: transformers {transformers.__version__} makes no {cls.__name__} of its {CONFIG} and "
            f"generation_config.json ({type(error).__name__}: {_first_line(error)}). One of them seems damaged: copy "
            "or download the checkpoint again."
        ) from error
    other = [key if isinstance(key, str) else key[0] for key in report["mismatched_keys"]]
    missing = sorted(key for key in {*report["missing_keys"], *other} if not under(key, brought))
    if missing:
        raise ValueError(
            f"{path_or_id}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}; expected all of them. transformers would make them up at random. Copy or "
            "download the checkpoint again, or save it from the class that it is to be loaded as."
        )
    return model


def _class_name(config: PretrainedConfig | None) -> str:
    names = getattr(config, "architectures", None) or [""]
    return str(names[0]) if isinstance(names, (list, tuple)) else ""


def read_config(path_or_id: str | os.PathLike[str]) -> PretrainedConfig:
    """The config of a checkpoint; code that comes with it is not run.

    Raises:
        OSError: there is no such hub id, or it cannot be reached.
        ValueError: transformers cannot read it.
    """
    try:
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)
    except Exception as error:  # a config's values are checked by each model's own code
        if isinstance(error, OSError) and not os.path.isdir(path_or_id):
            raise
        raise ValueError(
            f"{Path(path_or_id, CONFIG)}: transformers {transformers.__version__} cannot read it "
            f"({_first_line(error)}). Expected the config of a model that is part of transformers: custom code "
            "(auto_map) is not run. Upgrade transformers if it is a newer model."
        ) from error


def readable_config(path_or_id: str | os.PathLike[str], hub: Mapping[str, Any]) -> PretrainedConfig | None:
    """The config of a checkpoint, None where it cannot be read: what opens the checkpoint says why."""
    try:
        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False, **hub)
    except Exception:  # a config's values are checked by each model's own code
        return None


def empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, kind: Any = None, outputs: Mapping[str, int] | None = None
) -> PreTrainedModel:
    """The checkpoint's model on the meta device, frozen and in eval mode.

    Every tensor of its state dict has the shape and dtype that ``from_pretrained(dtype=...)`` would give it:
    parameters that transformers keeps in fp32 are fp32. Weights are tied as the config says.

    Args:
        checkpoint: where its config is.
        dtype: of the parameters; None takes that of the config, or else that of the checkpoint's first
            floating-point tensor, as ``dtype="auto"`` does.
        kind: another class than the config names, whose head an adapter brings.
        outputs: of that head, as fields of the config.

    Raises:
        ValueError: what :func:`model_class` and :func:`read_config` refuse, a dtype that is no floating-point one, or a
            config of which transformers cannot build a model.
    """
    config = read_config(checkpoint.folder)
    _check_layers(config, checkpoint)
    if kind is None:
        cls: Any = model_class(config)
    else:
        cls = kind
        _check_not_quantised(config)
    for name, value in (outputs or {}).items():
        setattr(config, name, value)
    chosen = dtype if dtype is not None else _own_dtype(config, checkpoint)
    if chosen not in FLOATS:
        raise ValueError(
            f"dtype: found {chosen}, expected one of {', '.join(map(str, FLOATS))}; give another one to "
            "prepare_checkpoint(dtype=...)."
        )
    config.dtype = chosen
    for key in config.sub_configs if dtype is not None else ():
        if (part := getattr(config, key, None)) is not None:
            part.dtype = dtype
    try:
        model = on_meta(config, cls, chosen)
    except Exception as error:
        raise ValueError(
            f"{checkpoint.folder / CONFIG}: transformers cannot build {cls.__name__} of it ({_first_line(error)}). "
            "Expected a config that belongs to the checkpoint: copy or download it again."
        ) from error
    model.config.name_or_path = checkpoint.name
    return model.requires_grad_(False).eval()


def on_meta(config: PretrainedConfig, kind: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model without values.

    Args:
        config: of it.
        kind: its class, or one of transformers' Auto classes.
        dtype: of its tensors, but for those that transformers keeps in fp32.
    """
    make = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    with whole_weights(), torch.device("meta"):
        model: PreTrainedModel = make(config, dtype=dtype)
    _keep_in_fp32(model, dtype)
    return model


def _check_layers(config: PretrainedConfig, checkpoint: Checkpoint) -> None:
    """Refuse more layers than the checkpoint has tensors, before a million of them are built."""
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        for field in _LAYERS:
            count = getattr(part, field, None)
            if isinstance(count, int) and count > len(checkpoint.entries):
                raise ValueError(
                    f"{checkpoint.folder / CONFIG}: found {field} = {count}, expected no more layers than the "
                    f"checkpoint has tensors, which are {len(checkpoint.entries)}. Copy or download it again."
                )


def _own_dtype(config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    first = min(checkpoint.shards)
    inside = [key for key, entry in checkpoint.entries.items() if entry.file == first]
    floats = (checkpoint.entries[key].dtype for key in sorted(inside))
    return next((kind for kind in floats if kind in FLOATS), torch.float32)


def _keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give the tensors that transformers never holds in 16 bits (or never in fp16) the dtype fp32."""
    names: set[str] = set()
    if dtype == torch.float16:
        names |= set(_listed(model, "_keep_in_fp32_modules"))
    if dtype in (torch.float16, torch.bfloat16):
        names |= set(_listed(model, "_keep_in_fp32_modules_strict"))
    if not names:
        return
    pattern = dtype_pattern(sorted(names))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)


def _listed(model: nn.Module, field: str) -> Iterable[str]:
    return getattr(model, field, None) or ()


def _auto_map(config: PretrainedConfig) -> Any:
    return getattr(config, "auto_map", None)


def _first_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
