"""The pytest plugin of the suite: models that are made here, and what is expected to fail."""

from __future__ import annotations

import re
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import exceptions
import pytest
import transformers
from models import local
from transformers.models.auto.auto_factory import _BaseAutoModelClass

import qsvft  # noqa: F401  registers the method


class _Absent(ModuleType):
    """A package that is not there, which no test of ours needs: whatever is imported from it is a class of nothing."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (MagicMock,), {})


for _name in ("diffusers", "datasets", "parameterized", "scipy"):
    if find_spec(_name) is None:
        sys.modules[_name] = _Absent(_name)


def pytest_configure(config: pytest.Config) -> None:
    """Let every door of transformers' take a model's id for the folder that stands for it."""
    config.addinivalue_line("markers", "single_gpu_tests: asks for a GPU")
    config.addinivalue_line("markers", "multi_gpu_tests: asks for several")
    config.addinivalue_line("markers", "regression: of an older release")
    config.addinivalue_line("markers", "bitsandbytes: asks for it")
    for door in (
        _BaseAutoModelClass,
        transformers.PreTrainedModel,
        transformers.AutoConfig,
        transformers.AutoTokenizer,
    ):
        _redirect(door)


def _redirect(door: Any) -> None:
    own = door.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, *args: Any, **options: Any) -> Any:
        return own(cls, local(name) if isinstance(name, str) else name, *args, **options)

    door.from_pretrained = classmethod(from_pretrained)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Expect the exceptions to fail, and nothing else: one that passes is an error."""
    for item in items:
        for pattern, reason in exceptions.LEFT_OUT.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
        for pattern, reason in exceptions.EXPECTED.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
