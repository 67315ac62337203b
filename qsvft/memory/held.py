"""What a model holds: every tensor, quantisation states included, and its bytes by kind."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

FACTORS = ("qsvft_U", "qsvft_V", "qsvft_s", "qsvft_rms")
_RIVALS_FACTORS = ("U", "s", "V")


def held_tensors(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Every tensor that a model holds, with the ledger's category."""
    for name, tensor, is_state in _walk(model):
        if is_state:
            yield tensor, "base weights"
        elif isinstance(tensor, nn.Parameter):
            frozen = "base weights" if _is_matrix(name, tensor) else "other weights"
            yield tensor, "trainable" if tensor.requires_grad else frozen
        else:
            yield tensor, "factors" if name.split(".")[-1] in (*FACTORS, *_RIVALS_FACTORS) else "other weights"


def held_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that a (prepared) model holds, by kind.

    Returns:
        "base": the frozen weights with their quantisation state, "factors": U, V, s, "M": the
        trainable coefficients, "other": anything else (patterns, probes, modules to save). Storage
        shared by several tensors counts once.
    """
    totals = {"base": 0, "factors": 0, "M": 0, "other": 0}
    seen: set[int] = set()
    for name, tensor, _ in _walk(model):
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            totals[_kind(name)] += storage.nbytes()
    return totals


def _kind(name: str) -> str:
    leaf = next((part for part in name.split(".") if part.startswith("qsvft_")), "")
    if ".modules_to_save." in name:
        return "other"
    if leaf in FACTORS:
        return "factors"
    return {"": "base", "qsvft_M": "M"}.get(leaf, "other")


def _walk(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is part of a quantisation state)."""
    for name, parameter in model.named_parameters():
        yield name, parameter, False
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        for holder, leaves in ((state, ("absmax", "code", "offset")), (nested, ("absmax", "code"))):
            for leaf in leaves:
                if isinstance(found := getattr(holder, leaf, None), Tensor):
                    yield name, found, True
    for name, buffer in model.named_buffers():
        yield name, buffer, False
    for name, module in model.named_modules():
        for holder in (getattr(module, "state", None), getattr(module, "weight", None)):
            if isinstance(scale := getattr(holder, "SCB", None), Tensor):
                yield name, scale, True


def _is_matrix(name: str, parameter: Tensor) -> bool:
    embedding = any(part in name for part in ("embed", "lm_head"))
    return parameter.dim() == 2 and not embedding
