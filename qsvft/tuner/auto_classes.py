"""``AutoPeftModelFor...``, ``AutoModelFor...`` and ``pipeline``: of an adapter of ours the same as :func:`qsvft.load`.

PEFT and transformers would load the base as its checkpoint has it, on which an adapter that was trained in 4 bits is
refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.auto import _BaseAutoPeftModel
from transformers import AutoConfig, PreTrainedModel

from .config import QSVFTConfig

Load = Callable[..., PeftModel]

_OURS = {"adapter_name", "device_map", "dtype", "token"}
"""Arguments with one meaning for both; with others, such as a quantisation of the base, their own way is taken."""

_SETTLED = {"config", "adapter_kwargs", "revision", "trust_remote_code", "_from_auto", "_from_pipeline"}
"""What transformers' auto classes and pipelines add, of what the base's checkpoint says."""

_SAYING_NOTHING = {"dtype": "auto", "local_files_only": False}
"""Without them the same: the dtype is the one that the adapter records."""


def register(load: Load) -> None:
    """Do it, once.

    Args:
        load: :func:`qsvft.load`, which stands above this.
    """
    for cls, wrap in ((_BaseAutoPeftModel, _of_peft), (PreTrainedModel, _of_transformers)):
        if not hasattr(cls.from_pretrained, "__wrapped__"):
            cls.from_pretrained = classmethod(wrap(cls.from_pretrained.__func__, load))


def _of_peft(read: Callable[..., Any], load: Load) -> Callable[..., Any]:
    @functools.wraps(read)
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kw: Any,
    ) -> Any:
        place = str(pretrained_model_name_or_path)
        given = _given(kw)
        config = PeftConfig.from_pretrained(place) if set(given) <= _OURS else None
        if not isinstance(config, QSVFTConfig) or not config.base_model_name_or_path:
            return read(cls, pretrained_model_name_or_path, adapter_name, is_trainable, **kw)
        model = load(place, adapter_name=adapter_name, **given)
        if cls._target_peft_class is not None and not isinstance(model, cls._target_peft_class):
            raise _other_class(cls, place, model, cls._target_peft_class)
        return model if is_trainable else model.requires_grad_(False).eval()

    return from_pretrained


def _of_transformers(read: Callable[..., Any], load: Load) -> Callable[..., Any]:
    @functools.wraps(read)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kw: Any) -> Any:
        given = {name: value for name, value in _given(kw).items() if name not in _SETTLED}
        place = None if args or set(given) - _OURS else _on_fewer_bits(pretrained_model_name_or_path, kw)
        if place is None:
            return read(cls, pretrained_model_name_or_path, *args, **kw)
        model = load(place, **given).get_base_model()
        if not isinstance(model, cls):
            raise _other_class(cls, place, model, cls)
        model._hf_peft_config_loaded = True
        return model.requires_grad_(False).eval()

    return from_pretrained


def _on_fewer_bits(path_or_id: Any, kw: Mapping[str, Any]) -> str | None:
    """The adapter that is asked for, if it is one of ours whose base was in fewer bits than its checkpoint is, and
    nothing else is asked of the base."""
    options = dict(kw.get("adapter_kwargs") or {})
    place = options.pop("_adapter_model_path", path_or_id)  # an auto class names the base, and its adapter here
    if place is path_or_id and not (_has(place, "adapter_config.json") and not _has(place, "config.json")):
        return None
    if not os.path.isdir(place):
        place = snapshot_download(
            place, revision=options.get("revision"), token=options.get("token"), allow_patterns="adapter_*"
        )
    config = PeftConfig.from_pretrained(place)
    if not isinstance(config, QSVFTConfig) or config.held_base().get("bits", 16) == 16:
        return None
    base = AutoConfig.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    if getattr(base, "quantization_config", None) or _values(kw.get("config") or base) != _values(base):
        return None
    return str(place)


def _values(config: Any) -> dict[str, Any]:
    """All that a config says, what an auto class put into it of its arguments included, such as an attention; but the
    dtype, which is an argument of its own, and of which commit it is."""
    return {name: value for name, value in vars(config).items() if not name.endswith(("dtype", "commit_hash"))}


def _has(place: Any, name: str) -> bool:
    return place is not None and os.path.isfile(os.path.join(place, name))


def _given(kw: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that say something."""
    return {name: value for name, value in kw.items() if value is not None and _SAYING_NOTHING.get(name) != value}


def _other_class(cls: Any, place: str, model: Any, wanted: Any) -> ValueError:
    return ValueError(
        f"{cls.__name__}: {place} is an adapter of a {type(model).__name__}; expected one of a "
        f"{wanted.__name__}. Use the class of its task, or qsvft.load({place!r})."
    )
