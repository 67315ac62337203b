"""``prepare_checkpoint``: a checkpoint of any size becomes a prepared directory, one matrix at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...storage.json_files import MAX_JSON_BYTES, require_file
from ...storage.left_dense import report_dense
from ...storage.quantization import linear_names
from ...storage.whole_files import check_room
from ...tuner.config import QSVFTConfig
from ..prepared.quantizer import PreparedConfig
from ..source.checkpoint import Checkpoint
from .directory import Directory, Record
from .job import Job, open_job
from .work import source_digest
from .workers import do_units

logger = logging.get_logger(__name__)

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("config.json", "*.index.json", "adapter_config.json", "trainer_state.json")
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"


class PreparationInterrupted(KeyboardInterrupt):
    """Ctrl-C while a checkpoint is prepared; the message says how to go on."""


def prepare_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    *,
    config: QSVFTConfig | None = None,
    dtype: torch.dtype | str | None = None,
    workers: int = 1,
    device: str | torch.device | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    progress: bool = True,
    **options: Any,
) -> Path:
    """Quantise and decompose a safetensors checkpoint into a directory that loads without either.

    One matrix is in memory at a time, whatever the model's size. Every finished one is written whole, the index last.
    Interrupted at any point, by Ctrl-C, a kill or a full disk, the same call goes on where it stopped, after it made
    sure that the source is still the same.

    Args:
        source: a directory with config.json and safetensors files, a single such file, or a hub id.
        target: the directory to make; new, or one in which the same preparation was interrupted.
        bits: 4 (NF4, double quantisation), 8 (int8) or 16 (the weights as they are), how the base is held.
        config: a whole :class:`QSVFTConfig`, for which adapters; give this or single options.
        dtype: the weights' dtype before they are quantised, "bfloat16" for example; None as the checkpoint has it.
        workers: processes at once; each needs the working set of a unit, and gets its share of the threads.
        device: where matrices are quantised and decomposed; None for a GPU if there is one. NF4 codes and vectors of
            another kind of device may differ in roundings, see ``docs/prepared-format.md``.
        revision, cache_dir, token: for a hub id, as in transformers.
        progress: show a progress bar with an estimate of the time left.
        **options: fields of :class:`QSVFTConfig`: rank=256, sides="both", factor_bits=4, decomposition="exact", ...

    Returns:
        The target, for :func:`qsvft.from_pretrained` and ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ValueError: a checkpoint that cannot be read or is no model of transformers', weights with NaN or Inf, a
            target that holds something else, an option out of range, a source that changed.
        OSError: the target cannot be written, or has no room.
        PreparationInterrupted: Ctrl-C.
    """
    where = chosen_device(device)
    job = open_job(source, bits, config, options, dtype=dtype, revision=revision, cache_dir=cache_dir, token=token)
    return run_job(job, job.target(target), workers, where, progress)


def run_job(job: Job, target: Directory, workers: int, device: torch.device, progress: bool) -> Path:
    """Do what a job still lacks in its target; see :func:`prepare_checkpoint`."""
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers: expected an integer of at least 1, got {workers!r}")
    _check_apart(job.checkpoint, target.folder)
    if target.clear_up():
        return target.folder
    target.check_new()
    along = companions(job.checkpoint.folder)
    _report_dense(job)
    with target.locked():
        records = _resumed(job, target, progress)
        pending = [number for number, unit in enumerate(job.units) if unit.name not in records]
        check_room(target.folder, sum(job.units[number].nbytes for number in pending))
        try:
            for number, record in _with_progress(job, target, pending, workers, device, progress):
                records[job.units[number].name] = record
            target.finish(records, _config_json(job), along)
        except KeyboardInterrupt:
            raise PreparationInterrupted(_how_to_go_on(target, records, "interrupted")) from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise type(error)(error.errno, _how_to_go_on(target, records, f"stopped ({reason})")) from error
    return target.folder


def _resumed(job: Job, target: Directory, progress: bool) -> dict[str, Record]:
    """What an earlier call finished, if it prepared the same."""
    manifest = target.manifest()
    now = {"source": job.checkpoint.fingerprint(), "options": job.options.record(), "plan": job.digest}
    if manifest is None:
        target.begin(now)
        return {}
    if manifest.get("options") != now["options"]:
        raise ValueError(
            f"{target.folder}: a preparation with other options was interrupted here: "
            f"{_differences(manifest.get('options'), now['options'])}. Go on with those options, or give another "
            "target."
        )
    _check_same_source(job, target, manifest)
    if manifest.get("plan") != now["plan"]:
        raise ValueError(
            f"{target.folder}: was begun by another version of qsvft or transformers, which divides the work "
            "otherwise; expected the same plan. Go on with those versions, or remove the directory and prepare again."
        )
    records = target.finished(progress)
    if manifest["source"] != now["source"]:  # only times: what was read must still read the same
        _check_contents(job, target, records)
        target.begin(now)
    return records


def _report_dense(job: Job) -> None:
    """Say what quantising leaves dense, as :func:`qsvft.quantize` does."""
    options = job.options
    if options.bits != 16:
        report_dense(
            job.model, _quantised(job), [*(options.config.modules_to_save or ()), *options.left_whole], options.bits
        )


def _quantised(job: Job) -> list[str]:
    return [unit.layer.name for unit in job.units if unit.layer is not None and unit.layer.held != "dense"]


def _config_json(job: Job) -> dict[str, Any]:
    """config.json of the prepared model."""
    config, options = job.model.config, job.options
    record = options.record()
    quantised = set(_quantised(job))
    skipped = [] if options.bits == 16 else [name for name in linear_names(job.model) if name not in quantised]
    config.quantization_config = PreparedConfig(options.bits, options.dtype, skipped, record["adapter"])
    config.architectures = [type(job.model).__name__]
    content: dict[str, Any] = json.loads(config.to_json_string())
    content["dtype"] = options.dtype
    return content


def companions(folder: Path) -> list[Path]:
    """Tokenizer, generation config, licence: what comes along as it is.

    Raises:
        OSError, ValueError: one is a pipe, a folder or a link to nothing.
    """
    named = sorted({path for pattern in _COPIED for path in folder.glob(pattern)})
    found = [path for path in named if not any(path.match(pattern) for pattern in _NOT_COPIED)]
    large = [path for path in found if require_file(path).st_size > MAX_JSON_BYTES]
    for path in large:
        logger.warning(f"{path}: found {path.stat().st_size} bytes, more than a model's own files have; not copied")
    return [path for path in found if path not in large]


def _check_same_source(job: Job, target: Directory, manifest: dict[str, Any]) -> None:
    """Refuse to go on with another source; times are compared by contents later."""
    before, now = manifest.get("source"), job.checkpoint.fingerprint()
    if _without_times(before) != _without_times(now):
        raise ValueError(
            f"{job.checkpoint.name}: is not the source that the preparation in {target.folder} was begun with: "
            f"{_differences(_without_times(before), _without_times(now))}. Restore it, or give another target."
        )


def _check_contents(job: Job, target: Directory, records: dict[str, Record]) -> None:
    """The files have other times, as after a copy: read again what was read for the finished units."""
    units = {unit.name: unit for unit in job.units}
    for name, record in tqdm(records.items(), desc="checking the source", unit="matrix", leave=False):
        if source_digest(units[name], job.checkpoint, job.source_model) != record.source:
            raise ValueError(
                f"{job.checkpoint.name}: {name} holds other values than when {target.folder / record.file} was made of "
                "it; expected the same source. Restore it, or give another target."
            )


def _without_times(fingerprint: Any) -> Any:
    if isinstance(fingerprint, dict):
        return {key: _without_times(value) for key, value in fingerprint.items() if key != "mtime_ns"}
    return fingerprint


def _differences(before: Any, now: Any, path: str = "") -> str:
    """The first difference of two JSON values, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next((key for key in sorted({*before, *now}) if before.get(key) != now.get(key)), None)
        return _differences(before.get(key), now.get(key), f"{path}.{key}".lstrip(".")) if key is not None else "none"
    return f"{path} was {before!r} and is {now!r}"


