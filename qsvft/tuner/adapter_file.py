"""What an adapter file holds beside M, and the checks when it is read.

For each adapted layer, in adapter_model.safetensors:

    <layer>.qsvft_M.weight (entries,) fp32    the entries of M, row-major (once <layer>.qsvft_M)
    <layer>.qsvft_probe    (8,) fp32          fingerprint of the adapted map (see probe.py)
    <layer>.qsvft_base     (32,) uint8        SHA-256 of the base weight as stored
    <layer>.qsvft_entries  (entries,) int64   top_k only: positions i * k + j
    <layer>.qsvft_unit     () fp32            alpha, which multiplies M; none where it is 1 (config.unit "one")
    <layer>.qsvft_digest   (32,) uint8        SHA-256 of all this, factors and the layer's place (adapter_digest.py)
    qsvft_whole            (32,) uint8        SHA-256 of the digests, and of the modules that were trained whole

The random pattern is drawn again from its seed; the digest shows that it came out the same. Factors are saved
only with a self-contained adapter (self_contained.py). Everything read here is treated as hostile until it is
checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..maths.patterns import IndexPattern
from .adapter_digest import layer_digest, layer_digest_before, whole_digest, whole_digest_before
from .config import QSVFTConfig
from .layer import QSVFTLinear
from .parameter import check_finite, with_coefficients
from .peft_type import PREFIX
from .probe import DIGEST_SIZE, OTHER_FACTORS, TOLERANCE
from .self_contained import FactorDigests, split_factors, stored_factors

_RECORDS = ("qsvft_base", "qsvft_entries", "qsvft_unit", "qsvft_digest", "qsvft_whole")
logger = logging.getLogger(__name__)

_M, _PROBE, _WHOLE = "qsvft_M.weight", "qsvft_probe", "qsvft_whole"


def add_records(
    selected: dict[str, Tensor],
    layers: Sequence[tuple[str, QSVFTLinear]],
    adapter: str,
    include_factors: bool,
    whole: Mapping[str, Tensor],
) -> None:
    """Add the records of an adapter's layers, and its factors if asked for, to what is saved.

    Args:
        selected: M and probe of the layers; keys still carry the adapter's name, but for those of factors.
        layers: with their names in the state dict; one whose M is not selected is left out, as of a part of a state.
        adapter: its name.
        include_factors: whether it is to be self-contained.
        whole: the tensors of modules that are trained whole, by their names in the state dict.
    """
    layers = [(name, layer) for name, layer in layers if m_key(name, adapter) in selected]
    if not layers:
        return
    factors = stored_factors((layer for _, layer in layers), adapter) if include_factors else {}
    digests = FactorDigests(split_factors(factors)[0], complete=include_factors)
    of_layers = {name: _add_records(selected, name, layer, adapter, digests) for name, layer in layers}
    prefix = PREFIX if any(name.startswith(PREFIX) for name, _ in layers) else ""
    on_meta = any(tensor.is_meta for tensor in (*of_layers.values(), *whole.values()))
    selected[f"{prefix}{_WHOLE}.{adapter}"] = _no_digest() if on_meta else whole_digest(of_layers, whole, adapter)
    selected |= {f"{prefix}{key}": tensor for key, tensor in factors.items()}


def _add_records(
    selected: dict[str, Tensor], name: str, layer: QSVFTLinear, adapter: str, digests: FactorDigests
) -> Tensor:
    """The layer's digest, which is the last of them."""
    pattern, key = layer.pattern(adapter), m_key(name, adapter)
    if tuple(selected[key].shape) != (pattern.count,) or hasattr(selected[key], "full_tensor"):
        raise ValueError(
            f"{name}: M of adapter '{adapter}' has shape {tuple(selected[key].shape)}, expected ({pattern.count},): it "
            "is a shard of it. Gather the parameters (accelerator.get_state_dict(model)) and save with "
            "save_pretrained(..., state_dict=...); for checkpoints under FSDP2, take accelerate 1.15 or newer."
        )
    check_finite(layer.module_name, adapter, selected[key])
    selected[key] = selected[key].to(torch.float32)
    base = torch.frombuffer(bytearray(layer.base_digest), dtype=torch.uint8)
    probe = selected.setdefault(probe_key(name, adapter), layer.qsvft_probe[adapter])
    found = {_M: selected[key], _PROBE: probe, "qsvft_base": base}
    if isinstance(pattern, IndexPattern) and layer.settings[adapter].pattern == "top_k":
        entries = pattern.flat()
        found["qsvft_entries"] = entries if entries.is_meta else entries.cpu()
    if layer.settings[adapter].unit != "one":
        found["qsvft_unit"] = torch.tensor(layer.units[adapter], dtype=torch.float32)
    # A model without values has names and shapes.
    digest = _no_digest() if selected[key].is_meta else layer_digest(name, layer, adapter, found, digests)
    records = {leaf: tensor for leaf, tensor in found.items() if leaf in _RECORDS}
    selected |= {f"{name}.{leaf}.{adapter}": tensor for leaf, tensor in {**records, "qsvft_digest": digest}.items()}
    return digest


