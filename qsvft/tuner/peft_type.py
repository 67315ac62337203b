"""The method's member of PEFT's enum ``PeftType``.

PEFT has no plug-in hook: its method names are members of that enum. A real member is made here, once, at import; a
plain string would break transformers' ``load_adapter``, which asks the member for its ``value``.
"""

from __future__ import annotations

from peft import PeftType

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

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors."""
