"""The model that every method starts from, with its linear weights held in one of these ways:

dense   rounded to NF4, held in bf16: the numbers of the 4-bit base, whose product takes ten times as long on a CPU
nf4     rounded to NF4, held in 4 bits
frame   rounded to NF4 in the frame of a basis, as a base that held P = W V in place of W would be
residual  as ``residual=True`` holds it at rank 96: NF4 of what U S Vᵀ leaves, and U S Vᵀ
residual, int8  the same at rank 128, U and V in int8
bf16    as they are
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from frame import rounded_in_frame
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

import qsvft
from qsvft.storage.quantization import dequantize
from qsvft.storage.residual import residual_linear

DENSE, NF4, FRAME, RESIDUAL, BF16 = "dense", "nf4", "frame", "residual", "bf16"
RESIDUAL_INT8 = "residual, int8"
RESIDUALS = {RESIDUAL: (96, 16), RESIDUAL_INT8: (128, 8)}
"""Rank and bits of the factors."""


HEAD = "classifier"


@dataclass(frozen=True)
class Base:
    """A model in a directory: a causal language model, or an encoder that gets a new head.

    Attributes:
        path: of the checkpoint, as ``save_pretrained`` writes it.
        device: where it is trained.
        classes: how many the new head tells apart; 0 for a language model.
    """

    path: Path
    device: str = "cpu"
    classes: int = 0

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self, held: str = DENSE, seed: int = 0) -> nn.Module:
        """The model with its linear weights rounded to NF4, held densely or in 4 bits, and frozen; a head of a seed."""
        set_seed(seed)
        model: nn.Module = self._load()
        if held == NF4:
            model = self._quantized(model.to(self.device))
        else:
            for name, tensor in self._weights(held).items():
                if HEAD not in name:
                    model.get_parameter(name).data.copy_(tensor)
            model.to(self.device)
        return model.requires_grad_(False)

    def _load(self) -> Any:
        # The plain attention is the fastest of transformers' on a CPU at these lengths.
        options = {"dtype": torch.bfloat16, "attn_implementation": "sdpa" if self.device == "cuda" else "eager"}
        if not self.classes:
            return AutoModelForCausalLM.from_pretrained(self.path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=self.classes, **options)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def _quantized(self, model: nn.Module) -> nn.Module:
        return qsvft.quantize(model, bits=4, skip_modules=[HEAD] if self.classes else [], progress=False)

    def _weights(self, held: str) -> dict[str, Tensor]:
        """Those that differ from the checkpoint's, made once."""
        if held not in self._made:
            if held == DENSE:
                self._made[held] = dict(dequantize(self._quantized(self._load())).named_parameters())
            elif held in RESIDUALS:
                self._made[held] = _with_residual(self._load(), *RESIDUALS[held])
            elif held == FRAME:
                self._made[held] = rounded_in_frame(self._load())
            else:
                self._made[held] = {}
        return self._made[held]

    @cached_property
    def _made(self) -> dict[str, dict[str, Tensor]]:
        return {}


def _with_residual(model: Any, rank: int, bits: int) -> dict[str, Tensor]:
    head = model.get_output_embeddings()
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head}
    return {f"{name}.weight": residual_linear(one, rank, bits).dense_weight() for name, one in layers.items()}