def is_m(key: str) -> bool:
    """Whether a tensor of an adapter's file is an M, under its name or the one that it had before."""
    return key.endswith((".qsvft_M.weight", ".qsvft_M"))


def m_key(layer: str, adapter: str) -> str:
    """M's name in a model's state."""
    return f"{layer}.qsvft_M.{adapter}.weight"


def probe_key(layer: str, adapter: str) -> str:
    """The probe's name in a model's state."""
    return f"{layer}.{_PROBE}.{adapter}"


def _no_digest() -> Tensor:
    return torch.empty(DIGEST_SIZE, dtype=torch.uint8, device="meta")


class AdapterReader:
    """Splits a saved adapter into what is loaded and what is checked.

    Args:
        state_dict: the file's tensors, keys without the adapter's name.
        config: the adapter's config as read, with its record of the base.
        here: the same record of the base at hand.
    """

    def __init__(self, state_dict: dict[str, Tensor], config: QSVFTConfig, here: dict[str, Any]) -> None:
        self.config, self.here = config, here
        self._from_before = False
        factors, others = split_factors(state_dict)
        self.digests = FactorDigests(factors, complete=config.include_factors)
        # PEFT maps them from the file, and who assigns them computes with them.
        others = {key: tensor.clone() for key, tensor in others.items()}
        self.records = {k: v for k, v in others.items() if k.rsplit(".", 1)[-1] in _RECORDS}
        self.parameters = {with_coefficients(k): v for k, v in others.items() if k not in self.records}

    def check(self, layers: list[tuple[str, QSVFTLinear]], adapter: str, model: nn.Module) -> None:
        """Check every layer, then load patterns; raise ValueError at the first that does not fit."""
        bare = {name.removeprefix(PREFIX): layer for name, layer in layers}
        saved_whole = saved_whole_keys(model, adapter, self.config, model.state_dict())
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
        digests = {name: self.check_layer(name, layer, adapter) for name, layer in bare.items()}
        whole = {key: self.parameters[key] for key in saved_whole if key in self.parameters}
        self.check_whole(digests, whole, adapter)
        self.say_other_base({name: layer.base_digest for name, layer in bare.items()})

    def coefficients(self, name: str) -> Tensor:
        """M of a layer, as it is in the file."""
        return self._find(name, _M)

    def check_same_map(self, name: str, layer: QSVFTLinear, adapter: str) -> None:
        """Refuse an M that is for other entries, or another alpha, than the layer's adapter has."""
        unit, entries = torch.tensor(layer.units[adapter], dtype=torch.float32), layer.pattern(adapter)
        other = layer.settings[adapter].unit != "one" and not torch.equal(self._find(name, "qsvft_unit").cpu(), unit)
        if layer.settings[adapter].pattern == "top_k" and isinstance(entries, IndexPattern):
            other = other or not torch.equal(self._find(name, "qsvft_entries").cpu(), entries.flat().cpu())
        if other:
            raise ValueError(
                f"{name}: the adapter's M is for other entries or another alpha than that of adapter '{adapter}', "
                "whose place it would take; expected the same. Load it beside that: load_adapter() and set_adapter()."
            )

    def say_other_base(self, here: Mapping[str, bytes]) -> None:
        """A weight that is not the same bit for bit, though no probe feels it, is damaged or was made otherwise.

        Args:
            here: SHA-256 of the layers' weights, by their names.
        """
        other = [name for name in here if bytes(self._find(name, "qsvft_base").cpu().tolist()) != here[name]]
        if other:
            logger.warning(
                "the weights of %d of %d layers, such as %s, are not bit for bit those that the adapter was trained "
                "on; its probes differ by at most %g. They may be of another dtype or quantised on another device, or "
                "the checkpoint is damaged.",
                *(len(other), len(here), other[0], TOLERANCE),
            )

    def check_whole(self, digests: dict[str, Tensor], whole: dict[str, Tensor], adapter: str) -> None:
        """That all layers and modules in the file are of one save; a file from before does not say so."""
        expected = next((tensor for key, tensor in self.records.items() if key.endswith(_WHOLE)), None)
        if expected is None and not self._from_before:
            raise ValueError(
                f"the adapter's file has no {_WHOLE}, the digest of all of it; found {len(self.records)} other records."
                " It is incomplete: copy it again, or save the adapter again."
            )
        known = (digest(digests, whole, adapter) for digest in (whole_digest, whole_digest_before))
        if expected is not None and not any(torch.equal(one, expected.cpu()) for one in known):
            raise ValueError(
                f"the adapter's {len(digests)} layers and {len(whole)} other tensors that it trains do not match their "
                "common digest: some are of another save, or were changed. Copy or save the adapter again."
            )

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

    def check_layer(self, name: str, layer: QSVFTLinear, adapter: str) -> Tensor:
        """The layer's digest, which its tensors match.

        Raises:
            ValueError: they do not, or the base is another.
        """
        M, probe = self._find(name, _M), self._find(name, _PROBE)
        base, digest = self._find(name, "qsvft_base"), self._find(name, "qsvft_digest")
        expected = (layer.pattern(adapter).count,)  # FSDP may hold a part of M
        if tuple(M.shape) != expected or M.dtype != torch.float32:
            raise ValueError(
                f"{name}: the adapter's M is {M.dtype} of shape {tuple(M.shape)}, expected torch.float32 of shape "
                f"{expected} (pattern '{self.config.pattern}' at rank {layer.pattern(adapter).rank} on a "
                f"{layer.out_features} x {layer.in_features} weight). The adapter is of another model or config."
            )
        check_finite(name, adapter, M)
        if layer.settings[adapter].pattern == "top_k":
            self._load_entries(name, layer, adapter, self._find(name, "qsvft_entries"))
        found = {_M: M, _PROBE: probe, "qsvft_base": base}
        if layer.settings[adapter].pattern == "top_k":
            found["qsvft_entries"] = self._find(name, "qsvft_entries")
        if layer.settings[adapter].unit != "one":
            found["qsvft_unit"] = self._load_unit(name, layer, adapter)
        if not torch.equal(layer_digest(name, layer, adapter, found, self.digests), digest.cpu()):
            if not torch.equal(layer_digest_before(layer, adapter, found, self.digests), digest.cpu()):
                raise ValueError(
                    f"{name}: the adapter's contents do not match their digest: its file or config was changed or "
                    f"damaged after it was saved, or its pattern ('{self.config.pattern}', seed {self.config.seed}) "
                    "does not come out the same here. Copy or save the adapter again."
                )
            self._from_before = True
        difference = layer.probe_difference(adapter, probe)
        if not difference <= TOLERANCE:
            raise ValueError(self._mismatch(name, layer, adapter, bytes(base.cpu().tolist()), difference))
        # The probe at hand takes the place of the saved one, so that saving again writes what is true here.
        key = next(k for k in (f"{PREFIX}{name}.{_PROBE}", f"{name}.{_PROBE}") if k in self.parameters)
        self.parameters[key] = layer.probe_here(adapter)
        return digest

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


def saved_whole_keys(model: nn.Module, adapter: str, config: QSVFTConfig, state_dict: Mapping[str, Tensor]) -> set[str]:
    """The state's keys of what the adapter trains whole: modules, rows of embeddings, biases."""
    modules = {
        f"{name.replace('_fsdp_wrapped_module.', '')}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
        for key in module.adapter_state_dict_load_map(adapter).values()
    }
    return modules | set(BaseTuner._get_learnable_bias_state_dict(model, dict(state_dict), config))
