"""An adapter of k directions as PEFT's LoRA of rank k, which is exactly what it is: dW = B A, without any SVD of dW.

    linear layers    lora_A (r, n), lora_B (m, r)
    experts          lora_A (E r, n), lora_B (m, r E), of one parameter with E experts (PEFT's ``target_parameters``)

Of a smaller rank it is the best fit, found in the (k, k) core (:mod:`qsvft.maths.low_rank`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ..maths.low_rank import Spectrum, distance, spectrum
from ..options.choices import RANKS
from ..storage.weights import dtype_name
from ..tuner.config import QSVFTConfig
from ..tuner.layer import QSVFTLinear
from ..tuner.lora_factors import lora_factors
from .exported import Errors, Exported

PREFIX = "base_model.model."
"""Of all names in a PEFT adapter's file."""

Rule = Callable[[str, int, Spectrum], int]
"""The rank of a layer, from its name, its directions k and the singular values of its change."""


@dataclass
class LoraFit:
    """The factors of all layers.

    Attributes:
        factors: B (m, r) and A (r, n) of each layer, by its name.
        errors: what they leave out.
        by_rank: the same of the best fit of some ranks, before rounding.
        most: the largest k of a layer.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: Errors = field(default_factory=Errors)
    by_rank: dict[int, float] = field(default_factory=dict)
    most: int = 0

    @property
    def ranks(self) -> dict[str, int]:
        """Of each layer."""
        return {name: B.shape[1] for name, (B, _) in self.factors.items()}

    def found(self, folder: Path, rank: int, onto: str, dtype: torch.dtype) -> Exported:
        """What is written of it."""
        return Exported(
            folder,
            "lora",
            onto,
            str(dtype_name(dtype)),
            len(self.factors),
            rank,
            self.errors.error,
            self.errors.worst,
            errors=self.by_rank,
            moved=self.errors.moved,
        )


def fit_lora(
    layers: Iterable[tuple[str, QSVFTLinear]], adapter: str, rule: Rule, dtype: torch.dtype, given_back: bool = True
) -> LoraFit:
    """Take the factors of all layers.

    Args:
        layers: with their names.
        adapter: which of theirs.
        rule: gives each layer's rank.
        dtype: of the factors.
        given_back: with what the adapter gives back of its base's rounding.

    Raises:
        ValueError: M holds NaN or Inf.
    """
    fit, norm, left = LoraFit(), 0.0, dict.fromkeys(RANKS, 0.0)
    for name, layer in layers:
        layer.check_finite(adapter)
        B, A = lora_factors(layer, adapter, given_back)
        k, found = B.shape[1], spectrum(B, A)
        fit.most = max(fit.most, k)
        norm += found.norm**2
        for one in left:
            left[one] += found.error(one) ** 2
        rank = rule(name, k, found)
        kept = (B, A) if rank >= k else (found.left[:, :rank], found.right[:rank])
        rounded = (kept[0].to(dtype), kept[1].to(dtype))
        fit.errors.add(name, distance(B, A, rounded[0].float(), rounded[1].float()), found.norm)
        fit.factors[name] = rounded
    fit.by_rank = {one: (off / norm) ** 0.5 if norm else 0.0 for one, off in left.items() if one < fit.most}
    return fit


def lora_tensors(fit: LoraFit, rank: int | None, experts: Mapping[str, str]) -> dict[str, Tensor]:
    """A LoRA's tensors, by their names in PEFT's file but for the prefix.

    Args:
        fit: the factors.
        rank: of all layers, zeros making up for what one lacks; None leaves each as it is.
        experts: names of experts' layers, with the parameter that each is a part of.
    """
    tensors: dict[str, Tensor] = {}
    for name, (B, A) in fit.factors.items():
        if name not in experts:
            tensors[f"{name}.lora_A.weight"] = _padded(A, rank, 0)
            tensors[f"{name}.lora_B.weight"] = _padded(B, rank, 1)
    for parameter, wrapper in _wrappers(fit, experts).items():
        layers = [name for name, one in experts.items() if one == parameter]
        some_B, some_A = next(fit.factors[name] for name in layers if name in fit.factors)
        r = rank if rank is not None else max(fit.ranks.get(name, 0) for name in layers)
        A = some_A.new_zeros(len(layers), r, some_A.shape[1])
        B = some_B.new_zeros(some_B.shape[0], r, len(layers))
        for name in layers:
            if name in fit.factors:
                number, (one_B, one_A) = int(name.rpartition(".")[2]), fit.factors[name]
                A[number, : len(one_A)], B[:, : len(one_A), number] = one_A, one_B
        tensors[f"{wrapper}.lora_A.weight"] = A.flatten(0, 1)
        tensors[f"{wrapper}.lora_B.weight"] = B.flatten(1)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _wrappers(fit: LoraFit, experts: Mapping[str, str]) -> dict[str, str]:
    """The parameters of experts that are adapted, with the place of each one's LoRA.

    PEFT wraps a module once for each of its parameters, the last one outermost."""
    adapted = [one for one in dict.fromkeys(experts.values()) if any(experts.get(n) == one for n in fit.factors)]
    found = {}
    for place, parameter in enumerate(adapted):
        module = parameter.rpartition(".")[0]
        later = sum(one.rpartition(".")[0] == module for one in adapted[place + 1 :])
        found[parameter] = module + later * ".base_layer"
    return found


def _padded(factor: Tensor, rank: int | None, dim: int) -> Tensor:
    """With zeros to a rank."""
    shape = list(factor.shape)
    shape[dim] = (rank or 0) - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim) if shape[dim] > 0 else factor


def lora_config(
    config: QSVFTConfig, fit: LoraFit, rank: int | None, linear: Mapping[str, bool], experts: Mapping[str, str]
) -> LoraConfig:
    """The config of a LoRA whose scale is one.

    Args:
        config: of the adapter.
        fit: the factors.
        rank: of all layers; None where each has its own.
        linear: the model's linear layers by name; whether one is a Conv1D.
        experts: names of experts' layers, with the parameter that each is a part of.
    """
    names = [name for name in fit.factors if name not in experts]
    parameters = sorted(_wrappers(fit, experts))
    each: dict[str, Any] = {} if rank is not None else {name: fit.ranks[name] for name in names}
    r = rank if rank is not None else max([1, *(fit.ranks[name] for name in fit.factors if name in experts)])
    return LoraConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=each,
        alpha_pattern=dict(each),
        target_modules=_short(names, [name for name in linear if name not in experts]),
        target_parameters=parameters or None,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias="none" if config.bias == "none" else "all" if config.bias == "all" else "lora_only",
        fan_in_fan_out=bool(names) and all(linear[name] for name in names),
        task_type=config.task_type,
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
    )


def _short(names: list[str], known: list[str]) -> list[str]:
    """The last parts of layers' names, where they name no other layer."""
    leaves = {name.rpartition(".")[2] for name in names}
    same = {name for name in known if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if same == set(names) else sorted(names)


def write_lora(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """``adapter_model.safetensors`` and ``adapter_config.json``."""
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
