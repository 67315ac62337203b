"""What an adapter file holds beside M, and the checks when it is read.

For each adapted layer, in adapter_model.safetensors:

    <layer>.qsvft_M.weight (entries,) fp32    the entries of M, row-major (once <layer>.qsvft_M)
    <layer>.qsvft_probe    (8,) fp32          fingerprint of the adapted map (see probe.py)
    <layer>.qsvft_base     (32,) uint8        SHA-256 of the base weight as stored
    <layer>.qsvft_entries  (entries,) int64   top_k only: positions i * k + j
    <layer>.qsvft_unit     () fp32            alpha, which multiplies M; none where it is 1 (config.unit "one")
    <layer>.qsvft_digest   (32,) uint8        SHA-256 of M, probe, base, unit and factors if any, and the pattern

The random pattern is drawn again from its seed; the digest shows that it came out the same. Factors are saved
only with a self-contained adapter (self_contained.py). Everything read here is treated as hostile until it is
checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..maths.aligned import aligned
from ..maths.patterns import IndexPattern
from .config import QSVFTConfig
from .layer import QSVFTLinear
from .parameter import check_finite, with_coefficients
from .probe import DIGEST_SIZE, OTHER_FACTORS, TOLERANCE, content_digest
from .self_contained import FactorDigests, split_factors, stored_factors

_RECORDS = ("qsvft_base", "qsvft_entries", "qsvft_unit", "qsvft_digest")
_M, _PROBE = "qsvft_M.weight", "qsvft_probe"
PREFIX = "base_model.model."


def add_records(
    selected: dict[str, Tensor], layers: Sequence[tuple[str, QSVFTLinear]], adapter: str, include_factors: bool
) -> None:
    """Add the records of an adapter's layers, and its factors if asked for, to what is saved.

    Args:
        selected: M and probe of the layers; keys still carry the adapter's name, but for those of factors.
        layers: with their names in the state dict.
        adapter: its name.
        include_factors: whether it is to be self-contained.
    """
    factors = stored_factors((layer for _, layer in layers), adapter) if include_factors else {}
    digests = FactorDigests(split_factors(factors)[0], complete=include_factors)
    for name, layer in layers:
        _add_records(selected, name, layer, adapter, digests)
    prefix = PREFIX if any(name.startswith(PREFIX) for name, _ in layers) else ""
    selected |= {f"{prefix}{key}": tensor for key, tensor in factors.items()}


def _add_records(
    selected: dict[str, Tensor], name: str, layer: QSVFTLinear, adapter: str, digests: FactorDigests
) -> None:
    pattern = layer.pattern(adapter)
    layer.check_finite(adapter)
    key = f"{name}.qsvft_M.{adapter}.weight"
    selected[key] = selected[key].to(torch.float32)
    base = torch.frombuffer(bytearray(layer.base_digest), dtype=torch.uint8)
    selected[f"{name}.qsvft_base.{adapter}"] = base
    if isinstance(pattern, IndexPattern) and layer.settings[adapter].pattern == "top_k":
        entries = pattern.flat()
        selected[f"{name}.qsvft_entries.{adapter}"] = entries if entries.is_meta else entries.cpu()
    contents: list[Tensor | str] = [selected[key], selected[f"{name}.qsvft_probe.{adapter}"], base]
    if layer.settings[adapter].unit != "one":
        unit = torch.tensor(layer.units[adapter], dtype=torch.float32)
        selected[f"{name}.qsvft_unit.{adapter}"] = unit
        contents.append(unit)
    if selected[key].is_meta:  # a model without values has names and shapes
        selected[f"{name}.qsvft_digest.{adapter}"] = torch.empty(DIGEST_SIZE, dtype=torch.uint8, device="meta")
        return
    contents += [pattern.digest(), digests.of_layer(layer, adapter)]
    selected[f"{name}.qsvft_digest.{adapter}"] = content_digest(*contents)


class AdapterReader:
    """Splits a saved adapter into what is loaded and what is checked.

    Args:
        state_dict: the file's tensors, keys without the adapter's name.
        config: the adapter's config as read, with its record of the base.
        here: the same record of the base at hand.
    """

    def __init__(self, state_dict: dict[str, Tensor], config: QSVFTConfig, here: dict[str, Any]) -> None:
        self.config, self.here = config, here
        factors, others = split_factors(state_dict)
        self.digests = FactorDigests(factors, complete=config.include_factors)
        others = {key: aligned(tensor) for key, tensor in others.items()}  # who assigns them computes with them
        self.records = {k: v for k, v in others.items() if k.rsplit(".", 1)[-1] in _RECORDS}
        self.parameters = {with_coefficients(k): v for k, v in others.items() if k not in self.records}

    def check(self, layers: list[tuple[str, QSVFTLinear]], adapter: str, model: nn.Module) -> None:
        """Check every layer, then load patterns; raise ValueError at the first that does not fit."""
        bare = {name.removeprefix(PREFIX): layer for name, layer in layers}
        saved_whole = _saved_whole(model, adapter)
        for key in list(self.parameters):
            owner = next((key.removesuffix(f".{leaf}") for leaf in (_M, _PROBE) if key.endswith(f".{leaf}")), None)
            if owner is not None:
                if owner.removeprefix(PREFIX) not in bare:
                    raise ValueError(
                        f"{owner.removeprefix(PREFIX)}: the adapter has an M for this layer, but the model has no "
                        f"such adapted layer (it has {len(bare)}). It was made for another model, or with other "
                        "target_modules."
                    )
            elif key not in saved_whole:
                self._pass_over_base(key, model)
        for name, layer in bare.items():
            self._check_layer(name, layer, adapter)

    def _pass_over_base(self, key: str, model: nn.Module) -> None:
        """Leave out a tensor that the base has as it is (PEFT saves embeddings beside an adapter); refuse any other."""
        found, state = self.parameters.pop(key), model.state_dict()
        held = state.get(key, state.get(key.removeprefix(PREFIX)))
        if held is None or held.shape != found.shape or not torch.equal(held.to(found.device, found.dtype), found):
            what = "no tensor of this adapter" if held is None else "a tensor of the base with other values"
            raise ValueError(
                f"{key.removeprefix(PREFIX)}: the adapter's file has {what}; expected M, its records and factors, and "
                "modules that its config names in modules_to_save. An adapter does not change the base: train such a "
                "module with modules_to_save, or load the base that the adapter was trained on."
            )

    def _find(self, name: str, leaf: str) -> Tensor:
        for key in (f"{PREFIX}{name}.{leaf}", f"{name}.{leaf}"):
            for source in (self.parameters, self.records):
                if key in source:
                    return source[key]
        raise ValueError(
            f"{name}: the adapter file has no {leaf} for this layer; found {len(self.parameters)} other tensors. "
            "The file is incomplete, or was not written by qsvft: save the adapter again."
        )

    def _check_layer(self, name: str, layer: QSVFTLinear, adapter: str) -> None:
        M, probe = self._find(name, _M), self._find(name, _PROBE)
        base, digest = self._find(name, "qsvft_base"), self._find(name, "qsvft_digest")
        expected = layer.M(adapter)
        if tuple(M.shape) != tuple(expected.shape) or M.dtype != torch.float32:
            raise ValueError(
                f"{name}: the adapter's M is {M.dtype} of shape {tuple(M.shape)}, expected torch.float32 of shape "
                f"{tuple(expected.shape)} (pattern '{self.config.pattern}' at rank {layer.pattern(adapter).rank} on a "
                f"{layer.out_features} x {layer.in_features} weight). The adapter is of another model or config."
            )
        check_finite(name, adapter, M)
        if layer.settings[adapter].pattern == "top_k":
            self._load_entries(name, layer, adapter, self._find(name, "qsvft_entries"))
        contents: list[Tensor | str] = [M, probe, base]
        if layer.settings[adapter].unit != "one":
            contents.append(self._load_unit(name, layer, adapter))
        contents += [layer.pattern(adapter).digest(), self.digests.of_layer(layer, adapter)]
        if not torch.equal(content_digest(*contents), digest.cpu()):
            raise ValueError(
                f"{name}: the adapter's contents do not match their digest: the file was changed or damaged after it "
                f"was saved, or its pattern ('{self.config.pattern}', seed {self.config.seed}) does not come out the "
                "same here. Copy or save the adapter again."
            )
        difference = layer.probe_difference(adapter, probe)
        if not difference <= TOLERANCE:
            raise ValueError(self._mismatch(name, layer, adapter, bytes(base.cpu().tolist()), difference))
        # The probe at hand takes the place of the saved one, so that saving again writes what is true here.
        key = next(k for k in (f"{PREFIX}{name}.{_PROBE}", f"{name}.{_PROBE}") if k in self.parameters)
        self.parameters[key] = layer.probe_here(adapter)

    def _load_entries(self, name: str, layer: QSVFTLinear, adapter: str, entries: Tensor) -> None:
        old = layer.pattern(adapter)
        try:
            if entries.dtype != torch.int64 or entries.shape != (old.count,):
                raise ValueError(f"{entries.dtype} of shape {tuple(entries.shape)}")
            pattern = IndexPattern(old.rank, entries)
        except ValueError as error:
            raise ValueError(
                f"{name}: the adapter's pattern entries are not usable ({error}); expected {old.count} different "
                f"int64 positions below {old.rank**2}. The file is damaged: copy or save the adapter again."
            ) from error
        layer.qsvft_pattern[adapter] = pattern.to(layer.device)
        layer._set_probe(adapter, layer.original_weight())

    def _load_unit(self, name: str, layer: QSVFTLinear, adapter: str) -> Tensor:
        """Take over the alpha that M was trained with."""
        unit = self._find(name, "qsvft_unit")
        if unit.dtype != torch.float32 or unit.shape != () or not 0 < float(unit) < math.inf:
            raise ValueError(
                f"{name}: the adapter's unit is {unit.dtype} of shape {tuple(unit.shape)}; expected one finite "
                "torch.float32 above 0. The file is damaged: copy or save the adapter again."
            )
        if float(unit) != layer.units[adapter]:
            layer.take_unit(adapter, float(unit), own_scale=self.config.include_factors)
        return unit

    def _mismatch(self, name: str, layer: QSVFTLinear, adapter: str, base: bytes, difference: float) -> str:
        if base != layer.base_digest:
            cause = "the weight is another one"
        elif layer.came_from[adapter] is not None:
            cause = "the weight is the same, but the factors given for it are others"
        else:
            cause = "the weight is the same, but its singular vectors came out differently here"
        there = (self.config.base or {}).get("weights")
        found = math.inf if math.isnan(difference) else difference
        return (
            f"{name}: this adapter does not fit the base model: its probe differs by {found:.3g} (expected at most "
            f"{TOLERANCE}); {cause}. The adapter was made on {there}, the model holds {self.here['weights']}. "
            "Load it on the same checkpoint with the same bits and quantisation settings, for example "
            f"PeftModel.from_pretrained(qsvft.quantize(model, bits=4), adapter). {OTHER_FACTORS}"
        )


def _saved_whole(model: nn.Module, adapter: str) -> set[str]:
    """The state's keys of the modules that the adapter trains whole."""
    return {
        f"{name.removeprefix('_fsdp_wrapped_module.')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter).values()
    }
