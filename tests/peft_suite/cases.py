"""The cases of PEFT's tests for this method: LoRA's, as far as they are of linear layers, with our own options."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

import qsvft

KEPT = {"target_modules", "modules_to_save", "exclude_modules", "task_type", "bias"}
"""Options of LoRA's cases that mean the same here."""

LORAS = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "use_rslora"}
"""Options of LoRA's that may be left out; a case with others is LoRA's own."""

FORMS: dict[str, dict[str, Any]] = {
    "": {"rank": 2},
    "one-sided band": {"pattern": "banded", "off_diagonals": 1, "sides": "one"},
}
MODELS = {"MLP", "MLP2", "MLP_LayerNorm", "Conv1d", "EmbConv1D", "MHA"}
"""Models of which linear layers are what is adapted."""

_NOT_LINEAR = ("conv", "emb", "mha", "layernorm", "bn", "norm")


def ours(module: str, name: str, rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Our cases in place of a list's.

    Args:
        module: the test module.
        name: the list's name in it.
        rows: what it holds; in each the config class, with its keywords after it.
    """
    if module == "test_quantization.py":
        targets = {"target_modules": ["q_proj", "v_proj"]}
        return [(qsvft.QSVFTConfig, {**targets, **form}) for form in FORMS.values()]
    if name == "MIXED_ADAPTER_TEST_CASES":
        lin0 = {"target_modules": ["lin0"], "init_weights": False}
        return [
            ("QSVFT mixed adapter", configured(**lin0), configured(**lin0, rank=4)),
            ("QSVFT mixed adapter, other forms", configured(**lin0), configured(**lin0, **FORMS["one-sided band"])),
        ]
    if name == "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES":
        return [
            ("QSVFT Same", "qsvft", qsvft.QSVFTConfig, *(_noisy({"target_modules": ["lin0"]}),) * 2),
            (
                "QSVFT Different",
                "qsvft",
                qsvft.QSVFTConfig,
                *map(_noisy, ({"target_modules": [n]} for n in ("lin0", "lin1"))),
            ),
        ]
    found: list[tuple[Any, ...]] = []
    for row in rows:
        at = next((place for place, item in enumerate(row) if item is LoraConfig), None)
        if at is None or not set(row[at + 1]) <= KEPT | LORAS or not _linear(row[:at], row[at + 1]):
            continue
        for form, options in FORMS.items():
            kept = _kept(row[at + 1])
            if kept.get("task_type") == "FEATURE_EXTRACTION":
                # No gradient reaches a pooler in those tests, and DeBERTa's first form reads in_proj's weight itself.
                kept["target_modules"] = ["attention.output.dense"]
            label = [f"{row[0].replace('LoRA', 'QSVFT')} {form}".strip(), *row[1:at]] if at else []
            if not any(old[: at + 2] == (*label, qsvft.QSVFTConfig, {**kept, **options}) for old in found):
                found.append((*label, qsvft.QSVFTConfig, {**kept, **options}))
    return found


def configured(**options: Any) -> qsvft.QSVFTConfig:
    """A config of ours in place of another method's, with those of its options that mean the same."""
    noise = False in (options.get("init_lora_weights"), options.get("init_weights"))
    ours = {key: value for key, value in options.items() if key in ("pattern", "sides", "off_diagonals")}
    targets = {"target_modules": ["q_proj", "v_proj"], "rank": options.get("rank", 2)}
    return qsvft.QSVFTConfig(**{**targets, **_kept(options), **ours, "init_weights": not noise})


def _kept(options: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in options.items() if key in KEPT}
    return {**kept, "bias": kept["bias"].replace("lora_only", "qsvft_only")} if "bias" in kept else kept


def _noisy(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "rank": 2, "init_weights": False}


def _linear(label: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether a case is of linear layers alone."""
    if label and label[1] not in MODELS:
        return False
    targets = options.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    return not any(word in target.lower() for target in targets for word in _NOT_LINEAR)
