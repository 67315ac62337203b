"""The options of an adapter, fields of :class:`qsvft.QSVFTConfig` that a user chooses; what they mean stands there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from .choices import BASES, BIASES, DECOMPOSITIONS, PATTERNS, SIDES, STORED_BITS, UNITS
from .option import INTEGER, NAMES, NUMBERS, SWITCH, TABLE, WORD, declared, is_integer, one_of, option

ALL_LINEAR = "all-linear"


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def are_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or are_strings(value)


def _is_numbers(value: Any) -> bool:
    several = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return all(is_integer(one, 0) for one in several)


def _are_tokens(value: Any) -> bool:
    if value is None:
        return True
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return bool(lists) and all(
        isinstance(one, list) and one and len(set(map(str, one))) == len(one) and all(is_integer(i, 0) for i in one)
        for one in lists
    )


def are_strings(value: Any) -> bool:
    return isinstance(value, Collection) and all(isinstance(one, str) and one for one in value)


def _is_list(value: Any) -> bool:
    return value is None or (not isinstance(value, str) and are_strings(value))


@dataclass
class AdapterOptions:
    """Each option with its default, its check and who reads it."""

    target_modules: set[str] | list[str] | str | None = option(
        "all-linear",
        NAMES,
        "Linear layers to adapt: names, a regex, or 'all-linear'.",
        "names, a regular expression or 'all-linear'",
        are_names,
        of_factors=True,
        counted=True,
    )
    target_parameters: list[str] | None = option(
        None, NAMES, "Experts to adapt, by their parameters' names.", "strings", _is_list, of_factors=True, counted=True
    )
    exclude_modules: set[str] | list[str] | str | None = option(
        None, NAMES, "Layers to leave out: names or a regex.", "strings", are_names, of_factors=True, counted=True
    )
    modules_to_save: list[str] | None = option(
        None, NAMES, "Modules to train and save whole, such as a new head.", "strings", _is_list, of_factors=True
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, TABLE, "Tokens whose embeddings train: ids, or ids by a layer's name.",
        "token ids of at least 0, each once, or a dict of layers' names to such lists, or None", _are_tokens,
    )  # fmt: skip
    bias: str = option("none", WORD, "Biases that train: of the adapted layers, or all.", *one_of(BIASES))
    ensure_weight_tying: bool = option(
        False, SWITCH, "What trains of tied embeddings and head stays tied.", "True or False", _is_bool
    )
    layers_to_transform: list[int] | int | None = option(
        None, NUMBERS, "Numbers of the layers to adapt; None for all.", "whole numbers, or None", _is_numbers,
        of_factors=True, counted=True,
    )  # fmt: skip
    layers_pattern: list[str] | str | None = option(
        None, NAMES, "What the list of numbered layers is called.", "strings", are_names, of_factors=True, counted=True
    )
    rank: int | None = option(
        None,
        INTEGER,
        "Directions per layer; None is 128 for a dense M, and all for the others.",
        "an integer of at least 1, or None",
        lambda value: value is None or is_integer(value, 1),
        of_factors=True,
        counted=True,
    )
    rank_pattern: dict[str, int] = option(
        {},
        TABLE,
        "Rank of single layers, by name or regex.",
        "a dict of names to integers of at least 1",
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(name, str) and is_integer(rank, 1) for name, rank in value.items())
        ),
        of_factors=True,
        counted=True,
    )
    pattern: str = option(
        "dense", WORD, "Which entries of M train: a diagonal, a band, as many elsewhere, or all.", *one_of(PATTERNS),
        counted=True,
    )  # fmt: skip
    off_diagonals: int = option(
        8,
        INTEGER,
        "Off-diagonals on each side of the band; random and top_k take as many entries.",
        "an integer of at least 0",
        lambda value: is_integer(value, 0),
        counted=True,
    )
    sides: str = option(
        "both", WORD, "Hold both factors (the paper's form), or that of the smaller side.", *one_of(SIDES),
        of_factors=True, counted=True,
    )  # fmt: skip
    unit: str | None = option(
        None,
        WORD,
        "What 1 in M stands for: a change as large as the weight, or 1; None for weight.",
        one_of(UNITS)[0],
        lambda value: value is None or value in UNITS,
    )
    seed: int = option(0, INTEGER, "Seed of the random pattern.", "an integer", is_integer, counted=True)
    factor_bits: int | None = option(
        None,
        INTEGER,
        "How U and V are held: 16, 8 or 4 bits; None is 8 for a dense M or directions from data, else 16.",
        "16 (bf16), 8 (int8), 4 (NF4) or None",
        lambda value: value is None or (is_integer(value) and value in STORED_BITS),
        of_factors=True,
        counted=True,
    )
    basis: str = option(
        "singular", WORD, "Singular vectors, or directions from data.", *one_of(BASES), of_factors=True, counted=True
    )
    decomposition: str | None = option(
        None,
        WORD,
        f"How U and V are computed: {', '.join(DECOMPOSITIONS)}; None for auto.",
        one_of(DECOMPOSITIONS)[0],
        lambda value: value is None or value in DECOMPOSITIONS,
        of_factors=True,
        counted=True,
    )
    residual: bool = option(
        False, SWITCH, "Give back what 4 bits lose along the directions; sides='both'.", "True or False", _is_bool,
        of_factors=True, counted=True,
    )  # fmt: skip
    init_weights: bool = option(
        True, SWITCH, "M begins at zero; False: at noise, to try adapters out.", "True or False", _is_bool
    )
    include_factors: bool = option(False, SWITCH, "Save the factors with the adapter.", "True or False", _is_bool)


OPTIONS = declared(AdapterOptions)
"""The same by name."""

FACTOR_FIELDS = tuple(name for name, one in OPTIONS.items() if one.of_factors)
"""The options on which weights and factors depend; the others are M's alone."""
