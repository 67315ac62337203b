"""``from_pretrained``: a model ready for fine-tuning from a prepared directory, or from any checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .checkpoint.making.cache import prepared_in_cache
from .checkpoint.making.job import Job, chosen_dtype, open_job
from .checkpoint.making.plan import stored_forms
from .checkpoint.making.streaming import chosen_device
from .checkpoint.prepared.check import check_config, open_prepared
from .checkpoint.prepared.quantizer import PreparedConfig
from .checkpoint.prepared.record import prepared_record, recorded_options
from .checkpoint.source.architecture import load_base, readable_config
from .lean.vocabulary import check_embeddings, quantize_embeddings
from .memory.fit.ladder import STEPS
from .memory.fit.options import fitting_options
from .memory.fit.recommend import Recommendation
from .options.option import shows
from .options.switches import Switches, without_switches
from .prepare import Calibration, attach_lean, options_to_fit
from .storage.factor_files import FactorFiles
from .storage.json_files import read_object
from .storage.tensor_index import INDEX_NAME, read_index
from .tuner.calibration import check_calibration, with_basis
from .tuner.config import QSVFTConfig
from .tuner.heads import Head, head_of
from .tuner.targets import check_targets
from .tuner.tasks import config_for, left_whole, whole
from .use_factors import use_factors


def load(adapter: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None, **options: Any) -> PeftModel:
    """Load a trained adapter on its base: base, revision, bits, dtype and factors are found from what it records.

        model = qsvft.load("adapter").eval()

    Args:
        adapter: a directory or a hub id.
        base: a prepared directory or the checkpoint, if it is elsewhere than the adapter says.
        **options: of :func:`from_pretrained`: device_map, cache_dir, verify, progress, switches such as chunked_loss.

    Returns:
        A ``peft.PeftModel``; the adapter stays trainable.

    Raises:
        ValueError: the adapter names no base, or does not fit it; everything that :func:`from_pretrained` refuses.
        OSError: no base at that place.
    """
    config = QSVFTConfig.from_pretrained(str(adapter))
    found = base if base is not None else config.base_model_name_or_path
    if not found:
        raise ValueError(f"{adapter}: names no base model; expected one. Give it: qsvft.load(adapter, base=...).")
    if base is None:
        options.setdefault("revision", config.revision)
    return from_pretrained(found, adapter=adapter, **options)


@shows(Switches, QSVFTConfig)
def from_pretrained(
    path_or_id: str | os.PathLike[str],
    bits: int | None = None,
    *,
    fit: str | float | Mapping[str, Any] | Recommendation | None = None,
    adapter: str | os.PathLike[str] | None = None,
    config: QSVFTConfig | None = None,
    adapter_name: str = "default",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    factors: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    verify: bool = False,
    progress: bool = True,
    **options: Any,
) -> PeftModel:
    """Load a model ready for fine-tuning, without ever holding it dense.

    A prepared directory loads as it is: nothing is quantised or decomposed, the factors are read from its files. Any
    other checkpoint is prepared first, one matrix at a time, into a cache directory, and found there the next time;
    of several processes at once (``accelerate launch``) one prepares, and the others wait for it.

    Args:
        path_or_id: a prepared directory, a directory with a safetensors checkpoint, or a hub id of either.
        bits: 4 (NF4, the default), 8 or 16; of a prepared directory those that it holds.
        fit: a card to fit a training step on, such as "8GiB", see :func:`prepare`. For a prepared directory only what
            its factors leave open is chosen: gradient checkpointing, offload, how the embeddings are held.
        adapter: a trained adapter to load, a directory or a hub id, in place of a new one; it stays trainable. Bits and
            dtype of a checkpoint are those that it was trained with, and the model's class is that of its head.
        config: a whole :class:`QSVFTConfig` for a new adapter; give this or single options.
        adapter_name: name of the adapter.
        calibration: batches of what is to be trained on, for the directions of ``basis="data"``, see :func:`prepare`.
        factors: a prepared directory whose factors are to be used, see :func:`use_factors`.
        dtype: of the weights before they are quantised, None as the checkpoint has them.
        device_map: where the model goes, as in transformers; None for the current GPU, or the CPU.
        cache_dir: where checkpoints are kept once prepared; None for $QSVFT_CACHE or ~/.cache/qsvft.
        workers, device: for the preparation, see :func:`prepare_checkpoint`.
        revision, token: for a hub id.
        verify: compare every value of a prepared directory with those that were written. All of it is read once more,
            at about 1 GB/s; structure, config and small tensors are compared always.
        progress: show progress bars.
        **options: switches and fields of :class:`QSVFTConfig`, see :func:`prepare`. What is not given is as the
            directory was prepared for.

    Returns:
        A ``peft.PeftModel``, as :func:`prepare` gives it.

    Raises:
        ValueError: options that need other factors than the prepared directory holds; everything that
            :func:`prepare_checkpoint` and :func:`prepare` refuse.
    """
    lean, fields = without_switches(options)
    Switches(**lean)
    if adapter is not None and (fields or config is not None):
        own = sorted([*fields, *(["config"] if config is not None else [])])
        raise ValueError(
            f"from_pretrained(): the adapter {str(adapter)!r} has a config of its own; expected no other, got {own}. "
            "Leave them out."
        )
    if fit is not None and (adapter is not None or config is not None):
        raise ValueError(
            "from_pretrained(): fit chooses what is in a config; give fit with single options, or a config or an "
            "adapter without it"
        )
    _check_json(Path(path_or_id))
    hub: dict[str, Any] = {"revision": revision, "token": token}
    options, source = {**lean, **fields}, None
    read, wanted, head, held = readable_config(path_or_id, hub), config, Head(), dict[str, Any]()
    if adapter is not None:
        wanted = QSVFTConfig.from_pretrained(str(adapter))
        head, held = head_of(wanted, read), wanted.held_base()
    if prepared_record(read) is None:
        if wanted is not None:
            wanted.check_makeable()
        base_bits, dtype = bits if bits is not None else held.get("bits", 4), dtype or held.get("dtype")
        given = with_basis(fields, calibration, base_bits == 4) if wanted is None else fields
        job = open_job(path_or_id, base_bits, wanted, given, dtype=dtype, head=head, **hub)
        if fit is not None:
            four = base_bits == 4
            options = options_to_fit(job.model, fit, job.bits, lean, fields, calibration, four, progress)
            job, fit = replace(job, given=with_basis(without_switches(options)[1], calibration, four)), None
        source = job
        kept = prepared_in_cache(job.without_directions(), cache_dir, workers, chosen_device(device), progress)
        path_or_id, hub = kept, {}
    model, record = _load(path_or_id, bits, dtype, device_map, hub, head)
    if source is not None:  # adapters name the checkpoint, and not where it is kept here
        model.name_or_path = model.config.name_or_path = source.checkpoint.name
    if verify:
        open_prepared(model.hf_quantizer.folder).check(values=True, progress=progress)
    if fit is not None:
        options = fitting_options(model, fit, record["bits"], {**_fixed(record), **options}, progress)
    if factors is not None:
        use_factors(model, factors)
    lean, fields = without_switches(options)
    if config is None and adapter is None:
        config = config_for(model, _options_of(record, fields, calibration, source))
    if config is not None:
        check_calibration(config, calibration)
        _check_factors(path_or_id, model, config)
        if config.gives_back and source is None:
            raise ValueError(
                f"{path_or_id}: residual=True with basis='data' needs the weights before they were quantised; found a "
                "prepared directory, which has them in 4 bits. Give the original checkpoint, or residual=False."
            )
    switches = Switches(**lean)
    _hold_vocabulary(model, switches.quantize_embeddings, config)

    def attach(frozen: nn.Module) -> nn.Module:
        if config is not None:
            return get_peft_model(frozen, config, adapter_name=adapter_name)
        # Read on the CPU: a self-contained adapter's factors go to the card once, when it is attached.
        return PeftModel.from_pretrained(frozen, adapter, adapter_name, is_trainable=True, torch_device="cpu")

    seen = None
    if config is not None and calibration is not None:
        seen = Calibration(config, calibration, source.weights() if source is not None and config.gives_back else None)
    return attach_lean(model, attach, switches, progress, seen)


def _options_of(
    record: Mapping[str, Any], fields: Mapping[str, Any], calibration: object, source: Job | None
) -> dict[str, Any]:
    """The options of a new adapter: those given, then those that a directory was prepared for, then the defaults."""
    recorded, given = recorded_options(record), with_basis(fields, calibration, source is not None and source.bits == 4)
    if recorded.get("basis") != "data":
        return {**recorded, **given}
    return given if source is not None else {**given, **recorded, **fields}


def _load(
    path_or_id: str | os.PathLike[str],
    bits: int | None,
    dtype: torch.dtype | str | None,
    device_map: Any,
    hub: dict[str, Any],
    head: Head,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a prepared directory, and the directory's record."""
    read = readable_config(path_or_id, hub)
    record = prepared_record(read) or {}
    _check_bits(path_or_id, bits, record)
    if record and os.path.isdir(path_or_id):
        _check_record(path_or_id, record)
        check_config(path_or_id)  # before a model is built of it
    options = {**head.options, "dtype": chosen_dtype(dtype) or "auto", "device_map": device_map, **hub}
    model = load_base(read, path_or_id, head.brought, head.kind, **options)
    return model, record


