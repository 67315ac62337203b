"""``merge_adapter``: a trained adapter and its base become an ordinary dense checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from .checkpoint.making.streaming import companions
from .checkpoint.prepared.record import prepared_record
from .checkpoint.source.architecture import load_base, read_config
from .storage.quantization import quantize
from .storage.whole_files import check_folder_writable
from .storage.whole_folders import SAVING, finish_saving, whole_folder
from .tuner.config import QSVFTConfig
from .use_factors import use_factors


def merge_adapter(
    adapter: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    factors: str | os.PathLike[str] | None = None,
    device_map: Any = None,
    progress: bool = True,
) -> Path:
    """Write W + U M Vᵀ of every adapted layer as a checkpoint that needs neither qsvft nor PEFT.

    The whole dense model is in memory meanwhile: about 13 GiB for a 7B.

    Args:
        adapter: a directory or a hub id.
        target: the directory to make; it must not hold anything.
        base: a prepared directory, or the checkpoint that the adapter was trained on; None for the one that the adapter
            names. A checkpoint is quantised as the adapter's config says.
        factors: a prepared directory with the factors that the adapter was trained with, see :func:`use_factors`.
        device_map: where the base goes, as in transformers.
        progress: show progress bars.

    Raises:
        ValueError: the adapter does not fit, or names no base; the target holds something.
        OSError: the target cannot be written; no base at that path.
    """
    config = QSVFTConfig.from_pretrained(str(adapter))
    base = base if base is not None else config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: names no base model; expected one. Give it: base= (--base on the command line).")
    folder = Path(target)
    check_folder_writable(folder)
    finish_saving(folder)
    _check_empty(folder)
    model = _base(base, config, device_map, progress)
    if factors is not None:
        use_factors(model, factors)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    with whole_folder(folder) as staging:
        _check_empty(folder)  # another may have been faster
        merged.save_pretrained(staging)
        for path in companions(Path(base)) if Path(base).is_dir() else ():
            if not (staging / path.name).exists():
                shutil.copyfile(path, staging / path.name)
    return folder


def _check_empty(folder: Path) -> None:
    if found := sorted({path.name for path in folder.iterdir()} - {SAVING}):
        raise ValueError(f"{folder}: holds something already ({found[0]!r}); expected a new directory. Give another.")


def _base(base: str | os.PathLike[str], config: QSVFTConfig, device_map: Any, progress: bool) -> Any:
    """The base model, quantised."""
    read = read_config(base)
    brought = [name.rpartition(".")[2] for name in config.modules_to_save or ()]
    model = load_base(read, base, brought, dtype="auto", device_map=device_map)
    if prepared_record(read) is not None:
        return model
    held = config.held_base()
    dtype = getattr(torch, str(held.get("dtype")), None)
    if isinstance(dtype, torch.dtype):
        model = model.to(dtype)
    return quantize(model, held.get("bits", 4), skip_modules=list(config.modules_to_save or ()), progress=progress)
