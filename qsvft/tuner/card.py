"""The model card of an adapter: what it is, what it needs, how it is loaded, and what it costs to serve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from ..storage.headers import read_shard
from .adapter_file import is_m
from .config import QSVFTConfig

CARD = "README.md"
TAG = "qsvft"
_WEIGHTS = "adapter_model.safetensors"


def tag_card(folder: Path, more: Sequence[str] = ()) -> None:
    """Give a card that somebody may have written the tag of the method, and these."""
    card = ModelCard.load(folder / CARD, ignore_metadata_errors=True)
    tags = list(card.data.tags or [])
    if not {TAG, *more} <= set(tags):
        card.data.tags = sorted({*tags, TAG, *more})
        card.save(folder / CARD)


def write_card(folder: Path, config: QSVFTConfig, training: Sequence[str] = ()) -> None:
    """Write the card of a saved adapter, in place of the empty form that PEFT leaves.

    Args:
        folder: where adapter and card are.
        config: of the adapter.
        training: lines of Markdown on data and losses.
    """
    found = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data if (folder / CARD).is_file() else None
    data = ModelCardData(
        library_name="peft",
        base_model=_on_the_hub(config),
        pipeline_tag=getattr(found, "pipeline_tag", None),
        tags=sorted({TAG, *_tags(config, getattr(found, "tags", None) or [])}),
    )
    lines = [
        "---", data.to_yaml(), "---", "",
        f"# An SVFT adapter{f' of {name}' if (name := _on_the_hub(config)) else ''}", "",
        "The base is frozen; trained is M alone, in `W' = W + U M Vᵀ` ([SVFT](https://arxiv.org/abs/2405.19597), by "
        "qsvft).", "",
        "| | |", "|---|---|",
        *(f"| {name} | {text} |" for name, text in _rows(folder, config).items()), "",
        *([*training, ""] if training else []),
        "## To load it", "",
        "```python", "import qsvft", "",
        f"model = qsvft.load({_place(config)})  # pip install qsvft; base, bits and factors are found", "```", "",
        "## To serve it", "",
        _serving(config), "",
    ]  # fmt: skip
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")


def _rows(folder: Path, config: QSVFTConfig) -> Mapping[str, str]:
    held = config.held_base()
    base = _on_the_hub(config) or "a local directory"
    revision = f", revision {config.revision}" if config.revision else ""
    bits = f", held in {held['bits']} bits" if "bits" in held else ""
    versions = (config.base or {}).get("versions") or {}
    rows = {
        "base": f"{base}{revision}{bits}",
        "form": f"pattern {config.pattern}, rank {config.rank or 'full'}, basis {config.basis}, sides {config.sides}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if (folder / _WEIGHTS).is_file():
        _, entries = read_shard(folder / _WEIGHTS)
        M = [entry.nbytes // 4 for name, entry in entries.items() if is_m(name)]
        size = sum(entry.nbytes for entry in entries.values()) / 2**20
        rows["trained"] = f"{sum(M):,} numbers in {len(M)} layers"
        rows["file"] = f"{size:,.1f} MiB{', factors among them' if config.include_factors else ''}"
    return rows


def _serving(config: QSVFTConfig) -> str:
    rank = f"of rank {config.rank}" if config.rank else "of the rank that you choose"
    exact = "exactly" if config.rank and config.rank <= 512 else "nearly, by as much as the export says,"
    return (
        "Beside the base it takes M and its factors, and for each token two products with factors and one with M in "
        f"each adapted layer. `qsvft export` writes a LoRA {rank} that is {exact} the same change, for vLLM, SGLang "
        "and llama.cpp; or merges it into the base, where it costs nothing."
    )


def _on_the_hub(config: QSVFTConfig) -> str | None:
    """The base's id; None for a directory of this machine, which concerns nobody else."""
    name = config.base_model_name_or_path
    return None if not name or os.path.isabs(name) or os.path.exists(name) else str(name)


def _place(config: QSVFTConfig) -> str:
    return '"PATH_OR_ID"' if _on_the_hub(config) else '"PATH_OR_ID", base="PATH_OR_ID_OF_THE_BASE"'


def _tags(config: QSVFTConfig, found: Sequence[str]) -> list[str]:
    """PEFT's, with the base's name in place of where it was loaded from."""
    kept, name = [tag for tag in found if not tag.startswith("base_model:")], _on_the_hub(config)
    return [*kept, *([f"base_model:adapter:{name}"] if name else [])]
