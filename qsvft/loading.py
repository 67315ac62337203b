"""``from_pretrained``: a model ready for fine-tuning from a prepared directory, or from any checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from .checkpoint.making.cache import prepared_in_cache
from .checkpoint.making.job import chosen_dtype, open_job
from .checkpoint.making.plan import stored_forms
from .checkpoint.making.streaming import chosen_device
from .checkpoint.prepared.quantizer import METHOD
from .lean.vocabulary import check_embeddings
from .lean.vocabulary import quantize_embeddings as hold_embeddings
from .memory.fit.ladder import STEPS
from .memory.fit.options import fitting_options
from .memory.fit.recommend import Recommendation
from .prepare import attach_lean
from .storage.factor_files import FactorFiles
from .tuner.config import FACTOR_FIELDS, QSVFTConfig
from .tuner.targets import check_targets, groups_of
from .tuner.tasks import config_for, left_whole
from .use_factors import use_factors


def from_pretrained(
    path_or_id: str | os.PathLike[str],
    bits: int | None = None,
    *,
    fit: str | float | Mapping[str, Any] | Recommendation | None = None,
    adapter: str | os.PathLike[str] | None = None,
    config: QSVFTConfig | None = None,
    adapter_name: str = "default",
    factors: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    gradient_checkpointing: bool | None = None,
    offload: bool | None = None,
    chunked_loss: bool = True,
    quantize_embeddings: int | None = None,
    progress: bool = True,
    **options: Any,
) -> PeftModel:
    """Load a model ready for fine-tuning, without ever holding it dense.

    A prepared directory loads as it is: nothing is quantised or decomposed, the factors are mapped into memory. Any
    other checkpoint is prepared first, one matrix at a time, into a cache directory, and found there the next time;
    of several processes at once (``accelerate launch``) one prepares, and the others wait for it.

    Args:
        path_or_id: a prepared directory, a directory with a safetensors checkpoint, or a hub id of either.
        bits: 4 (NF4, the default), 8 or 16; of a prepared directory those that it holds.
        fit: a card to fit a training step on, such as "8GiB", see :func:`prepare`. For a prepared directory only what
            its factors leave open is chosen: gradient checkpointing, offload, how the embeddings are held.
        adapter: a trained adapter to load, a directory or a hub id, in place of a new one; it stays trainable.
        config: a whole :class:`QSVFTConfig` for a new adapter; give this or single options.
        adapter_name: name of the adapter.
        factors: a prepared directory whose factors are to be used, see :func:`use_factors`.
        dtype: of the weights before they are quantised, None as the checkpoint has them.
        device_map: where the model goes, as in transformers; None for the current GPU, or the CPU.
        cache_dir: where checkpoints are kept once prepared; None for $QSVFT_CACHE or ~/.cache/qsvft.
        workers, device: for the preparation, see :func:`prepare_checkpoint`.
        revision, token: for a hub id.
        gradient_checkpointing, offload, chunked_loss, quantize_embeddings, progress: see :func:`prepare`.
        **options: fields of :class:`QSVFTConfig`. What is not given is as the directory was prepared for.

    Returns:
        A ``peft.PeftModel``, as :func:`prepare` gives it.

    Raises:
        ValueError: options that need other factors than the prepared directory holds; everything that
            :func:`prepare_checkpoint` and :func:`prepare` refuse.
    """
    given = {} if config is None else {"config": config}
    if adapter is not None and (options or given):
        raise ValueError(
            f"from_pretrained(): the adapter {str(adapter)!r} has a config of its own; expected no other, got "
            f"{sorted({**options, **given})}. Leave them out."
        )
    if fit is not None and (adapter is not None or config is not None):
        raise ValueError(
            "from_pretrained(): fit chooses what is in a config; give fit with single options, or a config or an "
            "adapter without it"
        )
    switches: dict[str, Any] = {
        "gradient_checkpointing": gradient_checkpointing,
        "offload": offload,
        "chunked_loss": chunked_loss,
        "quantize_embeddings": quantize_embeddings,
    }
    hub = {"revision": revision, "token": token}
    read = _read_config(path_or_id, hub)
    if _record(read) is None:
        wanted, held = (config, 4) if adapter is None else _of_adapter(adapter)
        job = open_job(
            path_or_id, held if bits is None else bits, wanted, options, dtype=dtype, revision=revision, token=token
        )
        if fit is not None:
            options, switches = fitting_options(job.model, fit, job.bits, options, switches, progress)
            job, fit = replace(job, given=options), None
        path_or_id, hub = prepared_in_cache(job, cache_dir, workers, chosen_device(device), progress), {}
        read = _read_config(path_or_id, hub)
    record = _record(read) or {}
    _check_bits(path_or_id, bits, record)
    model = base_class(read).from_pretrained(
        path_or_id, dtype=chosen_dtype(dtype) or "auto", device_map=device_map, **hub
    )
    if fit is not None:
        fixed = {**_fixed(record), **options}
        options, switches = fitting_options(model, fit, record["bits"], fixed, switches, progress)
    if factors is not None:
        use_factors(model, factors)
    if config is None and adapter is None:
        config = config_for(model, {**_recorded(record), **options})
    if config is not None:
        _check_factors(path_or_id, model, config)
    whole = [*(config.modules_to_save or ()), *left_whole(config)] if config is not None else []
    held_in = switches.pop("quantize_embeddings") or 16
    check_embeddings(model, held_in, skip_modules=whole)
    if held_in != 16:
        hold_embeddings(model, held_in, skip_modules=whole)

    def attach(frozen: nn.Module) -> nn.Module:
        if config is not None:
            return get_peft_model(frozen, config, adapter_name=adapter_name)
        # Read on the CPU: a self-contained adapter's factors go to the card once, when it is attached.
        return PeftModel.from_pretrained(frozen, adapter, adapter_name, is_trainable=True, torch_device="cpu")

    return attach_lean(model, attach, progress=progress, **switches)


# --- an ordinary checkpoint -----------------------------------------------------------------------


def _of_adapter(adapter: str | os.PathLike[str]) -> tuple[QSVFTConfig, int]:
    """The config of an adapter, and the bits of the base that it was made on: how its base is to be prepared."""
    config = QSVFTConfig.from_pretrained(str(adapter))
    held = (config.base or {}).get("weights") or [{}]
    return config, held[0].get("bits", 4)


# --- a prepared directory -------------------------------------------------------------------------


def _read_config(path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> PretrainedConfig | None:
    """The model's config, None where it cannot be read: what opens the checkpoint says why."""
    try:
        return AutoConfig.from_pretrained(path_or_id, **hub)
    except (OSError, ValueError):
        return None


