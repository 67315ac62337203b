"""Make QSVFT a PEFT method, once, at import.

PEFT's own ``register_peft_method`` does it, once the method has its member of ``PeftType`` (:mod:`.peft_type`). Without
``import qsvft`` in the process, ``PeftModel.from_pretrained`` on such an adapter ends in ``KeyError: 'QSVFT'``.

Of PEFT's functions these are wrapped, and do what they did but for our adapters: ``save_pretrained`` takes
``include_factors=`` (and would pass over it); ``push_to_hub`` sends the adapter's own card; a config remembers where it
was read, because PEFT hands an adapter's config on without saying so; options that are gone are refused, which PEFT
would leave out with a warning; and so is a file that lacks what its config trains whole, by its name. One of
transformers' is as well, ``load_adapter`` (:mod:`.load_adapter`). What reads ``adapter_config.json``, before anyone
knows whose adapter it is, says of a damaged one which file it is.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, register_peft_method
from transformers.integrations.peft import PeftAdapterMixin

from ..lean.vocabulary import vocabulary_of
from ..storage.json_files import read_object
from ..storage.whole_folders import finish_saving, whole_folder
from .adapter_file import m_key
from .card import CARD, tag_card, write_card
from .config import QSVFTConfig
from .hotswap import enable_hotswap
from .load_adapter import checked, has_read, lacking
from .model import QSVFTModel, named_layers
from .peft_type import NAME, PREFIX, QSVFT
from .push import with_its_card
from .removed import without_removed


def register() -> None:
    """Register the config and the tuner; calling it again does nothing."""
    if QSVFT in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    register_peft_method(name=NAME, config_cls=QSVFTConfig, model_cls=QSVFTModel)
    PeftModel.save_pretrained = _with_factors(PeftModel.save_pretrained)
    PeftModel.push_to_hub = with_its_card(PeftModel.push_to_hub)
    PeftConfigMixin.from_pretrained = classmethod(_remembering(PeftConfigMixin.from_pretrained.__func__))
    PeftConfigMixin.from_json_file = classmethod(_of_a_whole_file(PeftConfigMixin.from_json_file.__func__))
    PeftConfigMixin._get_peft_type = classmethod(_of_a_known_type(PeftConfigMixin._get_peft_type.__func__))
    PeftConfigMixin.from_peft_type = classmethod(_of_this_version(PeftConfigMixin.from_peft_type.__func__))
    PeftModel.load_adapter = _of_a_whole_state(PeftModel.load_adapter)
    PeftAdapterMixin.load_adapter = checked(PeftAdapterMixin.load_adapter)
    enable_hotswap()


def _with_factors(save: Callable[..., None]) -> Callable[..., None]:
    """``PeftModel.save_pretrained`` of our adapters: weights and config as one state, and with ``include_factors``."""

    @functools.wraps(save)
    def save_pretrained(
        self: PeftModel, save_directory: Any, *args: Any, include_factors: bool | None = None, **kwargs: Any
    ) -> None:
        given = inspect.signature(save).bind(self, save_directory, *args, **kwargs).arguments
        names = given.get("selected_adapters") or list(self.peft_config)
        configs = [self.peft_config[name] for name in names if isinstance(self.peft_config.get(name), QSVFTConfig)]
        if include_factors is not None:
            _check_include_factors(self, names, configs, include_factors, given)
        if configs and len(configs) == len(names) and not given.get("is_main_process", True):
            return None  # PEFT would select and digest a state that it does not write, and that may be a shard
        if not configs or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            return save(self, save_directory, *args, **kwargs)
        if "save_embedding_layers" not in given and not vocabulary_of(self.get_base_model()):
            kwargs["save_embedding_layers"] = False  # PEFT asks a model of sound or pictures for its embeddings
        if (part := given.get("kwargs", {}).get("state_dict")) is not None:
            _check_complete(self, names, part)
        before = [config.include_factors for config in configs]
        try:
            for config in configs:
                config.include_factors = config.include_factors if include_factors is None else bool(include_factors)
            with whole_folder(Path(save_directory)) as staging:
                with suppress(FileNotFoundError):  # PEFT adds to a model card that is there
                    shutil.copyfile(Path(save_directory) / CARD, staging / CARD)
                written = (staging / CARD).is_file()
                save(self, str(staging), *args, **kwargs)
                if written:
                    tag_card(staging)
                elif (staging / CARD).is_file():
                    write_card(staging, configs[0])
        finally:
            for config, value in zip(configs, before, strict=True):
                config.include_factors = value

    return save_pretrained


def _check_complete(model: PeftModel, names: list[str], state: Mapping[str, Any]) -> None:
    """Refuse to write a part of an adapter, which no one could load, over a whole one."""
    for adapter in names:
        layers = [name for name, _ in named_layers(model, adapter)]
        if missing := [name for name in layers if m_key(name, adapter) not in state]:
            raise ValueError(
                f"save_pretrained(state_dict=...): it has M of {len(layers) - len(missing)} of the {len(layers)} "
                f"layers of adapter '{adapter}', not of {missing[0].removeprefix(PREFIX)}; expected all. Give the "
                "whole state, such as accelerator.get_state_dict(model), or leave state_dict out."
            )


def _check_include_factors(
    model: PeftModel, names: list[str], configs: list[QSVFTConfig], include_factors: bool, given: dict[str, Any]
) -> None:
    if not configs:
        kinds = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
        raise ValueError(
            f"save_pretrained(include_factors=...): none of the adapters {names} is a QSVFT one (found "
            f"{', '.join(kinds)}); expected one. Leave include_factors out."
        )
    if include_factors and not given.get("safe_serialization", True):
        raise ValueError(
            "save_pretrained(include_factors=True): factors are read from a safetensors file; expected "
            "safe_serialization=True. Leave safe_serialization out."
        )


def _remembering(read: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftConfig.from_pretrained``, after which our configs know where their adapter is."""

    @functools.wraps(read)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        folder = Path(str(pretrained_model_name_or_path), subfolder or "")
        for one in (folder, folder.parent):  # PEFT saves an adapter of another name one directory further down
            finish_saving(one)
        config = read(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, QSVFTConfig):
            config.read_from(str(pretrained_model_name_or_path), subfolder, kwargs)
            has_read(config)
        return config

    return from_pretrained


