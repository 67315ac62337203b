"""``target_parameters``: which experts a config means, and their parameters taken apart for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.integrations import skip_init_on_device
from torch import nn

from ..storage.experts import join_experts, parameters_of_experts, split_experts
from .config import QSVFTConfig
from .tasks import whole


def named_parameters(model: nn.Module, config: QSVFTConfig) -> list[str]:
    """The parameters of experts, taken apart or not, that ``target_parameters`` names."""
    return [name for name in parameters_of_experts(model) if is_named(config, name)]


# Without the decorator the layers would lose their values with PEFT's low_cpu_mem_usage.
@skip_init_on_device  # type: ignore[untyped-decorator]
def split_for(model: nn.Module, config: QSVFTConfig, quantised: bool = False) -> nn.Module:
    """Let linear layers stand for experts, in place.

    Args:
        model: with experts or without.
        config: of the adapter; it names those that are adapted.
        quantised: whether all experts will be quantised, but for those in modules that train whole.
    """
    if quantised:
        return split_experts(model, whole(config))
    return split_experts(model, only={name.rpartition(".")[0] for name in named_parameters(model, config)})


@contextmanager
def experts_split(model: nn.Module, config: QSVFTConfig, quantised: bool = False) -> Iterator[None]:
    """As :func:`split_for`; an error leaves experts as they were."""
    split_for(model, config, quantised)
    try:
        yield
    except BaseException:
        join_experts(model)
        raise


def is_named(config: QSVFTConfig, parameter: str) -> bool:
    """Whether ``target_parameters`` names a parameter: by its whole name or the last parts of it."""
    return any(f".{parameter}".endswith(f".{one}") for one in config.target_parameters or ())