def _record(config: PretrainedConfig | None) -> dict[str, Any] | None:
    """What a prepared directory says of itself; None for any other checkpoint."""
    record = getattr(config, "quantization_config", None)
    return record if isinstance(record, dict) and record.get("quant_method") == METHOD else None


def is_prepared(config: PretrainedConfig) -> bool:
    """Whether a config is that of a prepared directory."""
    return _record(config) is not None


def _recorded(record: dict[str, Any]) -> dict[str, Any]:
    """The options that a directory was prepared for."""
    adapter = record.get("adapter") or {}
    return {name: value for name, value in adapter.items() if name in FACTOR_FIELDS}


def _fixed(record: dict[str, Any]) -> dict[str, Any]:
    """Of the options that a directory was prepared for those that a recommendation must know."""
    usual, changed = QSVFTConfig().factor_options(), {step.option for step in STEPS}
    return {name: value for name, value in _recorded(record).items() if name in changed or value != usual[name]}


def base_class(config: PretrainedConfig | None) -> Any:
    """The class that a checkpoint's config names, a causal language model where it names none."""
    names = getattr(config, "architectures", None) or []
    return getattr(transformers, names[0], AutoModelForCausalLM) if names else AutoModelForCausalLM


def _check_bits(name: str | os.PathLike[str], bits: int | None, record: dict[str, Any]) -> None:
    held = record.get("bits")
    if bits is not None and bits != held:
        raise ValueError(
            f"{name}: holds its weights in {held} bits, bits={bits} was asked for. Leave bits out, or prepare the "
            f"original checkpoint with bits={bits}."
        )


def _check_factors(name: str | os.PathLike[str], model: PreTrainedModel, config: QSVFTConfig) -> None:
    """Refuse what would be decomposed: whoever loads a prepared directory does not expect to wait for that."""
    files = vars(model).get("qsvft_factors")
    if config.basis == "hadamard" or not isinstance(files, FactorFiles):
        return
    targets = check_targets(model, config, left_whole(config))
    for stored in stored_forms(model, config, targets, groups_of(model, config, targets)):
        for key in stored.form.keys:
            held = files.rank(stored.owner, key)
            if held < stored.rank:
                found = f"{held} directions" if held else "none"
                raise ValueError(
                    f"{stored.owner}: the options need {stored.rank} directions under {key!r}, found {found} in "
                    f"{name}, which was prepared with {_short(files)}. Leave those options out, or prepare the "
                    "original checkpoint with them: qsvft.prepare_checkpoint(source, target, ...)."
                )


def _short(files: FactorFiles) -> str:
    kinds = sorted({key for _, key in (*files.keys(),)})
    return f"the bases {', '.join(kinds[:6])}{', ...' if len(kinds) > 6 else ''}"