def _hold_vocabulary(model: PreTrainedModel, bits: int, config: QSVFTConfig | None) -> None:
    """Hold embeddings and head in fewer bits, but for what trains whole."""
    trained_whole = whole(config) if config is not None else []
    check_embeddings(model, bits, skip_modules=trained_whole)
    if bits != 16:
        quantize_embeddings(model, bits, skip_modules=trained_whole)


def _check_json(folder: Path) -> None:
    """Read a local folder's JSON files, whose readers in transformers say nothing of where they stopped."""
    for name in ("config.json", "generation_config.json"):
        if os.path.lexists(folder / name):
            read_object(folder / name)
    if os.path.lexists(folder / INDEX_NAME):
        read_index(folder / INDEX_NAME)


def _fixed(record: dict[str, Any]) -> dict[str, Any]:
    """Of the options that a directory was prepared for those that a recommendation must know."""
    usual, changed = QSVFTConfig().factor_options(), {step.option for step in STEPS}
    return {name: value for name, value in recorded_options(record).items() if name in changed or value != usual[name]}


def _check_record(folder: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Refuse the record of a version that this one does not read, or none at all."""
    try:
        PreparedConfig(**record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{Path(folder, 'config.json')}: {error}") from error


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
    if config.basis != "singular" or not isinstance(files, FactorFiles):
        return
    targets = check_targets(model, config, left_whole(config))
    for stored in stored_forms(model, config, targets):
        for key in stored.form.keys:
            held = files.rank(stored.layer, key)
            if held < stored.rank:
                found = f"{held} directions" if held else "none"
                raise ValueError(
                    f"{stored.layer}: the options need {stored.rank} directions under {key!r}, found {found} in "
                    f"{name}, which was prepared with {_short(files)}. Leave those options out, or prepare the "
                    "original checkpoint with them: qsvft.prepare_checkpoint(source, target, ...)."
                )


def _short(files: FactorFiles) -> str:
    kinds = sorted({key for _, key in (*files.keys(),)})
    return f"the bases {', '.join(kinds[:6])}{', ...' if len(kinds) > 6 else ''}"
