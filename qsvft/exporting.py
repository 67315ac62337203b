"""``export``: a trained adapter in a form that programs take which know nothing of SVFT."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint.making.cache import prepared_in_cache
from .checkpoint.making.job import open_job
from .checkpoint.making.streaming import chosen_device, companions
from .checkpoint.prepared.record import read_record
from .checkpoint.source.architecture import read_config
from .formats.base import Base, Original
from .formats.dense import Dense
from .formats.exported import Exported, write_card
from .formats.llama_cpp import LORA, MODEL, find_converter, to_gguf
from .formats.saved_lora import export_lora
from .options.choices import EXPORT_DTYPES, FORMATS, ONTO, RANKS
from .storage.whole_files import check_folder_writable
from .storage.whole_folders import SAVING, finish_saving, whole_folder
from .tuner.config import QSVFTConfig
from .tuner.heads import head_of
from .tuner.one_by_one import SavedAdapter

_Report = Callable[[Exported], None]


def export(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = "lora",
    rank: int | None = None,
    base: str | os.PathLike[str] | None = None,
    onto: str = "held",
    dtype: str | None = None,
    llama_cpp: str | os.PathLike[str] | None = None,
    progress: bool = True,
    report: _Report | None = None,
) -> Exported:
    """Write a trained adapter as PEFT's LoRA, or merged into its base as a dense model, or either as a GGUF file.

    A LoRA of rank k is exactly what an adapter of k directions is: dW = B A with B = U M alpha, A = Vᵀ (or, one-sided,
    B = W V S⁻¹ M alpha). No SVD is taken, but for a smaller rank that of the (k, k) core. A dense model is W + dW,
    added in fp32 and rounded once. One layer is in memory at a time, of a dense model a file of a gibibyte, and each is
    checked as loading checks it.

    Args:
        adapter: a directory or a hub id.
        target: the directory to make; it must not hold anything.
        format: "lora", "dense", "gguf" (the dense model) or "gguf-lora" (the LoRA).
        rank: of a LoRA, one of 8, 16, 32, 64, 128, 256, 320, 512; None for the smallest that holds all of the change.
        base: a prepared directory, or the checkpoint that the adapter was trained on, which is prepared first; None for
            the one that the adapter names.
        onto: the base that it is for, or that it is merged into: "held", as the adapter had it, in 4 bits for example,
            or "original", before it was rounded, which needs nothing given back of that rounding (``residual=True``).
        dtype: "bfloat16", "float16" or "float32"; None is bfloat16 of a LoRA, and of a model what its base has.
        llama_cpp: a checkout of llama.cpp, whose converters write GGUF; None for $LLAMA_CPP or the PATH.
        progress: show a progress bar.
        report: called with what is known before anything stands in the target.

    Returns:
        The folder, and how far off what was written is.

    Raises:
        ValueError: the adapter does not fit its base or names none; an option out of range; the target holds
            something; llama.cpp is not there, or does not know the model.
        OSError: the target cannot be written, or has no room; no base at that path.
    """
    _check(format, onto, dtype, rank)
    folder, lora = Path(target), format in ("lora", "gguf-lora")
    converter = find_converter(LORA if lora else MODEL, llama_cpp) if format.startswith("gguf") else None
    _check_target(folder)
    config = QSVFTConfig.from_pretrained(str(adapter))
    if lora and config.residual_base and onto == "held":
        raise ValueError(
            f"{adapter}: its base is a residual in 4 bits with directions beside it (residual=True), on which no LoRA "
            "stands; expected onto='original' (--onto original), the base before it was rounded, or format='dense'."
        )
    saved, held = SavedAdapter(config), _open_base(adapter, base, config, progress)
    chosen = None if dtype is None else getattr(torch, dtype)
    with whole_folder(folder) as staging:
        _check_empty(folder)  # another may have been faster
        written = staging if converter is None else staging / "source"
        written.mkdir(exist_ok=True)
        if lora:
            found = export_lora(saved, held, rank, onto, chosen or torch.bfloat16, written, progress)
        else:
            found = Dense(saved, held, onto, chosen).write(written, progress)
        found = replace(found, folder=folder, format=format)
        if converter is not None:
            _convert(converter, written, staging, found, held if lora else None)
        if report is not None:
            report(found)
        write_card(staging, found, config)
    return found


def _check(format: str, onto: str, dtype: str | None, rank: int | None) -> None:
    given = (("format", format, FORMATS), ("onto", onto, ONTO), ("dtype", dtype, (*EXPORT_DTYPES, None)))
    for name, value, values in given:
        if value not in values:
            raise ValueError(f"export(): {name}: expected one of {', '.join(map(str, values))}, got {value!r}")
    if rank is not None and (isinstance(rank, bool) or rank not in RANKS):
        raise ValueError(f"export(): rank: expected one of {', '.join(map(str, RANKS))}, or None, got {rank!r}")
    if rank is not None and "lora" not in format:
        raise ValueError(f"export(): rank is a LoRA's, got rank={rank} with format={format!r}; expected no rank")


def _check_target(folder: Path) -> None:
    check_folder_writable(folder)
    finish_saving(folder)
    _check_empty(folder)


def _check_empty(folder: Path) -> None:
    if found := sorted({path.name for path in folder.iterdir()} - {SAVING}):
        raise ValueError(f"{folder}: holds something already ({found[0]!r}); expected a new directory. Give another.")


def _open_base(
    adapter: str | os.PathLike[str], base: str | os.PathLike[str] | None, config: QSVFTConfig, progress: bool
) -> Base:
    """An adapter's base; a checkpoint is prepared first, into the cache, as ``from_pretrained`` does it."""
    found = base if base is not None else config.base_model_name_or_path
    if not found:
        raise ValueError(f"{adapter}: names no base model; expected one. Give it: base= (--base on the command line).")
    head = head_of(config, read_config(Path(found).parent if os.path.isfile(found) else found))
    if read_record(found) is not None:
        return Base(Path(found), head, None)
    config.check_makeable()
    held = config.held_base()
    revision = config.revision if base is None else None
    bits, dtype = held.get("bits", 4), held.get("dtype")
    job = open_job(found, bits, config, {}, dtype=dtype, head=head, revision=revision)
    folder = prepared_in_cache(job.without_directions(), None, 1, chosen_device(None), progress)
    return Base(folder, head, Original(job.checkpoint, job.source_model, job.source_names.pieces))


def _convert(converter: Path, source: Path, staging: Path, found: Exported, base: Base | None) -> None:
    """One GGUF file in place of what is converted; of a LoRA beside its base's config and tokenizer."""
    config = None
    if base is not None:
        config = source / "base"
        config.mkdir()
        base.config.save_pretrained(config)
        for path in companions(base.folder):
            shutil.copyfile(path, config / path.name)
    name = "model.gguf" if base is None else "lora.gguf"
    to_gguf(converter, source, staging / name, found.dtype, config)
    shutil.rmtree(source)
