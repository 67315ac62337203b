"""transformers' own ``model.load_adapter``, for our adapters: the checks of PEFT's door, and the same errors.

transformers puts in what a file has under the names that fit, whatever it is; ``AutoModel.from_pretrained`` on an
adapter's directory ends there as well. Other methods' adapters go its own way.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from peft import inject_adapter_in_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor
from transformers.utils.loading_report import LoadStateDictInfo

from .adapted import AdaptedLinear
from .config import QSVFTConfig
from .peft_type import PREFIX

_looking: ContextVar[bool] = ContextVar("looking for a config of ours", default=False)


class _OursError(Exception):
    """An adapter whose config was just read is one of ours."""

    def __init__(self, config: QSVFTConfig) -> None:
        super().__init__()
        self.config = config


def has_read(config: QSVFTConfig) -> None:
    """A config of ours was read: where transformers is about to load its adapter, it is taken over here."""
    if _looking.get():
        raise _OursError(config)


def checked(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftAdapterMixin.load_adapter``, which hands our adapters over before anything is done to the model."""

    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(load).bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        config = given["peft_config"]
        if config is None:
            token = _looking.set(True)
            try:
                return load(self, *args, **kwargs)
            except _OursError as found:
                config = found.config
            finally:
                _looking.reset(token)
        if not isinstance(config, QSVFTConfig):
            return load(self, *args, **kwargs)
        if given["hotswap"] is True:
            raise ValueError(
                "load_adapter(hotswap=True): found an adapter of QSVFT, expected LoRA. Leave it out, and load it under "
                "another name; a PeftModel takes peft.utils.hotswap.hotswap_adapter(model, folder, adapter_name)."
            )
        name = given["adapter_name"] or "default"
        if name in getattr(self, "peft_config", {}):
            raise ValueError(
                f"load_adapter(): the model has an adapter '{name}' already; expected another adapter_name."
            )
        return _load(self, config, name, given["adapter_state_dict"], given["is_trainable"])

    return load_adapter


def lacking(where: object, error: KeyError) -> ValueError:
    """In place of PEFT's KeyError: an adapter's tensors lack what its config trains whole."""
    return ValueError(
        f"{where}: the adapter's file has no {error.args[0]}, which its config wants (modules_to_save, "
        "trainable_token_indices); it is incomplete, or the config was changed. Copy or save the adapter again."
    )


def _load(
    model: Any, config: QSVFTConfig, name: str, tensors: Mapping[str, Tensor] | None, trainable: bool
) -> LoadStateDictInfo:
    config.inference_mode = not trainable
    inject_adapter_in_model(config, model, name)
    model._hf_peft_config_loaded = True
    try:
        if tensors is None:
            assert config.where_read is not None
            directory, subfolder, options = config.where_read
            tensors = load_peft_weights(directory, device="cpu", subfolder=subfolder, **options)
        # A model that is no PeftModel has no such prefix, and PEFT looks up modules_to_save by its own names.
        set_peft_model_state_dict(model, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}, name)
    except BaseException as error:
        model.delete_adapter(name)
        if isinstance(error, KeyError):
            raise lacking("load_adapter()", error) from error
        raise
    if not trainable:
        model.eval()
        for module in model.modules():
            if isinstance(module, AdaptedLinear):
                module.requires_grad_(False)
    names = [field.name for field in dataclasses.fields(LoadStateDictInfo)]
    found: dict[str, Any] = {"error_msgs": [], "conversion_errors": {}}
    return LoadStateDictInfo(**{name: found.get(name, set()) for name in names})
