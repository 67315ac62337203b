"""Single tensors of safetensors files, by their names: memory-mapped, opened when first read.

They are the file's pages where these lie at an address to compute with, as in every file that
:mod:`qsvft.storage.tensor_writer` wrote; elsewhere they are copies. A copy of the reader, and one in another process,
opens the files again by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..maths.aligned import aligned


class TensorFiles:
    """The tensors in safetensors files.

    Args:
        files: the file that holds it, for each tensor's name.

    Attributes:
        paths: the same, absolute.
    """

    def __init__(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
        self.paths = {name: os.path.abspath(path) for name, path in files.items()}
        self._open: dict[str, Any] = {}

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], remedy: str = "make it again") -> TensorFiles:
        """A single file.

        Args:
            path: the file.
            remedy: what to do with a damaged one, where copying it again does not help.

        Raises:
            ValueError: it is not a whole safetensors file.
        """
        return cls(dict.fromkeys(_opened(os.fspath(path), remedy).keys(), path))

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU, as :func:`~qsvft.maths.aligned.aligned` gives it; for the rest see :meth:`mapped`."""
        return aligned(self.mapped(name))

    def mapped(self, name: str) -> Tensor:
        """A tensor as the file's pages, wherever these lie: to look at, or to be written elsewhere.

        Raises:
            KeyError: no such name.
            ValueError: the file is not the one that was listed, or is damaged.
        """
        handle = self._handle(name)
        try:
            tensor: Tensor = handle.get_tensor(name)
            return tensor
        except SafetensorError as error:
            raise ValueError(
                f"{self.paths[name]}: expected the tensor {name} ({error}). The file is not the one that was listed: "
                "copy it again, or make it again."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def _handle(self, name: str) -> Any:
        path = self.paths[name]
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


def _opened(path: str, remedy: str = "make it again") -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); found {os.path.getsize(path)} bytes. It is truncated or "
            f"damaged: copy it again, or {remedy}."
        ) from error
