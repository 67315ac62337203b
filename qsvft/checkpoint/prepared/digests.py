"""The digests of a prepared directory: of every tensor, and of the model's config.

    qsvft_tensors   {tensor: [dtype, shape, SHA-256]}
    qsvft_config    SHA-256 of config.json

A directory that is streamed has them in the metadata of its index, and each file those of its own tensors in its
header, as JSON in a string; one that ``save_pretrained`` writes has all of them in the header of each file. None of
them is a signature: whoever changes a file on purpose can make them anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...storage.digests import tensor_bytes
from ...storage.tensor_writer import DTYPE_NAMES

TENSORS, CONFIG = "qsvft_tensors", "qsvft_config"

_FREE = ("architectures", "transformers_version", "use_cache")
"""Of a config, what no result depends on; nor does it on names that begin with an underscore."""


class TensorRecord(NamedTuple):
    """What a tensor was when it was written: dtype by safetensors' name, shape, SHA-256 of its bytes."""

    dtype: str
    shape: Sequence[int]
    sha256: str


def tensor_record(tensor: Tensor) -> TensorRecord:
    """The record of a tensor."""
    return TensorRecord(DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor_sha256(tensor))


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, as they lie in a file."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def as_text(records: Mapping[str, TensorRecord]) -> str:
    """Records as a header holds them."""
    return json.dumps(dict(sorted(records.items())), separators=(",", ":"))


def as_records(content: Any) -> dict[str, TensorRecord]:
    """Records from a header's text, or from what an index has.

    Raises:
        ValueError: they are none.
    """
    try:
        content = json.loads(content) if isinstance(content, str) else content
        records = {name: TensorRecord(*record) for name, record in content.items()}
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"no records of tensors ({error})") from error
    other = next((name for name, record in records.items() if list(map(type, record)) != [str, list, str]), None)
    if other is not None:
        raise ValueError(f"no records of tensors ({other!r:.80} has {list(records[other])!r:.80})")
    return records


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config.json's content, but for what no result depends on."""
    kept = {name: value for name, value in config.items() if name not in _FREE and not name.startswith("_")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
