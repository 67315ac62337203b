"""Weights that DeepSpeed's ZeRO-3 has split between processes: not made here, and refused where values are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers.integrations import deepspeed


@contextmanager
def whole_weights() -> Iterator[None]:
    """Let transformers build a model with whole weights, also where ZeRO-3 would split each as it is made.

    They are few bits already, or have no values yet; DeepSpeed splits them when training starts.
    """
    split = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = split


def refuse_split(name: str, weight: Tensor) -> None:
    """Refuse a weight of which this process has a part.

    Raises:
        ValueError: naming it.
    """
    whole = getattr(weight, "ds_shape", None)
    if whole is not None and weight.numel() == 0:
        raise ValueError(
            f"{name}: ZeRO-3's init has split its {tuple(whole)} values between the processes, found none; expected "
            "the whole weight, to quantise and decompose it. Load the model with qsvft.from_pretrained(), which keeps "
            "it whole until training starts, or load it before TrainingArguments and with zero3_init_flag: false."
        )
