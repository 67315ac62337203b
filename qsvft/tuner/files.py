"""Checks on an adapter's files before they are read: truncated or damaged safetensors.

Limits: the header is at most 100 MB (safetensors' own), the offsets must cover the file exactly.
"""

from __future__ import annotations

import os

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
