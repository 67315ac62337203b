"""Every name that qsvft leans on and that its owner does not promise to keep: read this when an upgrade fails.

Two kinds: names with a leading underscore, all of which ``tests/test_private_names.py`` finds in the code by itself,
and names that are public by their spelling, but in no documentation. Sorted by package; of safetensors there is none.
``SEEN_IN`` says in which versions all of them were last seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftType
from torch import nn

SEEN_IN = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "peft": "0.21.2",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "trl": "1.16.0",
}


@dataclass(frozen=True)
class PrivateName:
    """A name of another package.

    Attributes:
        name: dotted, from the package on.
        used_in: the files of qsvft/ that use it, separated by spaces.
        why: what it is needed for.
        gone_when: what would remove the need.
        exists: says whether it is there, where importing and asking for attributes cannot: it is set on instances, or
            is a keyword or a string.
    """

    name: str
    used_in: str
    why: str
    gone_when: str
    exists: Callable[[], bool] | None = None

    @property
    def leaf(self) -> str:
        """What stands in the code."""
        return self.name.rpartition(".")[2]

    @property
    def package(self) -> str:
        """Whose it is; "python" for the standard library."""
        return next((part for part in reversed(self.name.split(".")) if part in SEEN_IN), "python")


def found(path: str) -> Any:
    """What a dotted name stands for; ImportError or AttributeError where it stands for nothing."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            known = import_module(module)
        except ModuleNotFoundError as error:
            if length == 1 or not f"{module}.".startswith(f"{error.name}."):
                raise
        else:
            return reduce(getattr, parts[length:], known)
    raise ImportError(path)


def _says(path: str, text: str) -> Callable[[], bool]:
    """Whether the source of a class or a module has a text: what is set there shows nowhere else before it happens."""
    return lambda: text in inspect.getsource(found(path))


def _takes(function: Callable[..., object], keyword: str) -> Callable[[], bool]:
    return lambda: keyword in inspect.signature(function).parameters


def _hooked(name: str) -> Callable[[], bool]:
    return lambda: name in vars(add_hook_to_module(nn.Identity(), ModelHook()))


def _in_4_bits(name: str) -> Callable[[], bool]:
    return lambda: hasattr(bnb.nn.Linear4bit(64, 64), name)


def _in_8_bits(name: str) -> Callable[[], bool]:
    return lambda: hasattr(bnb.nn.Linear8bitLt(64, 64).state, name)


def _in_a_state(name: str) -> Callable[[], bool]:
    def exists() -> bool:
        _, state = bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)
        return getattr(state, name) is not None

    return exists


def _in_a_model(name: str) -> Callable[[], bool]:
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, bos_token_id=0, eos_token_id=0)
    return lambda: hasattr(transformers.GPT2LMHeadModel(config), name)


def _in_a_member(name: str) -> Callable[[], bool]:
    return lambda: hasattr(PeftType, name) or hasattr(PeftType.LORA, name)


def _in_a_module(name: str) -> Callable[[], bool]:
    return lambda: name in vars(nn.Module())


def _saved_in_4_bits() -> bool:
    _, state = bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4", compress_statistics=True)
    return "quant_state.bitsandbytes__nf4" in state.as_dict(packed=True)


_FLAG = "a model quantised by qsvft passes for one that transformers loaded so, for Trainer, accelerate and PEFT"

