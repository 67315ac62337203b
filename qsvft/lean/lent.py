"""What a forward lends a module while it runs, however many of them run at the same time.

The first of several puts it there and the last takes it away: each for itself would leave what another had put there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_ABSENT = object()
_lock = threading.Lock()
_held: WeakKeyDictionary[nn.Module, dict[str, list[Any]]] = WeakKeyDictionary()
"""For each module and attribute how many use it, and what was there before."""


@contextmanager
def lent(module: nn.Module, name: str, make: Callable[[], Any]) -> Iterator[None]:
    """Let a module have an attribute of its own as long as this lasts.

    Args:
        module: several threads may do this with it.
        name: the attribute's.
        make: gives its value; called by the first of them, who finds the module as it is without it.
    """
    with _lock:
        held = _held.setdefault(module, {})
        if name not in held:
            value = make()
            held[name] = [0, vars(module).get(name, _ABSENT)]
            vars(module)[name] = value
        held[name][0] += 1
    try:
        yield
    finally:
        with _lock:
            held[name][0] -= 1
            if not held[name][0]:
                _, before = held.pop(name)
                if before is _ABSENT:
                    del vars(module)[name]
                else:
                    vars(module)[name] = before
