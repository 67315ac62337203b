"""QSVFTConfig: what an adapter is, in the fields PEFT users know."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..maths.decomposition import DECOMPOSITIONS
from ..maths.patterns import PATTERNS
from ..storage.factor_files import FactorFiles
from ..storage.stored_matrix import STORED_BITS
from .files import check_adapter_directory, weights_file
from .peft_type import QSVFT

SIDES = ("one", "both")
BASES = ("singular", "hadamard")
FACTOR_FIELDS = (
    *("target_modules", "exclude_modules", "modules_to_save", "rank", "rank_pattern", "sides", "factor_bits"),
    *("share_inputs", "basis", "seed", "residual", "decomposition"),
)
"""The fields of a config on which weights and factors depend; the others are M's alone."""


def _refuse(name: str, found: object, allowed: str) -> NoReturn:
    raise ValueError(f"QSVFTConfig.{name}: expected {allowed}, got {found!r}")


def _in_order(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sets as sorted lists."""
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in fields.items()}


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class QSVFTConfig(PeftConfig):
    """Configuration of an SVFT adapter on a (quantised) frozen model.

    W' = W + U_k M V_kᵀ with U, V the singular vectors of the weight as held and M sparse, fp32, zero
    at the start. See arXiv 2405.19597; the paper's SVFT^P, SVFT^B, SVFT^R and SVFT^T are the patterns
    "plain", "banded", "random" and "top_k".

    Args:
        target_modules: names of the linear layers to adapt, a regular expression, or "all-linear"
            (every linear layer except the output head).
        exclude_modules: names, or a regular expression, of layers to leave out.
        modules_to_save: modules to train and save whole, such as a fresh classification head.
        rank: k, how many singular directions M acts on; None for all min(m, n) of each layer.
        rank_pattern: rank for single layers, by name or regular expression: {"k_proj": 64}.
        pattern: "plain", "banded", "random" or "top_k": which entries of M train.
        off_diagonals: d. The band has k(2d+1) - d(d+1) entries; random and top_k take as many.
            Ignored by "plain".
        sides: "one" holds only the factor of the smaller side (default), "both" is the paper's form.
        tail_damping: tau in [0, 1). The one-sided form divides by max(s_j, tau * rms(s)), so that
            rounding is not blown up along the smallest singular values.
        seed: seed of the random pattern and of the Hadamard basis.
        factor_bits: how U and V are held: 16 (bf16), 8 (int8 in blocks of 64) or 4 (NF4, double quantisation).
        share_inputs: layers that read the same input (q, k, v; gate, up) share the V of their stacked weight,
            and compute Vᵀ x once. True finds them by their names in transformers' models; a list of lists of
            sibling names, [["q_proj", "k_proj"]], says which. One-sided form only, where it is the default.
        basis: "singular" (singular vectors) or "hadamard" (seeded random signs and a Walsh-Hadamard transform:
            nothing stored, nothing decomposed; one-sided form only).
        decomposition: how U and V are computed: "exact" (fp64 singular vectors), "randomized" (fp64, directions that
            hold nearly the most energy that ``rank`` directions can, for a fraction of the time where the rank is
            small), "auto" (randomized where a weight has at least 1024 directions and the rank is at most an eighth of
            them, else exact) or "float32" (as auto in fp32; not reproducible, so that the adapter fits only the
            prepared model that it was trained on). None is "auto", and "exact" for an adapter saved before there was
            a choice. The Hadamard basis ignores it.
        residual: the base is NF4(W - U S Vᵀ) with U S Vᵀ added back, so that the factors make the base more
            exact; ``sides="both"`` only, on a dense base.
        include_factors: save U, V and their scales with the adapter (several gigabytes for a 7B model), so that
            loading it decomposes nothing and does not depend on how the factors come out elsewhere. PEFT reads the
            whole file to the GPU for a moment; torch_device="cpu" in ``from_pretrained`` avoids that.
        base: how the base weights were held when the adapter was made (bits, quantisation, library
            versions); filled in by the library and compared on loading.

    Raises:
        ValueError: a field out of its range; the message names the field and what is allowed.
    """

    target_modules: set[str] | list[str] | str | None = field(
        default="all-linear", metadata={"help": "Linear layers to adapt: names, a regex, or 'all-linear'."}
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out: names or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train and save whole, such as a new head."}
    )
    rank: int | None = field(default=None, metadata={"help": "Singular directions per layer; None for all."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Rank of single layers, by name or regex."}
    )
    pattern: str = field(default="banded", metadata={"help": f"One of {', '.join(PATTERNS)}."})
    off_diagonals: int = field(default=8, metadata={"help": "Off-diagonals on each side of the band."})
    sides: str = field(default="one", metadata={"help": "'one' (one factor held) or 'both' (the paper's)."})
    tail_damping: float = field(
        default=0.1, metadata={"help": "Bound on 1/s of the one-sided form, in units of rms(s)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random pattern and of the Hadamard basis."})
    factor_bits: int = field(default=16, metadata={"help": "How U and V are held: 16, 8 or 4 bits."})
    share_inputs: bool | list[list[str]] | None = field(
        default=None,
        metadata={"help": "One V for layers that read the same input: True, False or lists of names."},
    )
    basis: str = field(default="singular", metadata={"help": f"One of {', '.join(BASES)}."})
    decomposition: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(DECOMPOSITIONS)}; None for auto."}
    )
    residual: bool = field(
        default=False, metadata={"help": "Quantise W - U S V^T and add U S V^T back; needs sides='both'."}
    )
    include_factors: bool = field(default=False, metadata={"help": "Save the factors with the adapter."})
    base: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base was held; filled in by the library."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = QSVFT
        self._read_from: tuple[str, str | None, dict[str, Any]] | None = None  # no field: not part of the config
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._validate()

    def _validate(self) -> None:
        if not self.target_modules:
            _refuse("target_modules", self.target_modules, "names, a regular expression or 'all-linear'")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str) and not all(isinstance(v, str) for v in value):
                _refuse(name, value, "strings")
        if self.rank is not None and (not _is_int(self.rank) or self.rank < 1):
            _refuse("rank", self.rank, "an integer of at least 1, or None for full rank")
        if not isinstance(self.rank_pattern, dict) or not all(
            isinstance(k, str) and _is_int(v) and v >= 1 for k, v in self.rank_pattern.items()
        ):
            _refuse("rank_pattern", self.rank_pattern, "a dict of names to integers of at least 1")
        if self.pattern not in PATTERNS:
            _refuse("pattern", self.pattern, f"one of {', '.join(map(repr, PATTERNS))}")
        if not _is_int(self.off_diagonals) or self.off_diagonals < 0:
            _refuse("off_diagonals", self.off_diagonals, "an integer of at least 0")
        if self.sides not in SIDES:
            _refuse("sides", self.sides, f"one of {', '.join(map(repr, SIDES))}")
        damping = self.tail_damping
        if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 <= damping < 1:
            _refuse("tail_damping", damping, "a number in [0, 1)")
        if not _is_int(self.seed):
            _refuse("seed", self.seed, "an integer")
        if not _is_int(self.factor_bits) or self.factor_bits not in STORED_BITS:
            _refuse("factor_bits", self.factor_bits, "16 (bf16), 8 (int8) or 4 (NF4)")
        if self.basis not in BASES:
            _refuse("basis", self.basis, f"one of {', '.join(map(repr, BASES))}")
        if self.decomposition is None:
            self.decomposition = "auto" if self.base is None else "exact"
        if self.decomposition not in DECOMPOSITIONS:
            _refuse("decomposition", self.decomposition, f"one of {', '.join(map(repr, DECOMPOSITIONS))}")
        self._validate_sharing()
        for name in ("residual", "include_factors"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        self._validate_together()

    def _validate_sharing(self) -> None:
        share: Any = self.share_inputs
        if share is None:
            self.share_inputs = self.sides == "one"
        if share is None or isinstance(share, bool):
            return
        listed = isinstance(share, (list, tuple)) and all(
            isinstance(names, (list, tuple)) and len(names) > 1 and all(isinstance(name, str) for name in names)
            for names in share
        )
        if not listed:
            _refuse("share_inputs", share, "True, False or lists of at least two names, such as [['q_proj', 'k_proj']]")
        self.share_inputs = [list(names) for names in share]

    def _validate_together(self) -> None:
        """What only goes with one form."""
        if self.sides == "both":
            for name, value in (("share_inputs", bool(self.share_inputs)), ("basis", self.basis == "hadamard")):
                if value:
                    _refuse(
                        name, getattr(self, name), f"sides='one' with {name}={getattr(self, name)!r}; sides is 'both'"
                    )
        elif self.residual:
            _refuse("residual", True, "sides='both' with residual=True (it adds U S V^T back); sides is 'one'")

    def read_from(self, name: str, subfolder: str | None, options: Mapping[str, Any]) -> None:
        """Remember where the adapter is that this config is of; see :func:`~qsvft.tuner.files.weights_file`."""
        self._read_from = (name, subfolder, dict(options))

    def own_factors(self) -> FactorFiles | None:
        """The factors in the adapter's file, None if it is no self-contained one.

        Raises:
            ValueError: the file is damaged.
        """
        if not self.include_factors or self._read_from is None or self.basis == "hadamard":
            return None
        path = weights_file(*self._read_from)
        if path is None:
            return None
        self._read_from = (os.path.dirname(path), None, {})  # without what only the download needed, such as a token
        return FactorFiles.from_file(path) or None

    def factor_options(self) -> dict[str, Any]:
        """The fields that weights and factors of a prepared directory depend on, as JSON has them."""
        return _in_order({name: getattr(self, name) for name in FACTOR_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """All fields. Sets are in order: the same config is saved with the same bytes by every process."""
        return _in_order(super().to_dict())

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` atomically: a crash leaves the old file whole."""
        final = os.path.join(save_directory, CONFIG_NAME)
        staging = os.path.join(save_directory, f".{CONFIG_NAME}.{os.getpid()}")
        os.makedirs(save_directory, exist_ok=True)
        try:
            super().save_pretrained(staging, **kwargs)
            os.replace(os.path.join(staging, CONFIG_NAME), final)
        finally:
            if os.path.isdir(staging):
                for name in os.listdir(staging):
                    os.unlink(os.path.join(staging, name))
                os.rmdir(staging)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> QSVFTConfig:
        """Read a config; refuse a local adapter whose weight file is damaged before anything is built."""
        folder = os.path.join(str(pretrained_model_name_or_path), subfolder or "")
        check_adapter_directory(folder)
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{os.path.join(folder, CONFIG_NAME)} is not valid JSON ({error}); expected the file written by "
                "save_pretrained(). It is damaged: take a copy or save the adapter again."
            ) from error
        assert isinstance(config, cls)
        return config