PRIVATE_NAMES = [
    *(
        PrivateName(
            f"accelerate.Accelerator.is_loaded_in_{bits}bit",
            "storage/quantization.py",
            _FLAG,
            "a documented way to say so",
            _says("accelerate.accelerator", f'"is_loaded_in_{bits}bit"'),
        )
        for bits in (4, 8)
    ),
    PrivateName(
        "accelerate.hooks._hf_hook",
        "lean/chunked_loss.py",
        "tells a forward that device hooks wrap from one that someone else replaced",
        "accelerate's word on what it wraps",
        _hooked("_hf_hook"),
    ),
    PrivateName(
        "accelerate.hooks._old_forward",
        "lean/chunked_loss.py",
        "the forward that the device hooks call: it changes with the model's class",
        "hooks that look the class's forward up when they are called",
        _hooked("_old_forward"),
    ),
    PrivateName(
        "bitsandbytes.backends.cpu.ops.Failed to load CPU gemm_4bit_forward",
        "storage/bitsandbytes_notices.py",
        "the notice that is kept out of the terminal",
        "bitsandbytes logging it at its first use, and not at import",
        _says("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    ),
    *(
        PrivateName(
            f"bitsandbytes.functional.QuantState.{field}",
            "storage/nf4_product.py storage/weights.py",
            "the packed weight is hashed, described, multiplied and made dense in stretches",
            "documented fields",
            _in_a_state(field),
        )
        for field in ("absmax", "blocksize", "dtype", "nested", "offset", "quant_type", "shape", "state2")
    ),
    PrivateName(
        "bitsandbytes.functional.QuantState.packing_format_for_cpu",
        "storage/quantization.py storage/weights.py",
        "a weight that was repacked for AVX512 is refused: it dequantises to garbage",
        "repacking that keeps the weight as it is",
        _says("bitsandbytes.functional", ".packing_format_for_cpu = True"),
    ),
    PrivateName(
        "bitsandbytes.backends.cpu.ops.dequantize_4bit",
        "storage/blocks_over_rows.py",
        "the operator whose kernel is wrong on CPUs with AVX512 where rows are no whole blocks",
        "bitsandbytes reading those right",
        _says("bitsandbytes.backends.cpu.ops", "bitsandbytes::dequantize_4bit"),
    ),
    PrivateName(
        "bitsandbytes.nn.Int8Params.CB",
        "storage/quantization.py storage/weights.py",
        "the int8 rows, which a layer's first forward moves",
        "documented fields",
        _takes(bnb.nn.Int8Params.__new__, "CB"),
    ),
    PrivateName(
        "bitsandbytes.nn.Int8Params.SCB",
        "storage/quantization.py storage/weights.py checkpoint/prepared/check.py",
        "the rows' scales, as a layer has them before its first forward and as it is saved",
        "documented fields",
        _takes(bnb.nn.Int8Params.__new__, "SCB"),
    ),
    PrivateName(
        "bitsandbytes.nn.Linear4bit.compute_type_is_set",
        "storage/nf4_product.py",
        "the first forward chooses the dtype to compute in: before it nothing is sliced",
        "a compute dtype that is settled when the layer is made",
        _in_4_bits("compute_type_is_set"),
    ),
    PrivateName(
        "bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu",
        "storage/quantization.py storage/nf4.py",
        "switches off the repacking of a weight in eval forwards on CPUs",
        "a documented switch",
        _in_4_bits("support_avx512bf16_for_cpu"),
    ),
    PrivateName(
        "bitsandbytes.nn.Linear8bitLt.state",
        "storage/weights.py",
        "the rows' scales after a layer's first forward",
        "documented fields",
        _in_8_bits("SCB"),
    ),
    PrivateName(
        "bitsandbytes.nn.Params4bit.bnb_quantized",
        "storage/nf4.py",
        "a parameter of a weight that is quantised already",
        "a documented constructor from codes and state",
        _takes(bnb.nn.Params4bit.__new__, "bnb_quantized"),
    ),
    PrivateName(
        "bitsandbytes.nn.Params4bit.bitsandbytes__nf4",
        "checkpoint/prepared/check.py",
        "a prepared directory's layers in 4 bits are known by the name of their saved state",
        "a documented file format",
        _saved_in_4_bits,
    ),
    PrivateName(
        "bitsandbytes.nn.modules.fix_4bit_weight_quant_state_from_module",
        "storage/nf4.py",
        "gives a weight back the state that it has not where FSDP gathered it, as Linear4bit's own forward does",
        "a state that goes with the weight's bytes",
    ),
    PrivateName(
        "torch.ops.bitsandbytes.gemm_4bit",
        "memory/ledger.py",
        "the ledger counts the dense weight that the product makes inside of its kernel",
        "a product that does not make it",
    ),
    PrivateName(
        "peft.auto._BaseAutoPeftModel._target_peft_class",
        "tuner/auto_classes.py",
        "AutoPeftModelFor... is to load an adapter's base as it was held",
        "a way of PEFT's for a method to load its base",
    ),
    PrivateName(
        "peft.config.PeftConfigMixin._get_peft_type",
        "tuner/registration.py",
        "it reads an adapter's config before anyone knows whose it is, and says of a damaged one only KeyError",
        "errors that name the file",
    ),
    PrivateName(
        "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING",
        "tuner/registration.py",
        "registering twice is registering once",
        "register_peft_method() that can be called again",
    ),
    PrivateName(
        "peft.tuners._buffer_dict.BufferDict",
        "tuner/adapted.py",
        "an adapter's probe and scale, without gradients: PEFT knows an adapter's entries by this class",
        "torch.nn.BufferDict, or a public name in PEFT",
    ),
    PrivateName(
        "peft.tuners.boft.layer.BOFTLayer.perm2mat",
        "memory/methods.py",
        "without values BOFT's permutations need not be filled, 27 GiB for a model of 7B",
        "BOFT on the meta device",
    ),
    PrivateName(
        "peft.tuners.lora.LoraModel._add_modules_to_save_to_tie",
        "tuner/model.py",
        "ensure_weight_tying: the head trains as the tied embedding does",
        "the same in BaseTuner",
    ),
    *(
        PrivateName(
            f"peft.tuners.tuners_utils.{hook}",
            "tuner/layer.py" if "Layer." in hook else "tuner/model.py",
            "a tuner is written by overriding it: PEFT calls it for each method",
            "documented hooks for tuners of other packages",
        )
        for hook in (
            "BaseTuner._check_new_adapter_config",
            "BaseTuner._check_target_module_exists",
            "BaseTuner._create_and_replace",
            "BaseTuner._get_adapter_state_dict",
            "BaseTuner._inject_parameters",
            "BaseTuner._prepare_model",
            "BaseTuner._remap_adapter_state_dict_for_load",
            "BaseTuner._remove_adapter_name_from_key",
            "BaseTuner._replace_module",
            "BaseTuner._unload_and_optionally_merge",
            "BaseTunerLayer._active_adapter",
            "BaseTunerLayer._move_adapter_to_device_of_base_layer",
        )
    ),
    PrivateName(
        "peft.tuners.tuners_utils.BaseTuner._get_learnable_bias_state_dict",
        "tuner/adapter_file.py tuner/model.py",
        "which biases PEFT saves with an adapter that trains them",
        "a public function that says so",
    ),
    PrivateName(
        "peft.tuners.tuners_utils._maybe_include_all_linear_layers",
        "tuner/targets.py",
        "the layers that PEFT means by all-linear, before anything is changed",
        "a public name for it",
    ),
    PrivateName(
        "peft.tuners.tuners_utils.check_adapters_to_merge",
        "tuner/layer.py",
        "which adapters to merge, with PEFT's messages",
        "a documented name",
    ),
    PrivateName(
        "peft.tuners.tuners_utils.check_target_module_exists",
        "tuner/targets.py",
        "PEFT's rule of which layers a config means, before anything is changed",
        "a documented name",
    ),
    PrivateName(
        "peft.utils.hotswap.CONFIG_KEYS_TO_CHECK",
        "tuner/hotswap.py",
        "which methods can be swapped, and what has to be the same",
        "a way for a method to say that it can be",
    ),
    PrivateName(
        "peft.utils.hotswap.hotswap_adapter_from_state_dict",
        "tuner/hotswap.py",
        "puts tensors in, once config and file are read: it knows LoRA alone",
        "a way for a method to say that it can be",
    ),
    PrivateName(
        "peft.utils.integrations.skip_init_on_device",
        "tuner/attach.py tuner/experts.py",
        "a residual base is made, and experts taken apart, while PEFT puts new parameters on meta",
        "a hook of the tuner before that",
    ),
    PrivateName(
        "peft.utils.other.AuxiliaryTrainingWrapper",
        "lean/chunked_loss.py",
        "a head inside of PEFT's wrappers lends their attributes",
        "a documented way to a wrapper's active module",
    ),
    PrivateName(
        "peft.utils.other.ModulesToSaveWrapper",
        "lean/chunked_loss.py tuner/trained_whole.py",
        "a head that trains whole stands inside of it",
        "a documented way to a wrapper's active module",
    ),
    PrivateName(
        "peft.utils.other.get_pattern_key",
        "tuner/targets.py tuner/names.py",
        "PEFT's rule of rank_pattern",
        "a documented name",
    ),
    PrivateName(
        "concurrent.futures.ProcessPoolExecutor._processes",
        "checkpoint/making/workers.py",
        "an interruption ends the workers at once",
        "Python 3.14 as the floor: ProcessPoolExecutor.terminate_workers()",
        lambda: "_processes" in vars(ProcessPoolExecutor(1)),
    ),
    *(
        PrivateName(
            f"enum.Enum.{name}",
            "tuner/peft_type.py",
            "a member is added to PeftType, which register_peft_method() asks for",
            "methods that PEFT knows by a string",
            _in_a_member(name),
        )
        for name in ("_member_map_", "_member_names_", "_name_", "_value2member_map_", "_value_")
    ),
    PrivateName(
        "torch.Tensor._version",
        "lean/deferred_logits.py lean/offload.py maths/coefficients.py",
        "whether a tensor was changed in place since it was read",
        "a public counter",
    ),
    PrivateName(
        "torch._dynamo.OptimizedModule._orig_mod",
        "tuner/hotswap.py",
        "the model that was compiled, whose adapter is swapped",
        "a documented way to it",
        lambda: hasattr(torch.compile(nn.Linear(1, 1), backend="eager"), "_orig_mod"),
    ),
    PrivateName(
        "torch.distributed.fsdp._common_utils._fsdp_wrapped_module",
        "tuner/model.py tuner/adapter_file.py",
        "FSDP's part of a module's name, which state_dict has not",
        "FSDP 2 alone, which adds nothing to names",
        _says("torch.distributed.fsdp._common_utils", '"_fsdp_wrapped_module"'),
    ),
    PrivateName(
        "torch.nn.Module._apply",
        "lean/vocabulary.py storage/residual.py storage/stored_matrix.py tuner/layer.py tuner/parameter.py",
        "moves and casts reach tensors here: some keep their dtype, some are no submodule's",
        "a public hook of to()",
    ),
    PrivateName(
        "torch.nn.Module._is_replica",
        "lean/chunked_loss.py",
        "nn.DataParallel's replicas gather whole logits",
        "the end of nn.DataParallel",
        _says("torch.nn.Module", "replica._is_replica = True"),
    ),
    *(
        PrivateName(
            f"torch.nn.Module.{register}",
            files,
            "told from the plain attributes of a module; a matrix's parts in every forward",
            "a public list of them, as fast",
            _in_a_module(register),
        )
        for register, files in (
            ("_buffers", "memory/held.py storage/stored_matrix.py"),
            ("_modules", "memory/held.py"),
            ("_parameters", "memory/held.py"),
        )
    ),
    PrivateName(
        "torch.nn.parallel.DistributedDataParallel._ddp_params_and_buffers_to_ignore",
        "tuner/model.py",
        "the factors are the same on every rank: they are not broadcast",
        "a public argument",
        _says("torch.nn.parallel.DistributedDataParallel", "_ddp_params_and_buffers_to_ignore"),
    ),
    PrivateName(
        "torch.ops.aten._local_scalar_dense",
        "memory/ledger.py",
        "models look into positions' and masks' values, of which there are none on the meta device",
        "counting that knows values, or models that do not ask",
    ),
    PrivateName(
        "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
        "memory/attention.py",
        "a flash kernel's bytes on the meta device, where SDPA takes the one that makes the whole matrix",
        "SDPA that can be told its kernel on the meta device",
    ),
    PrivateName(
        "torch.ops.aten.tanh_backward", "lean/cross_entropy.py", "autograd's own, bit for bit", "a public function"
    ),
    PrivateName(
        "torch.utils._python_dispatch.__tensor_flatten__",
        "storage/packed.py",
        "tells a tensor class of another library, which torch.compile takes apart by it, from a dense tensor",
        "a public word for a tensor that stands for another",
        _says("torch.utils._python_dispatch", "__tensor_flatten__"),
    ),
    PrivateName(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "memory/ledger.py",
        "sees the result of every operation",
        "a public name for it",
    ),
    PrivateName(
        "torch.Tensor._make_wrapper_subclass",
        "lean/rows_on_demand.py",
        "a tensor without memory of its own, which functions of other packages take and keep",
        "a documented way to make one",
    ),
    *(
        PrivateName(
            f"transformers.{name}",
            "checkpoint/source/renames.py",
            "a checkpoint's keys and tensors become the model's by transformers' own conversion, matrix by matrix",
            "a documented function from checkpoint tensors to a model's, tensor by tensor",
        )
        for name in (
            "conversion_mapping.get_model_conversion_mapping",
            "core_model_loading.WeightConverter",
            "core_model_loading.WeightConverter.add_tensor",
            "core_model_loading.WeightConverter.convert",
            "core_model_loading.WeightRenaming",
            "core_model_loading.build_glob_alternation",
            "core_model_loading.dot_natural_key",
            "core_model_loading.rename_source_key",
            "core_model_loading.revert_weight_conversion",
        )
    ),
    *(
        PrivateName(
            f"transformers.integrations.moe.use_experts_implementation.{name}",
            "storage/experts.py checkpoint/source/experts.py formats/base.py formats/dense.py"
            if name == "is_transposed"
            else "storage/experts.py",
            "what transformers' interface for experts says of a class that holds them in parameters",
            "a documented interface of the module that has them",
            _says("transformers.integrations.moe", name),
        )
        for name in (
            "_apply_gate",
            "_is_expert_parallel",
            "act_fn",
            "has_bias",
            "has_gate",
            "has_post_expert_norm",
            "is_transposed",
            "post_expert_norm",
        )
    ),
    PrivateName(
        "transformers.PreTrainedModel._is_hf_initialized",
        "storage/experts.py",
        "a module that transformers gives no numbers: its parameters are its linear layers'",
        "a documented way to say so",
        _says("transformers.PreTrainedModel", "_is_hf_initialized"),
    ),
    PrivateName(
        "transformers.loss.loss_utils.ForCausalLMLoss",
        "lean/chunked_loss.py",
        "the loss that may be chunked, and what computes it where nothing is",
        "a documented name",
    ),
    PrivateName(
        "transformers.modeling_layers.GradientCheckpointingLayer",
        "lean/offload.py",
        "the layers that can be checkpointed",
        "a documented name",
    ),
    *(
        PrivateName(
            f"transformers.PreTrainedModel.from_pretrained.{name}",
            "tuner/auto_classes.py",
            "what an auto class and a pipeline hand on: which adapter was asked for, and that they are the caller",
            "one way for a method to load its base",
            _says(where, name),
        )
        for name, where in (
            ("_adapter_model_path", "transformers.integrations.peft"),
            ("_from_auto", "transformers.modeling_utils"),
            ("_from_pipeline", "transformers.modeling_utils"),
        )
    ),
    PrivateName(
        "transformers.PreTrainedModel._from_config",
        "checkpoint/source/architecture.py tuner/heads.py",
        "builds the class that a checkpoint names as from_pretrained does, patches and ZeRO-3 included",
        "from_config() on a model's class",
    ),
    PrivateName(
        "transformers.PreTrainedModel._hf_peft_config_loaded",
        "tuner/load_adapter.py tuner/auto_classes.py checkpoint/prepared/quantizer.py",
        "its own load_adapter sets it, and everything about adapters asks for it",
        "load_adapter with a hook for the method's own loading",
    ),
    PrivateName(
        "transformers.PreTrainedModel._keep_in_fp32_modules",
        "checkpoint/source/architecture.py storage/quantization.py tuner/targets.py",
        "what is left in fp32, and not quantised",
        "a documented attribute",
    ),
    PrivateName(
        "transformers.PreTrainedModel._keep_in_fp32_modules_strict",
        "checkpoint/source/architecture.py",
        "what is left in fp32",
        "a documented attribute",
    ),
    PrivateName(
        "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
        "checkpoint/prepared/quantizer.py checkpoint/source/names.py",
        "the factors in a prepared file are no surprise to the loader; keys that it passes over are none to us",
        "a quantiser's word on unexpected keys",
    ),
    PrivateName(
        "transformers.PreTrainedModel._loss_function",
        "lean/chunked_loss.py",
        "the loss for one forward: loss_function can be set, not taken back",
        "a deleter beside the setter",
        _says("transformers.PreTrainedModel", "self._loss_function = value"),
    ),
    PrivateName(
        "transformers.PreTrainedModel._weight_conversions",
        "checkpoint/prepared/quantizer.py storage/quantization.py",
        "saving would take back the conversions of loading, and a prepared directory has the model's names; a dense "
        "model has its checkpoint's",
        "a documented switch that stays with the model",
        _says("transformers.core_model_loading", "model._weight_conversions ="),
    ),
    PrivateName(
        "transformers.PreTrainedModel._supports_attention_backend",
        "memory/attention.py",
        "whether an architecture takes its attention by a name",
        "a documented attribute",
    ),
    PrivateName(
        "transformers.PreTrainedModel.all_tied_weights_keys",
        "checkpoint/source/tied.py checkpoint/prepared/model_state.py formats/dense.py",
        "which weights a model ties",
        "a documented attribute",
        _in_a_model("all_tied_weights_keys"),
    ),
    PrivateName(
        "transformers.PreTrainedModel.hf_quantizer",
        "storage/quantization.py checkpoint/prepared/quantizer.py",
        _FLAG,
        "a documented way to say so",
        _says("transformers.PreTrainedModel", "hf_quantizer"),
    ),
    PrivateName(
        "transformers.PreTrainedModel.is_quantized",
        "storage/quantization.py",
        _FLAG,
        "a documented way to say so",
        _says("transformers.quantizers.base", "is_quantized"),
    ),
    PrivateName(
        "transformers.PreTrainedModel.quantization_method",
        "storage/quantization.py checkpoint/prepared/quantizer.py",
        _FLAG,
        "a documented way to say so",
        _says("transformers.quantizers.base", "quantization_method"),
    ),
    PrivateName(
        "transformers.integrations.deepspeed._hf_deepspeed_config_weak_ref",
        "storage/split_weights.py",
        "who is to split weights as they are made, put aside and back",
        "a public context in which transformers builds whole weights under ZeRO-3",
    ),
    PrivateName(
        "transformers.quantizers.HfQuantizer._process_model_after_weight_loading",
        "checkpoint/prepared/quantizer.py",
        "a quantiser is written by overriding it",
        "the documented preprocess_model() and postprocess_model() calling nothing private",
    ),
    PrivateName(
        "transformers.quantizers.HfQuantizer._process_model_before_weight_loading",
        "checkpoint/prepared/quantizer.py",
        "a quantiser is written by overriding it; checkpoint_files says where the factors are",
        "the documented preprocess_model() and postprocess_model() calling nothing private",
    ),
    PrivateName(
        "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer",
        "checkpoint/prepared/quantizer.py",
        "a base of PreparedQuantizer: prepared weights are loaded as bitsandbytes' are",
        "a documented name",
    ),
    PrivateName(
        "transformers.quantizers.quantizer_bnb_8bit.Bnb8BitHfQuantizer",
        "checkpoint/prepared/quantizer.py",
        "a base of PreparedQuantizer: prepared weights are loaded as bitsandbytes' are",
        "a documented name",
    ),
    PrivateName(
        "transformers.utils.loading_report.LoadStateDictInfo",
        "tuner/load_adapter.py",
        "what load_adapter returns, with the fields of its version",
        "load_adapter with a hook for the method's own loading",
    ),
    PrivateName(
        "transformers.utils.quantization_config.QuantizationMethod",
        "storage/quantization.py checkpoint/prepared/quantizer.py",
        _FLAG,
        "a documented name",
    ),
    PrivateName(
        "trl.trainer.base_config._BaseConfig",
        "options/trainer_arguments.py",
        "what all trainers' configs have, read off the source, so that a wrong name is found without torch",
        "the names of a config's fields without importing torch",
    ),
]