def _how_to_go_on(target: Directory, records: dict[str, Record], what: str) -> str:
    return (
        f"{what} with {len(records)} of {len(target.units)} parts finished, which are kept in {target.folder}; run the "
        "same again to go on"
    )


def _with_progress(
    job: Job, target: Directory, pending: Sequence[int], workers: int, device: torch.device, progress: bool
) -> Iterator[tuple[int, Record]]:
    """Units as they are finished; the bar counts their cost, so that its estimate holds for matrices of any size."""
    costs = [unit.cost for unit in job.units]
    done = sum(costs) - sum(costs[number] for number in pending)
    with tqdm(total=sum(costs), initial=done, desc="preparing", bar_format=_BAR, disable=not progress) as bar:
        count = len(job.units) - len(pending)
        bar.set_postfix_str(f"{count}/{len(job.units)}")
        for number, record in do_units(job, target, pending, workers, device):
            yield number, record
            count += 1
            bar.set_postfix_str(f"{count}/{len(job.units)}", refresh=False)
            bar.update(costs[number])


def _check_apart(checkpoint: Checkpoint, target: Path) -> None:
    source, place = checkpoint.folder.resolve(), target.resolve()
    if place == source or source in place.parents:
        raise ValueError(
            f"{target}: lies in the source {checkpoint.folder}, where nothing is ever written; expected a directory "
            "elsewhere. Give another target."
        )


def chosen_device(device: str | torch.device | None) -> torch.device:
    """The device that was asked for, if it is there; a GPU before the CPU where none was."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, dtype=torch.float32, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected 'cpu' or a device that is there, such as 'cuda', got {str(device)!r} "
            f"({str(error).splitlines()[0]})"
        ) from error
    return chosen
