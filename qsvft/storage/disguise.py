"""A subclass that passes for the class it changes: same name and module, pickled and copied as the plain class.

What exchanges a module's class keeps copying, saving and freeing a model as they are, which an attribute that is
bound to the module would not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_PLAIN = "_qsvft_plain_class"
_MAKER = "_qsvft_disguised_by"


def disguised(plain: Any, maker: Callable[[Any], type], forward: Callable[..., Any]) -> type:
    """A subclass with another forward.

    Args:
        plain: the class.
        maker: a function of a module, that gives this subclass of the plain class; what is pickled names it.
        forward: the subclass's.
    """

    def reduce_ex(self: Any, protocol: Any) -> Any:
        # The class exists in no module: pickle the plain one and the instance's state.
        _, _, *state = plain.__reduce_ex__(self, max(int(protocol), 2))
        return _empty, (maker, plain), *state

    members = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"forward": forward, "__reduce_ex__": reduce_ex, _PLAIN: plain, _MAKER: maker.__name__}
    return type(plain)(plain.__name__, (plain,), members)


def undisguised(instance: object, maker: Callable[[Any], type]) -> Any:
    """The plain class of an instance whose class ``maker`` made; None for any other."""
    own = vars(type(instance))
    return own[_PLAIN] if own.get(_MAKER) == maker.__name__ else None


def undisguise(model: nn.Module, maker: Callable[[Any], type]) -> nn.Module:
    """Give every module of a model whose class ``maker`` made its plain class back, in place."""
    for module in model.modules():
        plain = undisguised(module, maker)
        if plain is not None:
            module.__class__ = plain
    return model


def _empty(maker: Callable[[Any], type], plain: type) -> Any:
    cls: Any = maker(plain)
    return cls.__new__(cls)
