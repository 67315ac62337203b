"""``export``: a trained adapter in a form that programs take which know nothing of SVFT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from .checkpoint.making.cache import prepared_in_cache
from .checkpoint.making.job import open_job
from .checkpoint.making.streaming import chosen_device
from .checkpoint.prepared.check import Prepared, open_prepared
from .checkpoint.prepared.layers import names_in_files, read_layer, split_as_held
from .checkpoint.prepared.record import read_record, recorded_options
from .checkpoint.source.architecture import model_class, read_config
from .maths.low_rank import distance, spectrum
from .merging import merge_adapter
from .options.choices import FORMATS, ONTO, RANKS
from .storage.experts import expert_layers
from .storage.factor_files import FactorFiles
from .storage.quantization import linear_names
from .storage.whole_files import check_folder_writable
from .storage.whole_folders import finish_saving, whole_folder
from .tuner.config import QSVFTConfig
from .tuner.lora_factors import lora_factors
from .tuner.one_by_one import ADAPTER, SavedAdapter


@dataclass
class Exported:
    """What was written.

    Attributes:
        folder: where.
        layers: how many layers change.
        rank: of the LoRA; None for a dense model.
        error: |written - dW|_F over |dW|_F, of all layers together, its dtype's rounding included.
        errors: the same of the best fit of each rank, before rounding.
    """

    folder: Path
    layers: int = 0
    rank: int | None = None
    error: float = 0.0
    errors: dict[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.rank is None:
            return f"dense model: {self.folder}"
        lines = [f"LoRA of rank {self.rank} on {self.layers} layers: {self.folder}"]
        if self.errors:
            lines += ["of the adapter's change a LoRA leaves out (Frobenius norm, all layers):"]
            lines += [f"  rank {rank:>3}  {error:.2%}" for rank, error in self.errors.items()]
        return "\n".join([*lines, f"what is written is {self.error:.2%} off, with the rounding of its dtype"])


def export(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = "lora",
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    onto: str = "held",
    dtype: str = "bfloat16",
    progress: bool = True,
    report: Callable[[Exported], None] | None = None,
) -> Exported:
    """Write a trained adapter as PEFT's LoRA, or merged into its base as a dense model.

    A LoRA of rank k is exactly what an adapter of k directions is: dW = B A with B = U M alpha, A = Vᵀ (or, one-sided,
    B = W V S⁻¹ M alpha). No SVD is taken, but for a smaller rank that of the (k, k) core. One layer is in memory at a
    time, and each is checked as loading checks it.

    Args:
        adapter: a directory or a hub id.
        target: the directory to make; it must not hold anything.
        format: "lora" or "dense" (see :func:`~qsvft.merging.merge_adapter`).
        rank: of the LoRA, one of 8, 16, 32, 64, 128, 256, 320, 512; None for the smallest that holds all of the change.
        base: a prepared directory, or the checkpoint that the adapter was trained on, which is prepared first; None for
            the one that the adapter names.
        onto: the base that it will be used on: "held", as the adapter had it, in 4 bits for example, or "original",
            before it was rounded, which needs nothing given back of that rounding (``residual=True``).
        dtype: of the LoRA: "bfloat16", "float16" or "float32".
        progress: show a progress bar.
        report: called with what is known before anything is written.

    Returns:
        The folder, and how far off what was written is.

    Raises:
        ValueError: the adapter does not fit its base or names none; an option out of range; the target holds
            something.
        OSError: the target cannot be written; no base at that path.
    """
    _check(format, onto, dtype, rank)
    folder = Path(target)
    if format == "dense":
        return Exported(merge_adapter(adapter, folder, base=base, progress=progress))
    check_folder_writable(folder)
    finish_saving(folder)
    if any(folder.iterdir()):
        raise ValueError(f"{folder}: holds something already; expected a new directory. Give another.")
    config = QSVFTConfig.from_pretrained(str(adapter))
    if config.residual_base and onto == "held":
        raise ValueError(
            f"{adapter}: its base is a residual in 4 bits with directions beside it (residual=True), on which no LoRA "
            "stands; expected onto='original' (--onto original), the base before it was rounded, or format='dense'."
        )
    saved = SavedAdapter(config)
    lora = _Lora(saved, _Base(_prepared(adapter, base, config, progress)), onto == "held", getattr(torch, dtype))
    lora.make(rank, progress)
    if report is not None:
        report(Exported(folder, len(saved.names), lora.rank, lora.error, lora.errors))
    with whole_folder(folder) as staging:
        lora.write(staging)
    return Exported(folder, len(saved.names), lora.rank, lora.error, lora.errors)


def _check(format: str, onto: str, dtype: str, rank: int | None) -> None:
    allowed = (("format", format, FORMATS), ("onto", onto, ONTO), ("dtype", dtype, ("bfloat16", "float16", "float32")))
    for name, value, values in allowed:
        if value not in values:
            raise ValueError(f"export(): {name}: expected one of {', '.join(values)}, got {value!r}")
    if rank is not None and (isinstance(rank, bool) or rank not in RANKS):
        raise ValueError(f"export(): rank: expected one of {', '.join(map(str, RANKS))}, or None, got {rank!r}")
    if rank is not None and format != "lora":
        raise ValueError(f"export(): rank is a LoRA's, got rank={rank} with format={format!r}; expected no rank")


def _prepared(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None, config: QSVFTConfig, progress: bool
) -> Path:
    """The base as a prepared directory; a checkpoint is prepared first, as ``from_pretrained`` does it."""
    found = base if base is not None else config.base_model_name_or_path
    if not found:
        raise ValueError(f"{adapter}: names no base model; expected one. Give it: base= (--base on the command line).")
    if read_record(found) is not None:
        return Path(found)
    held = config.held_base()
    job = open_job(found, held.get("bits", 4), config, {}, dtype=held.get("dtype"))
    return Path(prepared_in_cache(job.without_directions(), None, 1, chosen_device(None), progress))


class _Base:
    """A prepared directory, whose layers are read one at a time."""

    def __init__(self, folder: Path) -> None:
        self._prepared: Prepared = open_prepared(folder)
        self._prepared.check()
        record = read_record(folder) or {}
        self._adapter = QSVFTConfig(**recorded_options(record))
        self._dtype = getattr(torch, str(record.get("compute_dtype")))
        config = read_config(folder)
        del config.quantization_config
        with torch.device("meta"):
            self.model: PreTrainedModel = model_class(config)(config)
        split_as_held(self._prepared, self.model)
        self.factors = FactorFiles(self._prepared.files.paths)

    def layer(self, name: str) -> nn.Module:
        try:
            plain = self.model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(
                f"{name}: the adapter has an M for this layer, but {type(self.model).__name__} has no such layer. Give "
                "the base that the adapter was trained on."
            ) from error
        known = (one for one in names_in_files(self.model, name) if f"{one}.weight" in self._prepared.entries)
        return read_layer(self._prepared, next(known, name), plain, self._dtype, self._adapter, self.factors)


class _Lora:
    """A LoRA in the making."""

    def __init__(self, saved: SavedAdapter, base: _Base, given_back: bool, dtype: torch.dtype) -> None:
        self._saved, self._base, self._given_back, self._dtype = saved, base, given_back, dtype
        self._tensors: dict[str, tuple[Tensor, Tensor]] = {}
        self.rank, self.error, self.errors = 0, 0.0, dict[int, float]()

    def make(self, rank: int | None, progress: bool) -> None:
        """All layers' factors, of one rank."""
        experts = expert_layers(self._base.model)
        if expert := next((name for name in self._saved.names if name in experts), None):
            raise ValueError(
                f"{expert}: is an expert, which servers' LoRA does not reach; expected linear layers alone. Use "
                "format='dense'."
            )
        wanted, most, norm, off = rank, 0, 0.0, 0.0
        left = dict.fromkeys(RANKS, 0.0)
        for name, layer in self._layers(progress):
            B, A = lora_factors(layer, ADAPTER, self._given_back)
            k = B.shape[1]
            if wanted is None and k > RANKS[-1]:
                raise ValueError(
                    f"{name}: its M acts on {k} directions, and servers take LoRA of at most {RANKS[-1]}; expected "
                    f"rank= one of {', '.join(map(str, RANKS))}, or format='dense'."
                )
            found, most = spectrum(B, A), max(most, k)
            norm += found.norm**2
            for one in left:
                left[one] += found.error(one) ** 2
            kept = (B, A) if wanted is None or k <= wanted else (found.left[:, :wanted], found.right[:wanted])
            rounded = (kept[0].to(self._dtype), kept[1].to(self._dtype))
            off += distance(B, A, rounded[0].float(), rounded[1].float()) ** 2
            self._tensors[name] = rounded
        self.rank = wanted or next(one for one in RANKS if one >= most)
        self.error = (off / norm) ** 0.5 if norm else 0.0
        self.errors = {one: (left[one] / norm) ** 0.5 if norm else 0.0 for one in RANKS if one < most}

    def _layers(self, progress: bool) -> Iterator[tuple[str, Any]]:
        layers = self._saved.layers(self._base.layer, self._base.factors)
        yield from tqdm(layers, total=len(self._saved.names), desc="exporting", unit="layer", disable=not progress)

    def write(self, folder: Path) -> None:
        """``adapter_model.safetensors``, ``adapter_config.json`` and a card."""
        tensors = dict(self._saved.trained_whole)
        for name, (B, A) in self._tensors.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = _padded(A, self.rank, 0)
            tensors[f"{prefix}.lora_B.weight"] = _padded(B, self.rank, 1)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
        self._config().save_pretrained(folder)
        (folder / "README.md").write_text(self._card(), encoding="utf-8")

    def _config(self) -> LoraConfig:
        config, names = self._saved.config, self._saved.names
        conv = [isinstance(self._base.model.get_submodule(name), Conv1D) for name in names]
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=_short(names, linear_names(self._base.model)),
            modules_to_save=config.modules_to_save,
            trainable_token_indices=config.trainable_token_indices,
            bias="none" if config.bias == "none" else "all" if config.bias == "all" else "lora_only",
            fan_in_fan_out=all(conv),
            task_type=config.task_type,
            inference_mode=True,
            base_model_name_or_path=config.base_model_name_or_path,
        )

    def _card(self) -> str:
        base = self._saved.config.base_model_name_or_path
        held = ", ".join(f"{name} {value}" for name, value in self._saved.config.held_base().items())
        lines = [f"| {rank} | {error:.2%} |" for rank, error in self.errors.items()]
        table = ["", "| rank | left out of the change |", "|---|---|", *lines] if lines else []
        return "\n".join(
            [
                "---",
                "library_name: peft",
                *([f"base_model: {base}"] if base and not os.path.exists(base) else []),  # a hub id, not a place here
                "tags: [lora, qsvft]",
                "---",
                "",
                f"A LoRA of rank {self.rank}, exported from an SVFT adapter (arXiv 2405.19597): of its change "
                f"{self.error:.2%} is left out, rounding to {str(self._dtype).removeprefix('torch.')} included.",
                f"It is for the base {'as the adapter had it: ' + held if self._given_back else 'before rounding'}.",
                *table,
                "",
            ]
        )


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    """With zeros to a rank: servers take few ranks, and one for all layers."""
    shape = list(factor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim) if shape[dim] else factor


def _short(names: list[str], known: list[str]) -> list[str]:
    """The last parts of layers' names, where they name no other layer."""
    leaves = {name.rpartition(".")[2] for name in names}
    same = {name for name in known if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if same == set(names) else sorted(names)
