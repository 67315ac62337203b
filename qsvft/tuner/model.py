"""QSVFTModel: the PEFT tuner. Attaches the layers, saves and checks adapters, merges to a dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, ClassVar

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..lean.checkpointing import evaluating
from ..lean.chunked_loss import disable_chunked_loss
from ..lean.norms import plain_norms
from ..lean.offload import stop_offloading
from ..lean.tiles import whole_mlps
from ..lean.vocabulary import dequantize_vocabulary
from ..storage.experts import join_experts
from ..storage.factor_names import parse_name
from ..storage.packed import is_packed, plain_packed, ready_packed
from ..storage.quantization import dequantize, disable_cpu_repacking
from ..storage.weights import HeldLinear, describe_base
from ..version import __version__
from .adapter_file import AdapterReader, add_records, m_key, probe_key, saved_whole_keys
from .config import QSVFTConfig
from .experts import experts_split, named_parameters
from .layer import QSVFTLinear
from .mixed_batch import mixed_batch
from .peft_type import PREFIX
from .progress import progress_shown
from .sources import NOWHERE, Sources, sources_of
from .targets import all_linear, check_targets, is_target
from .trained_whole import cast_inputs
from .weighted_sum import add_up, check_alike, check_sum


class QSVFTModel(BaseTuner):
    """Adapts the linear layers of a model with SVFT (arXiv 2405.19597) on its frozen weights.

    Made by ``qsvft.prepare``, ``peft.get_peft_model`` or ``PeftModel.from_pretrained``.
    """

    prefix = "qsvft_"
    tuner_layer_cls = QSVFTLinear
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    _progress: Any = None
    _sources: Sources = NOWHERE

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with a progress bar over the decompositions and a record of the base."""
        with self._decomposition_progress():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        cast_inputs(model)
        config = self.peft_config[adapter_name]
        if config.base is None:
            config.base = describe_model(model)

    @contextmanager
    def _decomposition_progress(self) -> Iterator[None]:
        hidden = not progress_shown()
        self._progress = tqdm(desc="decomposing", unit="matrix", delay=1.0, leave=False, disable=hidden)
        try:
            yield
        finally:
            self._progress.close()
            self._progress, self._sources = None, NOWHERE

    def _prepare_model(self, peft_config: QSVFTConfig, model: nn.Module) -> None:
        """Check what is asked for before anything is changed."""
        disable_cpu_repacking(model)
        with experts_split(model, peft_config):
            names = check_targets(model, peft_config)
        ready_packed(model)
        if peft_config.target_modules == "all-linear":
            peft_config.target_modules = all_linear(model, peft_config)
        self._sources = sources_of(peft_config, model)
        if self._progress is not None:
            self._progress.total = len(names)

    @staticmethod
    def _check_target_module_exists(peft_config: QSVFTConfig, key: str) -> Any:
        """PEFT's rule, and that of ``target_parameters``."""
        return is_target(peft_config, key)

    def _inject_parameters(self, peft_config: QSVFTConfig, *_: Any, **__: Any) -> list[str]:
        """The experts' parameters that are adapted: each expert is a layer, and has been."""
        return named_parameters(self.model, peft_config)

    def _check_new_adapter_config(self, config: QSVFTConfig) -> None:
        super()._check_new_adapter_config(config)
        biased = [name for name, one in self.peft_config.items() if getattr(one, "bias", "none") != "none"]
        if biased and len(self.peft_config) > 1:
            raise ValueError(
                f"QSVFTConfig.bias: adapter '{biased[0]}' trains biases of the base, which the adapters "
                f"{sorted(set(self.peft_config) - set(biased[:1]))} would have as well; found {len(self.peft_config)} "
                "adapters, expected one. Set bias='none', or give each its own model."
            )

    def _create_and_replace(
        self,
        peft_config: QSVFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, QSVFTLinear):
            layer = target
            layer.update_layer(adapter_name, peft_config, self._sources)
        elif isinstance(target, BaseTunerLayer):
            raise TypeError(
                f"{current_key}: already adapted by {type(target).__name__}; expected a plain layer. Merge or unload "
                "the other adapter first."
            )
        else:
            layer = QSVFTLinear(target, adapter_name, peft_config, current_key, self._sources)
            layer.quantization_backend = _backend(layer.get_base_layer(), self.model)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if self._progress is not None and layer.came_from[adapter_name] is None:
            self._progress.update()
        elif self._progress is not None:
            self._progress.total -= 1  # nothing was decomposed

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT's would move ``weight`` over, which a base layer of our own does not have as a matrix, and of which a
        module that was trained whole, or some rows of it, has its own."""
        of_our_own = isinstance(new_module, HeldLinear) or isinstance(child, AuxiliaryTrainingWrapper)
        if of_our_own or is_packed(new_module) or is_packed(child):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # The head trains as the tied embedding does (``ensure_weight_tying``).
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PeftModel asks for around a forward and generate: rows with adapters of their own."""
        with mixed_batch(self.model, kwargs):
            yield

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add an adapter whose change is the sum of others' with these weights: dW = sum of w_i dW_i, exactly.

        Args:
            adapters: names of adapters with the same directions and entries of M.
            weights: one for each; they may be negative.
            adapter_name: of the new one, which is not made active.

        Raises:
            ValueError: naming what is unknown, or the layer where the adapters are not the same map.
        """
        check_sum(self.peft_config, adapters, weights, adapter_name)
        check_alike(self.model, adapters)
        self.peft_config[adapter_name] = self.peft_config[adapters[0]]  # the same object: the new one is its twin
        self.inject_adapter(self.model, adapter_name)
        add_up(self.model, adapters, weights, adapter_name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, which in training writes what it writes in evaluation."""
        model: Any = self.model
        with evaluating(model):
            return model.generate(*args, **kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The factors, named as DDP sees them in a PeftModel: the same on every rank, never broadcast."""
        return [f"base_model.{name}" for name, _ in self.named_buffers() if ".qsvft_" in name]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: QSVFTConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """M and the probe, with what loading checks, and the factors of a self-contained adapter."""
        # PEFT looks for a layer's tensors under its name in the model, which FSDP's wrappers change.
        layers = named_layers(model, adapter_name)
        keys = {m_key(name, adapter_name) for name, _ in layers} | {probe_key(name, adapter_name) for name, _ in layers}
        selected = {key: tensor for key, tensor in state_dict.items() if key in keys}
        selected |= cls._get_learnable_bias_state_dict(model, state_dict, config)
        config.base = describe_model(model)
        trained_whole = saved_whole_keys(model, adapter_name, config, state_dict)
        whole = {key: state_dict[key] for key in trained_whole if key in state_dict}
        add_records(selected, layers, adapter_name, config.include_factors, whole)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The names of factors carry no adapter's name."""
        return key if parse_name(key) is not None else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: QSVFTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check the saved adapter against this base, refuse it or hand M and the probe on."""
        layers = named_layers(model, adapter_name)
        try:
            reader = AdapterReader(state_dict, config, describe_model(model))
            reader.check(layers, adapter_name, model)
        except ValueError:
            for _, layer in layers:
                layer.refuse(adapter_name)
            raise
        # As PEFT's own, but under names without FSDP's wrappers.
        here = {}
        for name, _ in layers:
            for key in (m_key(name, adapter_name), probe_key(name, adapter_name)):
                saved = cls._remove_adapter_name_from_key(key, adapter_name)
                here[saved] = here[PREFIX + saved] = key
        # FSDP1's wrapper hides from PEFT that the names begin with this; it then takes it away once.
        hidden = not any(name.startswith(PREFIX) for name, _ in model.named_parameters())
        hidden &= any(name.startswith(PREFIX) for name, _ in layers)
        return {(PREFIX if hidden else "") + here.get(key, key): M for key, M in reader.parameters.items()}

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        """After a merge the whole model is dense: the layers not adapted are dequantised as well.

        Merged or not, what made training lean goes with the adapters.
        """
        if not merge:
            # Otherwise PEFT would hand out the merged layers.
            self.unmerge_adapter()
        super()._unload_and_optionally_merge(merge=merge, **kwargs)
        model: nn.Module = whole_mlps(plain_norms(disable_chunked_loss(self.model)))
        stop_offloading(model)
        plain_packed(model)
        return dequantize_vocabulary(dequantize(model)) if merge else join_experts(model)


def _backend(layer: nn.Module, model: nn.Module) -> Any:
    """What PEFT knows of a layer's quantisation, to be shown; None as well where torchao was called by hand, of which
    it wants the config to quantise it again."""
    try:
        return resolve_quantization_backend(layer, **get_quantization_kwargs(model))
    except ValueError:
        return None


def named_layers(model: nn.Module, adapter_name: str) -> list[tuple[str, QSVFTLinear]]:
    """The adapted layers of a model that carry this adapter, with their names as state_dict has them."""
    return [
        (name.replace("_fsdp_wrapped_module.", ""), module)
        for name, module in model.named_modules()
        if isinstance(module, QSVFTLinear) and adapter_name in module.qsvft_M
    ]


def describe_model(model: nn.Module) -> dict[str, Any]:
    """How the adapted layers' bases are held, and the versions that made them."""
    kinds: list[dict[str, Any]] = []
    for module in model.modules():
        if isinstance(module, QSVFTLinear):
            kind = describe_base(module.original_base())
            if kind not in kinds:
                kinds.append(kind)
    kinds.sort(key=str)
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "factors": "of the weight as held",
        "weights": kinds,
        "versions": {"qsvft": __version__, **{name: version(name).split("+")[0] for name in packages}},
    }
