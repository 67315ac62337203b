"""An adapter's files: where they are, and checks before they are read (truncated or damaged safetensors).

Limits: the header is at most 100 MB (safetensors' own), the offsets must cover the file exactly.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


def check_adapter_directory(folder: str) -> None:
    """Raise ValueError if ``folder`` holds an adapter weight file that safetensors cannot open."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as handle:
            handle.keys()
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); found {os.path.getsize(path)} bytes. It is "
            "truncated or damaged: copy it again, or save the adapter again."
        ) from error


def weights_file(name: str, subfolder: str | None, options: Mapping[str, Any]) -> str | None:
    """The local path of an adapter's safetensors file, downloaded if need be; None if it has none.

    Args:
        name: the adapter's directory, or its id on the hub.
        subfolder: where in it.
        options: keyword arguments, of which those of ``hf_hub_download`` count.
    """
    folder = os.path.join(name, subfolder or "")
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        return path if os.path.isfile(path) else None
    known = inspect.signature(hf_hub_download).parameters
    chosen = {key: value for key, value in options.items() if key in known}
    try:
        return str(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **chosen))
    except EntryNotFoundError:
        return None
