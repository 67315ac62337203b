"""The front door: ``qsvft.prepare(model, bits=4)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .checkpoint.prepared.quantizer import mark_prepared
from .lean import vocabulary
from .lean.checkpointing import enable_checkpointing
from .lean.chunked_loss import chunked_loss_obstacle, enable_chunked_loss
from .lean.norms import lean_norms
from .lean.offload import offload_checkpoints
from .lean.tiles import tile_mlps
from .memory.fit.options import fitting_options
from .memory.fit.recommend import Recommendation
from .options.option import shows
from .options.switches import Switches, without_switches
from .storage.alignment import align_tensors
from .storage.quantization import held_bits, quantize
from .storage.weights import check_tensors, dense_weight
from .tuner.calibration import calibrate, check_calibration, with_basis
from .tuner.config import QSVFTConfig
from .tuner.experts import experts_split
from .tuner.progress import progress_bars
from .tuner.targets import check_targets
from .tuner.tasks import check_residual, config_for, left_whole, whole


class Calibration(NamedTuple):
    """What :func:`~qsvft.tuner.calibration.calibrate` takes beside the model."""

    config: QSVFTConfig
    batches: Iterable[Mapping[str, Any]]
    weights: Iterable[tuple[str, Tensor]] | None


@shows(Switches, QSVFTConfig)
def prepare(
    model: nn.Module,
    bits: int = 4,
    *,
    fit: str | float | Mapping[str, Any] | Recommendation | None = None,
    config: QSVFTConfig | None = None,
    adapter_name: str = "default",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    progress: bool = True,
    **options: Any,
) -> PeftModel:
    """Make a model ready for fine-tuning: quantised base, frozen singular vectors, sparse fp32 M.

    Works in place, one matrix at a time: quantises the linear layers (all but the output head and
    embeddings), decomposes each target's weight as held, attaches M = 0, switches gradient
    checkpointing on (non-reentrant), lets frozen norms keep less for the backward and freezes the
    rest. With M = 0 the result computes exactly what the quantised base computes; with ``calibration``, and with
    ``residual``, something nearer to the dense model.

    Args:
        model: any transformers model or ``nn.Module`` in fp32, bf16 or fp16, or one that transformers
            loaded in 4 or 8 bits.
        bits: 4 (NF4 with double quantisation), 8 (int8) or 16 (base left as it is).
        fit: a card to fit a training step on: "8GiB", "8GB" (10**9 bytes each), a number of GiB, a dict with
            card_gib, seq_len (2048), batch_size (1) and optimizer ("adamw"), or a :class:`Recommendation`. Options
            that are not given are then those of :func:`qsvft.recommend`, and not the defaults.
        config: a whole :class:`QSVFTConfig`; give either this or single options, or ``fit``.
        adapter_name: name of the adapter.
        calibration: batches of what is to be trained on, such as the data loader; the first few give the directions
            of ``basis="data"``, which is the default where this is given, and with a dense model and bits=4 so is
            ``residual``. The dense weights then stay on the CPU until the batches are seen. See :func:`calibrate`.
        progress: show progress bars.
        **options: the switches gradient_checkpointing (on), offload (off), tile_mlp (off), chunked_loss (on) and
            quantize_embeddings (16), see :class:`~qsvft.options.switches.Switches`; and fields of
            :class:`QSVFTConfig`, such as rank=64, factor_bits=8, pattern="plain". Where ``task_type`` is not given it
            follows from the model's class, so that a fresh classification head is trained and saved with the adapter.

    Returns:
        A ``peft.PeftModel``, for Trainer, TRL, ``save_pretrained``, ``merge_and_unload``.

    Raises:
        ValueError: the model is prepared already, bits or an option out of range, a target that matches
            nothing, a rank over a layer's limit, NaN or Inf in a weight, a meta-device model, a card that
            nothing fits.
    """
    lean, fields = without_switches(options)
    switches = Switches(**lean)
    if config is not None and fields:
        raise ValueError(f"prepare(): give either config or single options, got both: {sorted(fields)}")
    _refuse_prepared(model)
    if fit is not None:
        if config is not None:
            raise ValueError("prepare(): fit chooses what is in a config; give fit with single options, or a config")
        residual = bits == 4 and _has_weights(model)
        options = options_to_fit(model, fit, bits, lean, fields, calibration, residual, progress)
        return prepare(model, bits, adapter_name=adapter_name, calibration=calibration, progress=progress, **options)
    if config is None:
        config = config_for(model, with_basis(fields, calibration, bits == 4 and _has_weights(model)))
    check_calibration(config, calibration)
    with experts_split(model, config, quantised=_has_weights(model) and bits != 16):
        return _prepared(model, bits, config, adapter_name, switches, calibration, progress)


def _prepared(
    model: nn.Module,
    bits: int,
    config: QSVFTConfig,
    adapter_name: str,
    switches: Switches,
    calibration: Iterable[Mapping[str, Any]] | None,
    progress: bool,
) -> PeftModel:
    """:func:`prepare` of a model whose experts are linear layers."""
    trained_whole = whole(config)
    targets = check_targets(model, config, left_whole(config))  # before anything is changed
    weights_seen = {f"{name}.weight" for name in targets}
    check_tensors((name, tensor) for name, tensor in model.named_parameters() if name not in weights_seen)
    check_residual(config, bits)
    if config.trainable_token_indices is not None and switches.quantize_embeddings != 16:
        raise ValueError(
            f"prepare(): trainable_token_indices trains rows of the embeddings, quantize_embeddings="
            f"{switches.quantize_embeddings} holds them in few bits; expected one of the two"
        )
    vocabulary.check_embeddings(model, switches.quantize_embeddings, skip_modules=trained_whole)
    align_tensors(model, odd_only=True)  # otherwise what the base computes could change in its last bits
    weights = _dense_weights(model, targets) if config.gives_back else None
    # A residual base is quantised where it is made, from the dense weight.
    quantize(model, bits, trained_whole, progress, skip_layers=targets if config.residual_base else ())
    if switches.quantize_embeddings != 16:
        vocabulary.quantize_embeddings(model, switches.quantize_embeddings, skip_modules=trained_whole)
    record = config.factor_options()  # as they were given: PEFT puts names in place of "all-linear"
    prepared = attach_lean(
        model,
        lambda frozen: get_peft_model(frozen, config, adapter_name=adapter_name),
        switches,
        progress,
        None if calibration is None else Calibration(config, calibration, weights),
    )
    mark_prepared(model, record)
    return prepared


def attach_lean(
    model: nn.Module,
    attach: Callable[[nn.Module], nn.Module],
    switches: Switches,
    progress: bool = True,
    calibration: Calibration | None = None,
) -> PeftModel:
    """Attach adapters to a model that is quantised already, and make its training step lean; see :func:`prepare`."""
    with progress_bars(progress):
        lean_norms(model)
        if calibration is not None:
            _make_lean(model, switches)  # a batch of the calibration then fits where a step fits
            calibrate(model, calibration.config, calibration.batches, weights=calibration.weights)
        prepared = attach(model)
    assert isinstance(prepared, PeftModel)
    _make_lean(model, switches)
    return prepared


def _make_lean(model: nn.Module, switches: Switches) -> None:
    if switches.gradient_checkpointing:
        enable_checkpointing(model)
    if switches.offload:
        offload_checkpoints(model)
    if switches.tile_mlp:
        tile_mlps(model)
    if switches.chunked_loss and chunked_loss_obstacle(model) is None:
        enable_chunked_loss(model)


def options_to_fit(
    model: nn.Module,
    fit: object,
    bits: int,
    lean: Mapping[str, Any],
    fields: Mapping[str, Any],
    calibration: object,
    residual: bool,
    progress: bool,
) -> dict[str, Any]:
    """The options that fit a card; a recommendation stays what was counted, which directions from data alone do not
    change."""
    if not isinstance(fit, Recommendation):
        fields = with_basis(fields, calibration, residual)
    options = fitting_options(model, fit, bits, {**lean, **fields}, progress)
    return options if calibration is None else {"residual": False, **options}


def _has_weights(model: nn.Module) -> bool:
    """Whether the weights before they are quantised are at hand."""
    return held_bits(model) == 16


def _dense_weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The weights of layers as they are now, on the CPU, one after the other; each is let go with the next.

    Raises:
        ValueError: one of them is quantised already.
    """
    held: dict[str, Tensor] = {}
    for name in names:
        layer = model.get_submodule(name)
        weight = dense_weight(layer) if held_bits(layer) == 16 else None
        if weight is None:
            raise ValueError(
                f"{name}: residual=True needs the weight before it is quantised, found a {type(layer).__name__}. "
                "Expected the model as it is loaded in bf16: leave out qsvft.quantize() and quantization_config, or "
                "give residual=False."
            )
        held[name] = weight.detach().cpu()
    return ((name, held.pop(name)) for name in list(held))


def _refuse_prepared(model: nn.Module) -> None:
    adapted = next((n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)), None)
    if isinstance(model, PeftModel) or adapted is not None:
        raise ValueError(
            f"{adapted or type(model).__name__}: the model carries adapters already; expected a model without any. Use "
            "model.add_adapter(name, QSVFTConfig(...)) for another adapter, or model.unload() to start again."
        )
