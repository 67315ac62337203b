"""One method on one model, built once and stepped at any length, on meta or on real tensors."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .attention import model_that_counts
from .ledger import Ledger
from .methods import Method, build
from .shapes import model_without_values
from .step import count_on


class Scenario:
    """A method's model on a device ("meta", "cpu" or "cuda"), random weights where there are any.

    Args:
        base: a frozen bf16 model to build it on in place of one made from the config; it is changed in place.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        method: Method,
        checkpointing: bool,
        optimizer: str,
        device: str,
        base: PreTrainedModel | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        if base is None:
            base = model_without_values(config) if device == "meta" else random_model(config, device)
        self.base = base
        self.model = build(method, self.base)
        self.head = self.base.get_output_embeddings()
        self.checkpointing, self.optimizer = checkpointing, optimizer

    def count(self, batch_size: int, seq_len: int, record: bool = True) -> tuple[Ledger, int]:
        """The ledger of one step (empty unless ``record``), and the number of trainable parameters."""
        for parameter in self.model.parameters():
            parameter.grad = None
        return count_on(
            self.model, self.base, self.head, batch_size, seq_len, self.checkpointing, self.optimizer, record
        )


def count_step(
    config: PretrainedConfig,
    method: Method,
    batch_size: int,
    seq_len: int,
    gradient_checkpointing: bool = True,
    optimizer: str = "adamw",
) -> tuple[Ledger, int]:
    """Count one training step of a method on the meta device: the ledger, and the trainable parameters."""
    return Scenario(config, method, gradient_checkpointing, optimizer, "meta").count(batch_size, seq_len)


def random_model(config: PretrainedConfig, device: str) -> PreTrainedModel:
    """A frozen causal language model with random weights in bf16.

    On CUDA with the attention that transformers takes, torch's own wherever it can, which is what runs in training; on
    CPU with the flash kernel that the prediction counts.
    """
    with torch.device(device):
        if device == "cpu":
            model = model_that_counts(config, torch.bfloat16)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False)


def one_line(error: BaseException, name: bool = True) -> str:
    """An exception as one line, with its type's name in front unless ``name`` is off."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if name else text
