"""Make QSVFT a PEFT method, once, at import.

PEFT has no plug-in hook: its method names are members of the enum ``PeftType``. A real member is
made here (a plain string would break transformers' ``load_adapter``, which asks the member for its
``value``), then PEFT's own ``register_peft_method`` does the rest. Without ``import qsvft`` in the
process, ``PeftModel.from_pretrained`` on such an adapter ends in ``KeyError: 'QSVFT'``.
"""

from __future__ import annotations

import peft
from peft import PeftType
from peft.utils import register_peft_method

NAME = "qsvft"


def _enum_member(name: str) -> PeftType:
    key = name.upper()
    if key in PeftType.__members__:
        return PeftType[key]
    member = str.__new__(PeftType, key)
    member._name_ = key
    member._value_ = key
    type.__setattr__(PeftType, key, member)
    PeftType._member_names_.append(key)
    PeftType._member_map_[key] = member
    PeftType._value2member_map_[key] = member
    return member


QSVFT: PeftType = _enum_member(NAME)


def register() -> None:
    """Register the config and the tuner; calling it again does nothing."""
    from .config import QSVFTConfig
    from .model import QSVFTModel

    if QSVFT not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME, config_cls=QSVFTConfig, model_cls=QSVFTModel)
