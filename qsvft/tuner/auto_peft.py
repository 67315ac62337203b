"""PEFT's ``AutoPeftModelFor...``: of an adapter of ours the same as :func:`qsvft.load`.

PEFT would load the base as its checkpoint has it, on which an adapter that was trained in 4 bits is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from peft.auto import _BaseAutoPeftModel

from .config import QSVFTConfig

Load = Callable[..., PeftModel]

_OURS = {"device_map", "dtype", "token"}
"""Arguments with one meaning for both; with others, such as a quantisation of the base, PEFT's own way is taken."""


def register(load: Load) -> None:
    """Do it, once.

    Args:
        load: :func:`qsvft.load`, which stands above this.
    """
    if not hasattr(_BaseAutoPeftModel.from_pretrained, "__wrapped__"):
        _BaseAutoPeftModel.from_pretrained = classmethod(
            _on_its_base(_BaseAutoPeftModel.from_pretrained.__func__, load)
        )


def _on_its_base(read: Callable[..., Any], load: Load) -> Callable[..., Any]:
    @functools.wraps(read)
    def from_pretrained(
        cls: Any,
        pretrained_model_name_or_path: Any,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **kw: Any,
    ) -> Any:
        place = str(pretrained_model_name_or_path)
        given = {name: value for name, value in kw.items() if value is not None}
        config = PeftConfig.from_pretrained(place) if set(given) <= _OURS else None
        if not isinstance(config, QSVFTConfig) or not config.base_model_name_or_path:
            return read(cls, pretrained_model_name_or_path, adapter_name, is_trainable, **kw)
        model = load(place, adapter_name=adapter_name, **given)
        if cls._target_peft_class is not None and not isinstance(model, cls._target_peft_class):
            raise ValueError(
                f"{cls.__name__}: {place} is an adapter of a {type(model).__name__}; expected one of a "
                f"{cls._target_peft_class.__name__}. Use the class of its task, or qsvft.load({place!r})."
            )
        return model if is_trainable else model.requires_grad_(False).eval()

    return from_pretrained
