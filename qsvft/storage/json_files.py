"""JSON that is read as hostile: an object whose names are each given once, of a size that can be."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000
"""The largest config.json or index that is read."""


def read_object(path: Path) -> tuple[dict[str, Any], str]:
    """Read a JSON file that holds an object.

    Returns:
        The object, and the SHA-256 of the file.

    Raises:
        OSError: no such file, or it cannot be read.
        ValueError: larger than :data:`MAX_JSON_BYTES`, no JSON, no object, or a name given twice.
    """
    size = require_file(path).st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path}: found {size} bytes, expected at most {MAX_JSON_BYTES}. Is it the right file?")
    raw = path.read_bytes()
    return parse_object(raw, str(path)), hashlib.sha256(raw).hexdigest()


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8 whose names are each given once.

    Raises:
        ValueError: it is none; the message begins with ``where``.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where}: found {len(raw)} bytes that are no valid JSON ({str(error) or 'too deep'}), expected an object "
            "whose names are each given once. It is damaged: copy or download it again."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a JSON {type(value).__name__}, expected an object. Is it the right file?")
    return value


def require_file(path: Path) -> os.stat_result:
    """The status of a regular file.

    Raises:
        OSError: there is none, or it cannot be looked at.
        ValueError: it is a directory, a pipe or a device.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: found no such file, expected one of the checkpoint's. Copy or download it again."
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: found something that is no file, expected a regular file of the checkpoint.")
    return status


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {repeated!r} is given twice")
    return result
