"""QSVFTConfig: what an adapter is, in the fields PEFT users know."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..options.adapter import ALL_LINEAR, FACTOR_FIELDS, OPTIONS, AdapterOptions, are_names, are_strings
from ..options.option import NAMES
from ..storage.json_files import require_file
from ..storage.tensor_files import TensorFiles
from ..storage.whole_files import whole_file
from .peft_type import QSVFT


def _refuse(name: str, found: object, allowed: str) -> NoReturn:
    raise ValueError(f"QSVFTConfig.{name}: expected {allowed}, got {found!r}")


def _in_order(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists."""
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in fields.items()}


def _is_record(value: Any) -> bool:
    weights = value.get("weights", []) if isinstance(value, dict) else None
    return value is None or (isinstance(weights, list) and all(isinstance(one, dict) for one in weights))


DENSE_RANK = 128
"""k of a dense M where none is given."""
LEAN_BITS, PAPER_BITS = 8, 16
"""Of U and V where none are given."""

_MADE_HERE = ("none", "nf4", "fp4", "int8")


@dataclass
class QSVFTConfig(AdapterOptions, PeftConfig):
    """Configuration of an SVFT adapter on a (quantised) frozen model.

    W' = W + U_k M V_kᵀ with U, V the singular vectors of the weight as held and M sparse, fp32, zero
    at the start. See arXiv 2405.19597; the paper's SVFT^P, SVFT^B, SVFT^R and SVFT^T are the patterns
    "plain", "banded", "random" and "top_k".

    Args:
        target_modules: names of the linear layers to adapt, a regular expression, or "all-linear"
            (every linear layer but the output head, experts, routers and gates with one output), which None means as
            well.
        target_parameters: names of experts' parameters to adapt, such as "mlp.experts.gate_up_proj", each expert as a
            linear layer of its own; no expert is adapted that is not named. With experts alone: target_modules=[].
        exclude_modules: names, or a regular expression, of layers to leave out.
        modules_to_save: modules to train and save whole, such as a fresh classification head.
        trainable_token_indices: tokens whose rows of the input embeddings are trained and saved, as for new special
            tokens: their ids, or {"embed_tokens": ids} by a layer's name. Where embeddings and head are one weight,
            both change. Not of an embedding that is quantised.
        bias: "none", "qsvft_only" (the biases of the adapted layers train, and are saved with the adapter) or "all"
            (all biases of the model). As in PEFT they are the base's own: its only adapter may train them, and what
            it changed of them stays while it is disabled.
        ensure_weight_tying: with ``modules_to_save`` or ``trainable_token_indices``: what is tied to it stays so.
        layers_to_transform: numbers of the layers of a model (blocks) to adapt, None for all.
        layers_pattern: what their list is called, such as "layers" or "h", where a model has several numbered lists;
            None takes the first number in a name.
        rank: k, how many directions M acts on; a layer with fewer takes all of its min(m, n). None is 128 for a dense
            M, and all of them for the other patterns.
        rank_pattern: rank for single layers, by name or regular expression: {"k_proj": 64}; the name of an expert
            ends in its number, as in "down_proj.[0-9]+".
        pattern: "plain", "banded", "random", "top_k" or "dense": which entries of M train. "dense" (default) trains
            all k * k, and wants a small rank.
        off_diagonals: d. The band has k(2d+1) - d(d+1) entries; random and top_k take as many.
            Ignored by "plain" and "dense".
        sides: "both" holds U and V, as the paper does, "one" only the factor of the smaller side.
        unit: what 1 in M stands for. "weight": a row of ones changes W v by as much as W v is, alpha = |W|_F sqrt(k) /
            entries, so that a step at one learning rate is as large for every pattern, rank and width; "one": 1, as
            in the paper. None is "weight", and "one" for an adapter saved before there was a choice.
        seed: seed of the random pattern.
        factor_bits: how U and V are held: 16 (bf16), 8 (int8 in blocks of 64) or 4 (NF4, double quantisation). None is
            8 for a dense M and for directions from data, and 16 otherwise.
        basis: "singular" (singular vectors) or "data": V holds the leading directions of the layer's inputs on some
            batches, U those of the gradient of its outputs, or of the outputs where the model has a new head
            (``sides="both"`` only; see :func:`qsvft.calibrate`). They
            cannot be computed again, so that the adapter carries them (``include_factors``).
        decomposition: how U and V are computed: "exact" (fp64 singular vectors), "randomized" (fp64, directions that
            hold nearly the most energy that ``rank`` directions can, for a fraction of the time where the rank is
            small), "auto" (randomized where a weight has at least 1024 directions and the rank is at most an eighth of
            them, else exact) or "float32" (as auto in fp32; not reproducible, so that the adapter fits only the
            prepared model that it was trained on). None is "auto", and "exact" for an adapter saved before there was
            a choice.
        residual: the factors make the base more exact; ``sides="both"`` and a base in 4 bits only. With singular
            vectors the base is NF4(W - U S Vᵀ) with U S Vᵀ added back, made from a dense one. With directions from data
            the base stays NF4(W), and the adapter gives back what its rounding took from V: y = NF4(W) x + E Vᵀ x +
            U M Vᵀ x, E = (W - NF4(W)) V, (m, k), held as U and V are.
        init_weights: M begins at zero, which is the base itself. False: at noise that changes W by 0.3 |W|_F, so that
            an adapter can be told from the base without training it, as PEFT's own tests do.
        include_factors: save U, V and their scales with the adapter (several gigabytes for a 7B model), so that
            loading it decomposes nothing and does not depend on how the factors come out elsewhere. PEFT reads the
            whole file to the GPU for a moment; torch_device="cpu" in ``from_pretrained`` avoids that.
        base: how the base weights were held when the adapter was made (bits, quantisation, library
            versions); filled in by the library and compared on loading.

    Raises:
        ValueError: a field out of its range; the message names the field and what is allowed.
    """

    base: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base was held; filled in by the library."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = QSVFT
        self.where_read: tuple[str, str | None, dict[str, Any]] | None = None  # no field: not part of the config
        wanted = self.target_modules
        if wanted is None or (isinstance(wanted, str) and wanted.lower() == ALL_LINEAR):  # as PEFT reads it
            self.target_modules = ALL_LINEAR
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and are_strings(value):
                setattr(self, name, set(value))
        self._validate()

    def _validate(self) -> None:
        """Every option by its declaration, those with a default that depends on others, and what goes together."""
        if not _is_record(self.base):
            _refuse("base", self.base, "what the library filled in of the base's weights, or None")
        for name, one in OPTIONS.items():
            if one.kind is NAMES and not are_names(getattr(self, name)):
                _refuse(name, getattr(self, name), "strings")
            one.refuse(getattr(self, name), "QSVFTConfig.")
        if not self.target_modules and not self.target_parameters:
            _refuse("target_modules", self.target_modules, "names, a regular expression or 'all-linear'")
        if self.decomposition is None:
            self.decomposition = "auto" if self.base is None else "exact"
        if self.unit is None:
            self.unit = "weight" if self.base is None else "one"
        if self.rank is None and self.pattern == "dense" and self.base is None:
            self.rank = DENSE_RANK
        if self.factor_bits is None:
            lean = self.base is None and (self.pattern == "dense" or self.basis == "data")
            self.factor_bits = LEAN_BITS if lean else PAPER_BITS
        self._validate_together()
        self.include_factors = self.include_factors or self.basis == "data"

    def _validate_together(self) -> None:
        """What only goes with one form, or not by itself."""
        if self.layers_pattern and self.layers_to_transform is None:
            _refuse("layers_pattern", self.layers_pattern, "layers_to_transform with it")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR and self.layers_to_transform:
            _refuse("layers_to_transform", self.layers_to_transform, "names or 'all-linear' as target_modules with it")
        if self.sides == "one" and self.basis == "data":
            _refuse("basis", "data", "sides='both' with basis='data'; sides is 'one'")
        if self.sides == "one" and self.residual:
            _refuse("residual", True, "sides='both' with residual=True (it adds U S V^T back); sides is 'one'")

    def read_from(self, name: str, subfolder: str | None, options: Mapping[str, Any]) -> None:
        """Remember where the adapter is that this config is of; see :mod:`qsvft.tuner.sources`."""
        self.where_read = (name, subfolder, dict(options))

    def held_base(self) -> dict[str, Any]:
        """How the base of the adapter was held (``bits``, ``dtype``, ...); empty if not known.

        Of several kinds that with the fewest bits: a base in 4 bits may have layers that stay dense."""
        held: list[dict[str, Any]] = (self.base or {}).get("weights") or [{}]
        return min(held, key=lambda kind: bits if isinstance(bits := kind.get("bits"), int) else 16)

    def check_makeable(self) -> None:
        """Refuse a base that is not made from a checkpoint here, but by the library that had quantised it.

        Raises:
            ValueError: naming what holds its weights.
        """
        kind = self.held_base().get("quant_type", "none")
        if kind not in _MADE_HERE:
            raise ValueError(
                f"the adapter's base was held as {kind}, by another library; expected one of {', '.join(_MADE_HERE)}, "
                "which are made from a checkpoint here. Load the base with that library as it was, and the adapter "
                "with PeftModel.from_pretrained(model, adapter); merge_and_unload() makes it dense."
            )

    def factor_options(self) -> dict[str, Any]:
        """The fields that weights and factors of a prepared directory depend on, as JSON has them."""
        options = {name: getattr(self, name) for name in FACTOR_FIELDS}
        return _in_order({**options, "residual": self.residual_base})

    @property
    def stored_bits(self) -> int:
        """``factor_bits``, which is a number once the config is made."""
        assert self.factor_bits is not None
        return self.factor_bits

    @property
    def residual_base(self) -> bool:
        """Whether ``residual`` is a matter of the base: NF4 of what the singular directions leave."""
        return self.residual and self.basis != "data"

    @property
    def gives_back(self) -> bool:
        """Whether ``residual`` is a matter of the adapter, which gives back what rounding took."""
        return self.residual and self.basis == "data"

    def to_dict(self) -> dict[str, Any]:
        """All fields. Sets are in order: the same config is saved with the same bytes by every process."""
        return _in_order(super().to_dict())

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` atomically: a crash leaves the old file whole."""
        os.makedirs(save_directory, exist_ok=True)
        with (
            whole_file(Path(save_directory) / CONFIG_NAME) as temporary,
            TemporaryDirectory(dir=save_directory, prefix=f".{CONFIG_NAME}.") as staging,
        ):
            super().save_pretrained(staging, **kwargs)
            os.replace(Path(staging) / CONFIG_NAME, temporary)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> QSVFTConfig:
        """Read a config; refuse a local adapter whose weight file is damaged before anything is built."""
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        weights = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.lexists(weights):
            require_file(Path(weights))
            TensorFiles.from_file(weights, "save the adapter again")
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        assert isinstance(config, cls)
        return config