def _of_a_whole_file(read: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftConfig.from_json_file``, which names the file where it is no JSON object."""

    @functools.wraps(read)
    def from_json_file(cls: Any, path_json_file: Any, **kwargs: Any) -> Any:
        read_object(Path(path_json_file))
        return read(cls, path_json_file, **kwargs)

    return from_json_file


def _of_a_whole_state(load: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftModel.load_adapter``, which says what the file lacks of that which its config trains whole."""

    @functools.wraps(load)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, model_id, adapter_name, *args, **kwargs)
        except KeyError as error:
            if not isinstance(self.peft_config.get(adapter_name), QSVFTConfig):
                raise
            for _, layer in named_layers(self, adapter_name):
                layer.refuse(adapter_name)
            raise lacking(model_id, error) from error

    return load_adapter


def _of_a_known_type(read: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftConfig._get_peft_type``, which names the file where it says of no method that it is one of."""

    @functools.wraps(read)
    def _get_peft_type(cls: Any, model_id: Any, **kwargs: Any) -> Any:
        try:
            found = read(cls, model_id, **kwargs)
        except KeyError:
            found = None
        if not isinstance(found, str) or found not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(
                f"{Path(str(model_id), kwargs.get('subfolder') or '', CONFIG_NAME)}: found peft_type = {found!r:.80}, "
                "expected the name of a method of PEFT, such as 'QSVFT'. It is damaged, or of a newer version of PEFT: "
                "copy it again, or upgrade PEFT."
            )
        return found

    return _get_peft_type


def _of_this_version(make: Callable[..., Any]) -> Callable[..., Any]:
    """``PeftConfig.from_peft_type``, through which every saved config goes, from a file or a dict."""

    @functools.wraps(make)
    def from_peft_type(cls: Any, **saved: Any) -> Any:
        if saved.get("peft_type") == QSVFT or issubclass(cls, QSVFTConfig):
            instead = "Use the version that made it, merge the adapter with that one, or train it anew."
            saved = without_removed(saved, CONFIG_NAME, instead)
        return make(cls, **saved)

    return from_peft_type
