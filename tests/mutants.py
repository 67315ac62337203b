"""Deliberate bugs: each changes one line of a copy of the package, and some test must notice.

    python tests/mutants.py                   all of them, some minutes on two cores
    python tests/mutants.py --only damping    those with this word in their name

Exit code 1 if a mutant survives, if the tests fail without any, or if a run breaks in another way
than by a failing test. ``tests/test_mutants.py`` checks that every line to be changed is still there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]

# Stops the run (exit code 4) if the tests would import another qsvft than the copy.
GUARD = """
from pathlib import Path

import pytest


def pytest_configure(config):
    import qsvft

    if Path(qsvft.__file__).resolve().parents[1] != Path(__file__).resolve().parent:
        raise pytest.UsageError(f"the tests import {qsvft.__file__}, not the mutated copy")
"""


@dataclass(frozen=True)
class Mutant:
    """One bug: in ``file`` (under qsvft/) ``old``, found exactly once, becomes ``new``.

    ``tests`` (files under tests/, or single tests of them) must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, package: Path) -> None:
        """Write the bug into a copy of the package."""
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.name}: expected the text once in qsvft/{self.file}, found it {count} times")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


MUTANTS = (
    Mutant(
        "what a class has before its classifier is not trained",
        "tuner/tasks.py",
        "        if more := [head for head in new_heads(model) if head not in by_peft]:",
        "        if more := [head for head in new_heads(model)[:0] if head not in by_peft]:",
        ("test_models.py::test_two_steps_move_M_and_its_head_and_nothing_else",),
    ),
    Mutant(
        "a layer before a head, which PEFT trains whole by its ending, is adapted",
        "tuner/targets.py",
        "if not any(one.endswith(heads) for one in",
        "if not any(one in heads for one in",
        ("tuner/test_tasks.py",),
    ),
    Mutant(
        "of several kinds of layers the first says the bits of a base",
        "tuner/config.py",
        '        return min(held, key=lambda kind: bits if isinstance(bits := kind.get("bits"), int) else 16)',
        "        return held[0]",
        ("tuner/test_tasks.py",),
    ),
    Mutant(
        "PEFT asks a model without a vocabulary for its embeddings",
        "tuner/registration.py",
        '        if "save_embedding_layers" not in given and not vocabulary_of(self.get_base_model()):',
        "        if False:",
        ("test_load.py::test_a_head_has_the_number_of_outputs_that_it_was_trained_with",),
    ),
    Mutant(
        "a base is prepared as the class of its config and not of the adapter",
        "checkpoint/making/job.py",
        "empty_model(self.checkpoint, self.dtype, self.head.kind, self.head.options)",
        "empty_model(self.checkpoint, self.dtype)",
        ("test_models.py::test_the_adapter_alone_gives_the_same_outputs_on_a_base_without_its_head",),
    ),
    Mutant(
        "the rows of a projection are taken for the number of labels",
        "tuner/heads.py",
        "if len(rows) == 1 or _fits(kind, base, {outputs: one}, shapes)",
        "if True",
        ("test_load.py::test_a_head_has_the_number_of_outputs_that_it_was_trained_with",),
    ),
    Mutant(
        "a classifier is exported as the class of its base",
        "formats/base.py",
        "head.kind if head.kind is not None else model_class(self.config)",
        "model_class(self.config)",
        ("test_models.py::test_merged_it_gives_the_outputs_of_the_adapter",),
    ),
    Mutant(
        "what a layer gives is a view that nobody may write into",
        "tuner/layer.py",
        "y if inner is x else of_its_own(y), None",
        "y, None",
        ("tuner/test_layer.py::test_what_it_gives_may_be_changed_in_place_in_training",),
    ),
    Mutant(
        "the gradient of an activation of its own is lost",
        "maths/own_tensor.py",
        "    def backward(ctx: Any, g: Tensor) -> Tensor:\n        return g",
        "    def backward(ctx: Any, g: Tensor) -> Tensor:\n        return 0 * g",
        ("maths/test_own_tensor.py",),
    ),
    Mutant(
        "a head that was cast takes its input as it is",
        "tuner/model.py",
        "        cast_inputs(model)\n",
        "",
        ("tuner/test_trained_whole.py",),
    ),
    Mutant(
        "without the adapter a head's input is cast as well",
        "tuner/trained_whole.py",
        "    active = [] if wrapper.disable_adapters else wrapper.active_adapters",
        "    active = wrapper.active_adapters",
        ("tuner/test_trained_whole.py",),
    ),
    Mutant(
        "a layer that the model wants in 32 bits is held in 4 by a residual",
        "tuner/targets.py",
        "            _check_quantisable(name, model)\n",
        "",
        ("tuner/test_tasks.py",),
    ),
    Mutant(
        "an adapter of another base is swapped in",
        "tuner/hotswap.py",
        "    reader.check(layers, adapter, model)\n",
        "",
        ("tuner/test_hotswap.py",),
    ),
    Mutant(
        "an M of another alpha is swapped in",
        "tuner/hotswap.py",
        "        reader.check_same_map(name.removeprefix(PREFIX), layer, adapter)",
        "        pass",
        ("tuner/test_hotswap.py",),
    ),
    Mutant(
        "a swap lets others' options differ",
        "tuner/hotswap.py",
        "hotswap.CONFIG_KEYS_TO_CHECK[QSVFT] = [*_SAME,",
        "hotswap.CONFIG_KEYS_TO_CHECK[QSVFT] = [",
        ("tuner/test_hotswap.py",),
    ),
    Mutant(
        "the mathematics reads the storage",
        "maths/subspace.py",
        "from torch import Tensor\n\nBLOCKS",
        "from torch import Tensor\n\nfrom ..storage import nf4 as nf4\n\nBLOCKS",
        ("test_house.py::test_the_contracts_hold",),
    ),
    Mutant(
        "an option that is declared reaches no method's text",
        "memory/methods.py",
        "for name, one in {**OPTIONS, **SWITCHES}.items() if one.counted}",
        'for name, one in {**OPTIONS, **SWITCHES}.items() if one.counted and name != "made_up"}',
        ("test_declared_options.py",),
    ),
    Mutant(
        "update subtracted instead of added",
        "maths/basis.py",
        "else base[:, columns], z, dense))",
        "else base[:, columns], z, dense, alpha=-1))",
        ("maths/test_updates.py",),
    ),
    Mutant(
        "second-order gradients that stop at the norms",
        "lean/norms.py",
        "leaf = x if twice else x.detach().requires_grad_()",
        "leaf = x.detach().requires_grad_()",
        ("lean/test_norms.py",),
    ),
    Mutant(
        "second-order gradients of a dense M that stop at h",
        "maths/dense_update.py",
        "grad_h = through if grad_h is None else grad_h + through",
        "grad_h = through",
        ("maths/test_dense_update.py",),
    ),
    Mutant(
        "what is merged depends on the process's default dtype",
        "tuner/layer.py",
        "unit = torch.zeros(len(rows), n, dtype=torch.float32, device=W.device)",
        "unit = torch.zeros(len(rows), n, device=W.device)",
        ("tuner/test_default_dtype.py::test_under_another_default_dtype_an_adapter_and_its_merge_are_the_same_bits",),
    ),
    Mutant(
        "who reads an adapted layer's weight passes over the adapter",
        "tuner/adapted.py",
        "return ReadWeight.of(held, self.module_name)",
        "return held",
        ("tuner/test_read_weight.py",),
    ),
    Mutant(
        "a layer whose weight its parent reads is quantised",
        "storage/quantization.py",
        "left = {*skip_layers, *read_directly(model), *routers(model)}",
        "left = {*skip_layers, *routers(model)}",
        ("storage/test_linear_layers.py",),
    ),
    Mutant(
        "routers and gates are quantised",
        "storage/quantization.py",
        "*read_directly(model), *routers(model)}",
        "*read_directly(model)}",
        ("storage/test_routers.py",),
    ),
    Mutant(
        "routers, gates and experts are adapted though nobody named them",
        "tuner/targets.py",
        "found -= {*read_directly(model), *routers(model), *expert_layers(model)}",
        "found -= {*read_directly(model)}",
        ("tuner/test_target_parameters.py",),
    ),
    Mutant(
        "an expert's matrix is taken the wrong way round",
        "storage/experts.py",
        "torch.stack([W.t() for W in weights] if module.is_transposed else weights)",
        "torch.stack(weights)",
        ("storage/test_experts.py",),
    ),
    Mutant(
        "the outputs of experts go to other rows",
        "storage/experts.py",
        "weighted[order.argsort()].view(rows, k, -1)",
        "weighted[order].view(rows, k, -1)",
        ("storage/test_experts.py",),
    ),
    Mutant(
        "a row of no expert goes to the last one",
        "storage/experts.py",
        "counts: list[int] = torch.bincount(number, minlength=experts)[:experts].tolist()",
        "counts: list[int] = torch.bincount(number.clamp(max=experts - 1), minlength=experts).tolist()",
        ("storage/test_experts.py",),
    ),
    Mutant(
        "experts without rows have no gradient, and processes wait for each other",
        "storage/experts.py",
        "if len(x) or every:",
        "if len(x):",
        ("storage/test_experts.py",),
    ),
    Mutant(
        "a quantised model is saved with experts that no loader finds",
        "storage/quantization.py",
        "if any(is_split(module) for module in model.modules()):",
        "if False:",
        ("storage/test_experts.py",),
    ),
    Mutant(
        "an expert is read in place of another",
        "checkpoint/source/experts.py",
        "each = [tuple(sources) for sources in zip(*of_pattern.values(), strict=True)]",
        "each = [tuple(sources) for sources in zip(*map(reversed, of_pattern.values()), strict=True)]",
        ("checkpoint/making/test_streaming_experts.py",),
    ),
    Mutant(
        "all experts are read for each",
        "checkpoint/source/pieces.py",
        "if model not in _LAST or _LAST[model][0] != wanted:",
        "if True:",
        ("checkpoint/making/test_streaming_experts.py",),
    ),
    Mutant(
        "what a prepared directory holds is converted as a checkpoint is",
        "checkpoint/prepared/quantizer.py",
        "super().update_weight_conversions([], model)",
        "super().update_weight_conversions(weight_conversions, model)",
        ("checkpoint/making/test_streaming_experts.py",),
    ),
    Mutant(
        "a merged model has names that other programs do not read",
        "storage/quantization.py",
        'for flag in (*flags, "_weight_conversions"):',
        "for flag in flags:",
        ("checkpoint/making/test_streaming_experts.py",),
    ),
    Mutant(
        "rows of experts are taken for rows of the batch",
        "tuner/mixed_batch.py",
        '(name for name in adapted if ".experts." in name)',
        "(name for name in adapted if False)",
        ("tuner/test_target_parameters.py",),
    ),
    Mutant(
        "a refused config leaves experts apart",
        "tuner/experts.py",
        "        join_experts(model)\n        raise",
        "        raise",
        ("tuner/test_target_parameters.py",),
    ),
    Mutant(
        "QLoRA's experts are counted in 4 bits",
        "memory/methods.py",
        'if method.name in ("floor", "qsvft"):',
        "if True:",
        ("memory/test_bytes_of_experts.py",),
    ),
    Mutant(
        "rows of a head in few bits are those of another place",
        "lean/rows_on_demand.py",
        "parts = tuple(part[index] for part in self.stored.parts())",
        "parts = tuple(part[: len(part[index])] for part in self.stored.parts())",
        ("lean/test_rows_on_demand.py",),
    ),
    Mutant(
        "all of a head in few bits is made dense without a word",
        "lean/rows_on_demand.py",
        "        if one is not None:\n            one.refuse()",
        "        if one is not None:\n            return one.stored.dense(one.dtype)",
        ("lean/test_rows_on_demand.py",),
    ),
    Mutant(
        "a base is prepared once more for each adapter that was trained on it",
        "checkpoint/making/cache.py",
        'record["adapter"]["target_modules"] = sorted(decomposed)',
        "pass",
        ("test_load.py",),
    ),
    Mutant(
        "an adapter names where its base is kept on this machine",
        "loading.py",
        "model.name_or_path = model.config.name_or_path = source.checkpoint.name",
        "pass",
        ("test_load.py",),
    ),
    Mutant(
        "a base is prepared from another dtype than the adapter's",
        "loading.py",
        'held.get("bits", 4), dtype or held.get("dtype")',
        'held.get("bits", 4), dtype',
        ("test_load.py",),
    ),
    Mutant(
        "a head of another size than the base's is made up",
        "checkpoint/source/architecture.py",
        '{*report["missing_keys"], *other}',
        '{*report["missing_keys"]}',
        ("test_load.py",),
    ),
    Mutant(
        "an adapter's head is loaded onto a model that has none",
        "loading.py",
        "load_base(read, path_or_id, head.brought, head.kind, **options)",
        "load_base(read, path_or_id, head.brought, **options)",
        ("test_load.py",),
    ),
    Mutant(
        "a LoRA for the base before it was rounded gives back the rounding as well",
        "formats/saved_lora.py",
        'fit_lora(layers(), ADAPTER, rule, dtype, onto == "held")',
        "fit_lora(layers(), ADAPTER, rule, dtype)",
        ("test_exporting.py",),
    ),
    Mutant(
        "a LoRA of a smaller rank is no best fit",
        "formats/lora.py",
        "(found.left[:, :rank], found.right[:rank])",
        "(B[:, :rank], A[:rank])",
        ("test_exporting.py",),
    ),
    Mutant(
        "the error of a LoRA leaves out its rounding",
        "formats/lora.py",
        "distance(B, A, rounded[0].float(), rounded[1].float())",
        "distance(B, A, kept[0], kept[1])",
        ("test_exporting.py",),
    ),
    Mutant(
        "a mixture of two saves is exported",
        "tuner/one_by_one.py",
        "self._reader.check_whole(digests, self.trained_whole, ADAPTER)",
        "pass",
        ("test_exporting.py", "formats/test_dense.py"),
    ),
    Mutant(
        "a dense model is written before all of its adapter is checked",
        "formats/dense.py",
        "if (more := next(self._layers, None)) is not None:",
        "if (more := None) is not None:",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "a head that was trained whole is left behind",
        "formats/saved_lora.py",
        "{**saved.trained_whole, **tensors}",
        "tensors",
        ("test_exporting.py",),
    ),
    Mutant(
        "a LoRA names layers that the adapter does not change",
        "formats/lora.py",
        "return sorted(leaves) if same == set(names) else sorted(names)",
        "return sorted(leaves)",
        ("test_exporting.py",),
    ),
    Mutant(
        "the LoRA of experts is of the wrong parameter of theirs",
        "formats/lora.py",
        'module + later * ".base_layer"',
        'module + (len(adapted) - 1 - later) % 2 * ".base_layer"',
        ("formats/test_experts_as_lora.py",),
    ),
    Mutant(
        "the factors of experts are in the wrong order",
        "formats/lora.py",
        "B = some_B.new_zeros(some_B.shape[0], r, len(layers))",
        "B = some_B.new_zeros(some_B.shape[0], len(layers), r).transpose(1, 2)",
        ("formats/test_experts_as_lora.py",),
    ),
    Mutant(
        "experts that only qsvft holds are exported for a base that nobody loads",
        "formats/saved_lora.py",
        'if onto == "held" and base.bits != 16 and',
        "if False and",
        ("formats/test_experts_as_lora.py",),
    ),
    Mutant(
        "a LoRA from memory forgets the part of the change that is asked for",
        "maths/low_rank.py",
        "energy < part * self.norm**2",
        "energy < self.norm**2",
        ("formats/test_conversion.py",),
    ),
    Mutant(
        "tied weights that have come apart are written once",
        "formats/dense.py",
        "if name in self._own or other in self._own:",
        "if False:",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "a dense model of fewer bits overflows in silence",
        "formats/dense.py",
        "if not all_finite(written):",
        "if False:",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "a dense model's error is that of the adapter's layers' mean",
        "formats/exported.py",
        "self._off += off**2",
        "self._off += off",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "rows of embeddings that trained stay behind in a dense model",
        "formats/dense.py",
        "yield name, self._with_rows(name, tensor)",
        "yield name, tensor",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "layers that are converted together are written apart",
        "formats/dense.py",
        "for name, shape in one.items()} != whole:",
        "for name, shape in one.items()} is whole:",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "merged onto the original, layers that the adapter leaves alone are those in few bits",
        "formats/dense.py",
        'if self._onto == "original":\n            assert self._base.original is not None\n            if module',
        "if False:\n            assert self._base.original is not None\n            if module",
        ("formats/test_dense.py",),
    ),
    Mutant(
        "rows of embeddings load under the name alone that they trained under",
        "tuner/adapter_digest.py",
        'else f"{stem}{_ROWS}.default"',
        "else key",
        ("tuner/test_trained_tokens.py",),
    ),
    Mutant(
        "what a converter says goes unheard",
        "formats/llama_cpp.py",
        "if done.returncode != 0:",
        "if False:",
        ("formats/test_llama_cpp.py",),
    ),
    Mutant(
        "whatever a converter wrote is taken for GGUF",
        "formats/llama_cpp.py",
        "return opened.read(len(_MAGIC)) == _MAGIC",
        "return True",
        ("formats/test_llama_cpp.py",),
    ),
    Mutant(
        "qsvft info stumbles over a config whose classes are no names",
        "info.py",
        "if not isinstance(classes, list) or not all(isinstance(one, str) for one in classes):",
        "if False:",
        ("checkpoint/prepared/test_check.py::test_info_refuses_a_config_whose_classes_are_no_names",),
    ),
    Mutant(
        "a router is taken for a linear layer",
        "storage/linear_layers.py",
        "torch.allclose(found, expected, atol=1e-5)",
        "True",
        ("storage/test_linear_layers.py",),
    ),
    Mutant(
        "generating in training goes on from the last token alone",
        "tuner/model.py",
        "with evaluating(model):",
        "if True:",
        ("test_training.py::test_in_training_it_generates_what_it_generates_in_evaluation",),
    ),
    Mutant(
        "an adapter's file may overwrite the base",
        "tuner/adapter_file.py",
        "self._pass_over_base(key, model)",
        "pass",
        ("tuner/test_saving.py",),
    ),
    Mutant(
        "damping missing in the scale",
        "maths/updates.py",
        "torch.maximum(s, rms * TAIL_DAMPING)",
        "torch.maximum(s, rms * 1e-7)",
        ("maths/test_updates.py",),
    ),
    Mutant(
        "scale on the rows of M on the output side",
        "maths/updates.py",
        'U, U, values, pattern, inverse_s, "columns")',
        'U, U, values, pattern, inverse_s, "rows")',
        ("maths/test_updates.py",),
    ),
    Mutant(
        "activation kept for the backward beside its coefficients",
        "maths/basis.py",
        "ctx.F = Held(read, parts)\n        return times",
        "ctx.F = Held(read, parts)\n        ctx.save_for_backward(a)\n        return times",
        ("tuner/test_forms.py",),
    ),
    Mutant(
        "factor turned over in the gradient of the activation",
        "maths/basis.py",
        "grad_a = times(g, ctx.F) if",
        "grad_a = times(g.flip(1), ctx.F) if",
        ("maths/test_updates.py",),
    ),
    Mutant(
        "band not transposed in the backward",
        "maths/banded_coefficients.py",
        "padded = F.pad(band.flip(1), (0, 0,",
        "padded = F.pad(band, (0, 0,",
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "gradient of a banded M skipped",
        "maths/banded_coefficients.py",
        "grad_values = values_from_band(grad_band, d).to(values.dtype)",
        "grad_values = torch.zeros_like(values)",
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "gradient of M from the last tokens alone",
        "maths/banded_coefficients.py",
        "total = total + parts.view(",
        "total = parts.view(",
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "gradient of M summed in the activation's dtype",
        "maths/coefficients.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "rows and columns of the band's scale exchanged",
        "maths/banded_coefficients.py",
        'if side == "rows":',
        'if side == "columns":',
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "rows and columns of the entries' scale exchanged",
        "maths/indexed_coefficients.py",
        'if side == "rows" else columns]',
        'if side == "columns" else columns]',
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "rows and columns of a dense M's scale exchanged",
        "maths/dense_coefficients.py",
        'if side == "rows" else scale)',
        'if side == "columns" else scale)',
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "gradient of a dense M transposed",
        "maths/dense_coefficients.py",
        "scale, ctx.side).to(values.dtype).view(-1)",
        "scale, ctx.side).t().to(values.dtype).reshape(-1)",
        ("maths/test_coefficients.py",),
    ),
    Mutant(
        "the update of a dense M forgets its scale on the way back",
        "maths/dense_update.py",
        "N = scaled(values.view(h.shape[1], -1), ctx.scale,",
        "N = scaled(values.view(h.shape[1], -1), None,",
        ("maths/test_dense_update.py",),
    ),
    Mutant(
        "the gradient of a dense M in one node transposed",
        "maths/dense_update.py",
        "scaled(dense_gradient(grad_z, h), ctx.scale",
        "scaled(dense_gradient(h, grad_z), ctx.scale",
        ("maths/test_dense_update.py",),
    ),
    Mutant(
        "the sum over tokens of a dense M's gradient in low precision",
        "maths/dense_coefficients.py",
        "total += parts.sum(0, dtype=dtype)",
        "total = (total + parts.sum(0)).to(h.dtype).to(dtype)",
        ("maths/test_dense_update.py",),
    ),
    Mutant(
        "alpha of directions from data measured on the bias too",
        "tuner/calibration.py",
        "y = y if bias is None else y - bias",
        "y = y",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "alpha of directions from data is that of the weight",
        "tuner/layer.py",
        "length = frobenius_norm(weight) if on_data is None else",
        "length = frobenius_norm(weight) if True else",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "alpha of a layer that reads zeros alone divides by their energy",
        "tuner/calibration.py",
        "** 0.5 if held else 0.0",
        "** 0.5 if True else 0.0",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "a recommendation is held against options as they are written, not as they are meant",
        "memory/fit/options.py",
        "return vars(QSVFTConfig(**{**adapter, key: value})) != counted",
        "return bool({**adapter}.get(key) != value)",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "calibration looks at all batches",
        "tuner/calibration.py",
        "few = islice(batches, MOST_BATCHES)",
        "few = islice(batches, None)",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "calibration given, and the basis stays singular",
        "tuner/calibration.py",
        'return {"basis": "data", "residual": residual, **fields}',
        "return dict(fields)",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "a layer with fewer directions than the rank is refused",
        "tuner/targets.py",
        "else min(config.rank, limit)",
        "else config.rank",
        ("test_prepare.py",),
    ),
    Mutant(
        "top-k takes the smallest entries",
        "maths/patterns.py",
        "descending=True",
        "descending=False",
        ("maths/test_patterns.py",),
    ),
    Mutant(
        "random pattern forgets its seed",
        "maths/patterns.py",
        "random.Random(seed)",
        'random.Random("")',
        ("maths/test_patterns.py",),
    ),
    Mutant(
        "sign rule dropped",
        "maths/decomposition.py",
        "small = (small * signs).contiguous()",
        "small = small.contiguous()",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "signs turned on one of two factors",
        "maths/decomposition.py",
        "other = (other * signs).contiguous() if",
        "other = other.contiguous() if",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "a weight's last stretch alone in its Gram matrix",
        "maths/decomposition.py",
        "gram = part.T @ part if gram is None else gram.addmm_(part.T, part)",
        "gram = part.T @ part",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "the other side not divided by s",
        "maths/decomposition.py",
        "left = images[:, :clear] / lengths",
        "left = images[:, :clear]",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "the other side divided by the smallest s too",
        "maths/decomposition.py",
        "clear = int((s > bound * s[0]).sum())",
        "clear = s.numel()",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "the last directions turned on one side alone",
        "maths/decomposition.py",
        "V = torch.cat([V[:clear], turn @ V[clear:]])",
        "V = torch.cat([V[:clear], V[clear:]])",
        ("maths/test_decomposition.py",),
    ),
    Mutant(
        "randomized at any rank",
        "maths/decomposition.py",
        "and rank <= limit * _RANDOMIZED_UP_TO",
        "and rank <= limit",
        ("maths/test_decomposition.py", "tuner/test_decompositions.py"),
    ),
    Mutant(
        "randomized directions from two blocks",
        "maths/subspace.py",
        "BLOCKS = 6",
        "BLOCKS = 2",
        ("maths/test_subspace.py",),
    ),
    Mutant(
        "each block of the space the first one again",
        "maths/subspace.py",
        "products[:, width - block : width - block + count]",
        "products[:, :count]",
        ("maths/test_subspace.py",),
    ),
    Mutant(
        "rounding noise where the range of W is used up",
        "maths/subspace.py",
        "return block + fresh * torch.where(",
        "return block + 0 * fresh * torch.where(",
        ("maths/test_subspace.py",),
    ),
    Mutant(
        "the fixed start is kept on the device",
        "maths/subspace.py",
        'dtype=torch.int64, device="cpu").unsqueeze(1)',
        "dtype=torch.int64).unsqueeze(1)",
        ("maths/test_subspace.py",),
    ),
    Mutant(
        "blocks made orthogonal once",
        "maths/subspace.py",
        "for _ in range(2):",
        "for _ in range(1):",
        ("maths/test_subspace.py",),
    ),
    Mutant(
        "randomized directions of another rank extended",
        "storage/basis_key.py",
        'how = f"_randomized_{rank}"',
        'how = "_randomized"',
        ("tuner/test_decompositions.py",),
    ),
    Mutant(
        "a run goes on from half a checkpoint",
        "training/checkpoints.py",
        "if _is_whole(path)), None)",
        "), None)",
        ("training/test_train.py::test_a_run_that_was_killed_goes_on_from_the_last_whole_checkpoint",),
    ),
    Mutant(
        "another recipe goes on with a run",
        "training/begun.py",
        "    if other:",
        "    if False:",
        ("training/test_train.py::test_a_directory_that_holds_something_else_is_refused_and_left_as_it_is",),
    ),
    Mutant(
        "a name that no one knows is passed over",
        "options/recipe.py",
        "        _check_name(where, name, theirs)",
        "        pass",
        ("training/test_recipe.py",),
    ),
    Mutant(
        "what was asked counts in the loss",
        "training/tokens.py",
        "learnt = len(prompt) if len(prompt) < len(whole) else 0",
        "learnt = 0",
        ("training/test_evaluate.py",),
    ),
    Mutant(
        "rows held out are trained on",
        "training/data.py",
        'return Rows(parts["train"], parts["test"])',
        'return Rows(train, parts["test"])',
        ("training/test_data.py",),
    ),
    Mutant(
        "a conversation's loss is on what the user says as well",
        "training/plan.py",
        '        chosen["assistant_only_loss"] = True',
        "        pass",
        ("training/test_train.py::test_the_loss_of_a_conversation_is_on_what_the_assistant_says",),
    ),
    Mutant(
        "a step that does not fit the card is begun",
        "training/forecast.py",
        "if step.card_bytes is not None and needed_bytes(step.row.peak_bytes) > step.card_bytes:",
        "if False:",
        ("training/test_train.py::test_a_step_that_does_not_fit_the_card_is_refused_with_advice",),
    ),
    Mutant(
        "a run that failed ends with 0",
        "cli/train.py",
        "raise typer.Exit(130 if error.interrupted else 1) from error",
        "return",
        ("cli/test_train_command.py::test_a_run_that_fails_is_one_line_and_code_1",),
    ),
    Mutant(
        "a card that somebody wrote is written over",
        "tuner/registration.py",
        "                if written:",
        "                if False:",
        ("tuner/test_card.py",),
    ),
    Mutant(
        "a card names a place on this machine",
        "tuner/card.py",
        "return None if not name or os.path.isabs(name) or os.path.exists(name) else str(name)",
        "return str(name)",
        ("tuner/test_card.py",),
    ),
    Mutant(
        "AutoPeftModel loads the base as its checkpoint has it",
        "tuner/auto_peft.py",
        "PeftConfig.from_pretrained(place) if set(given) <= _OURS else None",
        "None",
        ("test_load.py::test_autopeft_loads_an_adapter_on_its_base_as_it_was_held",),
    ),
    Mutant(
        "a prepared directory's own factors are passed over",
        "training/base.py",
        "        calibration = 0  # its factors are there to be used",
        "        pass",
        ("training/test_train.py::test_a_prepared_directory_trains_with_what_it_was_prepared_for",),
    ),
    Mutant(
        "every program is taken for the command",
        "options/started.py",
        "return PurePath(started).name in _NAMES",
        "return True",
        ("cli/test_start.py",),
    ),
    Mutant(
        "the command imports the library before it knows what it is asked for",
        "__init__.py",
        "if not is_the_command():",
        "if True:",
        ("cli/test_start.py",),
    ),
    Mutant(
        "an old adapter's vectors chosen anew",
        "tuner/config.py",
        '"auto" if self.base is None else "exact"',
        '"auto"',
        ("tuner/test_config.py", "tuner/test_decompositions.py"),
    ),
    Mutant(
        "a residual base of another decomposition taken",
        "tuner/attach.py",
        "if base.method != method:",
        "if base.method.dtype != method.dtype:",
        ("tuner/test_decompositions.py",),
    ),
    Mutant(
        "the larger side chosen",
        "maths/decomposition.py",
        'return "input" if n <= m else "output"',
        'return "input" if n >= m else "output"',
        ("maths/test_decomposition.py", "storage/test_factors.py"),
    ),
    Mutant(
        "rms over the rank",
        "storage/factors.py",
        "/ basis.size**0.5",
        "/ basis.rank**0.5",
        ("storage/test_factors.py",),
    ),
    Mutant(
        "scale of the vectors before rounding",
        "storage/factors.py",
        "read = basis.to_coefficients(part, rank)",
        "read = part.double() @ torch.linalg.qr(basis.dense(torch.float64, rank).T)[0]",
        ("storage/test_factors.py",),
    ),
    Mutant(
        "repacking of 4-bit weights left on",
        "storage/quantization.py",
        "module.support_avx512bf16_for_cpu = False",
        "pass",
        ("storage/test_quantization.py",),
    ),
    Mutant(
        "tensors of another library are read as numbers",
        "storage/weights.py",
        "isinstance(tensor, bnb.nn.Params4bit) or is_packed_tensor(tensor)",
        "isinstance(tensor, bnb.nn.Params4bit)",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a kernel that cuts the gradient is left as it is",
        "storage/packed.py",
        "_not_linear(module) is None and not _gives_gradient(module):",
        "_not_linear(module) is None and False:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a wrong gradient of a kernel is taken for one",
        "storage/packed.py",
        "    return _relative((grad.double() * x.detach().double()).sum() - expected, expected) <= TOLERANCE",
        "    return True",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "the bias stays in the answers to the identity",
        "storage/packed.py",
        "            module.bias = None  # rather",
        "            pass  # rather",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "dequantize() is believed whatever the layer multiplies with",
        "storage/packed.py",
        "_relative(W.double() @ x.double() - (f[1] - f[0]), f[1] - f[0]) <= TOLERANCE:",
        "True:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a packed layer that is not linear is adapted",
        "storage/packed.py",
        "    if difference <= TOLERANCE:",
        "    if True:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "packed layers that are not adapted stay packed in a merged model",
        "storage/quantization.py",
        "        elif is_packed(module):",
        "        elif False:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a base that another library had quantised is quantised again",
        "storage/quantization.py",
        "    if packed is not None:",
        "    if False:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a plain base is made for an adapter of another library's",
        "tuner/config.py",
        "        if kind not in _MADE_HERE:",
        "        if False:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a merged layer has the dtype of its packed scales",
        "storage/packed.py",
        'vars(module).setdefault("qsvft_dtype", dtype)',
        "pass",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "a bias under a kernel without a gradient does not train",
        "storage/packed.py",
        "        if ctx.needs_input_grad[1]:",
        "        if False:",
        ("storage/test_packed.py",),
    ),
    Mutant(
        "Conv1D weights read without turning them",
        "storage/weights.py",
        "return layer.weight.detach().t()",
        "return layer.weight.detach()",
        ("storage/test_quantization.py",),
    ),
    Mutant(
        "output head quantised as well",
        "storage/quantization.py",
        "left_alone = module is head or",
        "left_alone =",
        ("storage/test_quantization.py",),
    ),
    Mutant(
        "NaN in a weight let through",
        "storage/weights.py",
        "if all_finite(tensor):",
        "if True:",
        ("storage/test_quantization.py",),
    ),
    Mutant(
        "M cast with the model",
        "tuner/parameter.py",
        "if value.dtype != torch.float32:",
        "if value.is_meta:",
        ("tuner/test_parameter.py",),
    ),
    Mutant(
        "new values of M ignored",
        "tuner/parameter.py",
        "if torch.equal(moved.to(value.dtype), value):",
        "if moved.shape == value.shape:",
        ("tuner/test_parameter.py",),
    ),
    Mutant(
        "the probe's noise is computed on the default device",
        "tuner/probe.py",
        'dtype=torch.float64, device="cpu")',
        "dtype=torch.float64)",
        ("tuner/test_probe.py",),
    ),
    Mutant(
        "probe accepts everything",
        "tuner/probe.py",
        "TOLERANCE = 1e-2",
        "TOLERANCE = math.inf",
        ("tuner/test_probe.py",),
    ),
    Mutant(
        "a twin adapter has an alpha of its own",
        "tuner/layer.py",
        "(self.settings, self.forms, self.came_from, self.units)",
        "(self.settings, self.forms, self.came_from)\n        self.units[adapter] = 1.0",
        ("tuner/test_reference.py",),
    ),
    Mutant(
        "the twin of an adapter is never found",
        "tuner/layer.py",
        "if other is config and sources.data in (None, self.came_from[name]):",
        "if False:",
        ("tuner/test_reference.py",),
    ),
    Mutant(
        "a twin passes over newer directions",
        "tuner/layer.py",
        "sources.data in (None, self.came_from[name])",
        "True",
        ("tuner/test_reference.py",),
    ),
    Mutant(
        "a one-sided scale keeps the alpha of today",
        "tuner/layer.py",
        'if self.forms[adapter].kind != "both" and not own_scale:',
        "if False:",
        ("tuner/test_reference.py",),
    ),
    Mutant(
        "M is named as it was before",
        "tuner/parameter.py",
        'return f"{key}.weight" if found and rest.count(".") < 2 and not rest.endswith(".weight") else key',
        "return key",
        ("tuner/test_reference.py",),
    ),
    Mutant(
        "rows with adapters of their own all have the first",
        "tuner/mixed_batch.py",
        "found.setdefault(name, []).append(row)",
        "found.setdefault(names[0], []).append(row)",
        ("tuner/test_mixed_batch.py",),
    ),
    Mutant(
        "adapter_names is passed over",
        "tuner/mixed_batch.py",
        'names = kwargs.get("adapter_names")',
        "names = None",
        ("tuner/test_mixed_batch.py",),
    ),
    Mutant(
        "an encoder's rows are repeated for beams",
        "tuner/mixed_batch.py",
        "for_rows = names if module in unrepeated else",
        "for_rows = names if False else",
        ("tuner/test_mixed_batch.py",),
    ),
    Mutant(
        "rows are taken of coefficients that are flattened",
        "tuner/layer.py",
        "alike = adapter_names is None and all(",
        "alike = all(",
        ("tuner/test_mixed_batch.py",),
    ),
    Mutant(
        "dW of a Conv1D in the layout of a linear layer",
        "tuner/layer.py",
        "return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta",
        "return delta",
        ("tuner/test_lora_export.py",),
    ),
    Mutant(
        "a deleted adapter leaves its factors",
        "tuner/layer.py",
        "for key in set(self.qsvft_bases) - read:",
        "for key in ():",
        ("tuner/test_forms.py::test_a_deleted_adapter_leaves_nothing_behind_and_takes_nothing_of_another",),
    ),
    Mutant(
        "a residual base made on meta",
        "tuner/attach.py",
        "@skip_init_on_device  #",
        "  #",
        ("tuner/test_low_cpu_mem.py",),
    ),
    Mutant(
        "torch.compile makes its own factors",
        "storage/stored_matrix.py",
        "make = _uncompiled_values if torch.compiler.is_compiling() else _values",
        "make = _values",
        ("tuner/test_inductor.py",),
    ),
    Mutant(
        "transformers loads an adapter unchecked",
        "tuner/load_adapter.py",
        "if _looking.get():",
        "if False:",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "a refused adapter can be used",
        "tuner/layer.py",
        "self.qsvft_probe[adapter].fill_(torch.nan)",
        "pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "a layer that ran takes any state",
        "tuner/adapted.py",
        "    layer._verified.clear()",
        "    pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "NaN in M is saved",
        "tuner/adapter_file.py",
        "    check_finite(layer.module_name, adapter, selected[key])",
        "    pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "NaN in M is merged",
        "tuner/layer.py",
        "            self.check_finite(name)",
        "            pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "NaN in M comes in with a state",
        "tuner/adapted.py",
        '        check_finite(layer.module_name, key.removeprefix(f"{prefix}qsvft_M.").removesuffix(".weight"), M)',
        "        pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "NaN in M is read from a file",
        "tuner/adapter_file.py",
        "        check_finite(name, adapter, M)",
        "        pass",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "an adapter's digest does not know its layer",
        "tuner/adapter_digest.py",
        '"layer": _place(name, 1),',
        '"layer": "",',
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "an adapter's digest does not know its map",
        "tuner/adapter_digest.py",
        '"bases": [key.plain for key in form.keys],',
        "",
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "modules trained whole belong to no save",
        "tuner/adapter_digest.py",
        "*_in_place(_placed(layers, 1)), *_in_place(_placed(plain, 2))",
        "*_in_place(_placed(layers, 1))",
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "layers of two saves make one adapter",
        "tuner/adapter_file.py",
        "if expected is not None and not any(",
        "if False and not any(",
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "of an encoder's and a decoder's layers the last alone is bound",
        "tuner/adapter_digest.py",
        "in sorted(placed, key=lambda one: one[:2])",
        "in sorted({one[0]: one for one in placed}.values())",
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "biases that trained are bound to nothing",
        "tuner/adapter_file.py",
        "    return modules | set(",
        "    return modules & set(",
        ("tuner/test_biases.py",),
    ),
    Mutant(
        "an adapter trains biases that others have as well",
        "tuner/model.py",
        "if biased and len(self.peft_config) > 1:",
        "if False:",
        ("tuner/test_biases.py",),
    ),
    Mutant(
        "rows of the base have an adapter's biases",
        "tuner/mixed_batch.py",
        "    if biased:",
        "    if False:",
        ("tuner/test_biases.py",),
    ),
    Mutant(
        "packed weights in a dtype of floats are read as numbers",
        "storage/weights.py",
        "and not tensor.is_meta and not packed:",
        "and not tensor.is_meta:",
        ("storage/test_quant_storage.py",),
    ),
    Mutant(
        "packed weights are cut as if each element were a byte",
        "storage/nf4_product.py",
        "weight.data.view(torch.uint8).view(m, -1)",
        "weight.data.view(m, -1)",
        ("storage/test_quant_storage.py",),
    ),
    Mutant(
        "a weight that FSDP gathered has no state",
        "storage/nf4.py",
        "    fix_4bit_weight_quant_state_from_module(layer)\n",
        "",
        ("storage/test_quant_storage.py",),
    ),
    Mutant(
        "the factors are not split with their layer",
        "tuner/sharding.py",
        "                basis.stored.be_sharded(dtype)",
        "                pass",
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "a disguised part of a factor is read in the dtype of its disguise",
        "storage/stored_matrix.py",
        "part.detach().view(self.disguised[name]) if name in self.disguised else part",
        "part",
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "FSDP's wrappers around the parts of a layer hide its M from what saves it",
        "tuner/model.py",
        '(name.replace("_fsdp_wrapped_module.", ""), module)',
        '(name.removeprefix("_fsdp_wrapped_module."), module)',
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "an adapter that is read under FSDP1 is lost",
        "tuner/model.py",
        '(PREFIX if hidden else "")',
        '""',
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "loading takes the place of the parameter that FSDP2 made",
        "tuner/parameter.py",
        "if type(weight) is nn.Parameter and weight",
        "if not isinstance(weight, Float32Parameter) and weight",
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "M is read outside the module that FSDP1 gathers it for",
        "tuner/layer.py",
        "        updated: Tensor = self.qsvft_M[adapter](update, base, x)",
        "        updated = update(self.M(adapter), base, x)",
        ("tuner/test_sharding.py",),
    ),
    Mutant(
        "a weight that ZeRO-3 has split is taken for one without values",
        "storage/split_weights.py",
        "if whole is not None and weight.numel() == 0:",
        "if False:",
        ("storage/test_split_weights.py",),
    ),
    Mutant(
        "ZeRO-3 splits what is built here",
        "storage/split_weights.py",
        "    deepspeed.unset_hf_deepspeed_config()\n",
        "",
        ("storage/test_split_weights.py",),
    ),
    Mutant(
        "a part of an adapter is saved over a whole one",
        "tuner/registration.py",
        "            _check_complete(self, names, part)",
        "            pass",
        ("tuner/test_saving.py",),
    ),
    Mutant(
        "a model is mapped from its prepared directory",
        "checkpoint/prepared/quantizer.py",
        "        own_tensors(model)",
        "        pass",
        ("test_overwritten_files.py",),
    ),
    Mutant(
        "of an int8 weight a part is mapped from the file",
        "storage/alignment.py",
        "                tensor.CB = new",
        "                pass",
        ("test_overwritten_files.py",),
    ),
    Mutant(
        "factors are mapped from their file",
        "storage/factor_files.py",
        "(rows, columns), rank).to(device, copy=True)",
        "(rows, columns), rank).to(device)",
        ("test_overwritten_files.py",),
    ),
    Mutant(
        "an adapter's tensors are mapped from its file",
        "tuner/adapter_file.py",
        "others = {key: tensor.clone() for",
        "others = {key: tensor for",
        ("test_overwritten_files.py",),
    ),
    Mutant(
        "an index leads transformers to another prepared directory",
        "checkpoint/prepared/quantizer.py",
        "    if len(folders) > 1 or (own.is_dir() and not min(folders).is_relative_to(own)):",
        "    if False:",
        ("test_foreign_code.py",),
    ),
    Mutant(
        "an index leads a merge elsewhere",
        "checkpoint/source/architecture.py",
        "        read_index(index)  # transformers would go where it points",
        "        pass",
        ("test_foreign_code.py",),
    ),
    Mutant(
        "code that comes with a checkpoint is run",
        "checkpoint/source/architecture.py",
        "        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=False)",
        "        return AutoConfig.from_pretrained(path_or_id, trust_remote_code=True)",
        ("test_foreign_code.py",),
    ),
    Mutant(
        "a forward in another thread gets deferred logits",
        "lean/chunked_loss.py",
        "mine = _deferring_head.get() is head",
        "mine = True",
        ("test_threads.py",),
    ),
    Mutant(
        "the first of several forwards takes away what all were lent",
        "lean/lent.py",
        "            if not held[name][0]:",
        "            if name in held:",
        ("test_threads.py",),
    ),
    Mutant(
        "rows have the adapters that another thread named",
        "tuner/mixed_batch.py",
        "_call.get() is call):",
        "True):",
        ("test_threads.py",),
    ),
    Mutant(
        "the first of several generations in training ends evaluation",
        "lean/checkpointing.py",
        "            if not _trained[model][0]:",
        "            if model in _trained:",
        ("test_threads.py",),
    ),
    Mutant(
        "a shard of M is saved in its place",
        "tuner/adapter_file.py",
        "    if tuple(selected[key].shape) != (pattern.count,):",
        "    if False:",
        ("tuner/test_saving.py",),
    ),
    Mutant(
        "a save that was cut off is never finished",
        "tuner/registration.py",
        "            finish_saving(one)",
        "            pass",
        ("tuner/test_bound_together.py",),
    ),
    Mutant(
        "a base without its head gets one",
        "checkpoint/source/architecture.py",
        '    if missing:\n        raise ValueError(\n            f"{path_or_id}: the checkpoint lacks',
        '    if False:\n        raise ValueError(\n            f"{path_or_id}: the checkpoint lacks',
        ("test_load.py", "test_loading.py"),
    ),
    Mutant(
        "what was never saved whole is taken over",
        "storage/whole_folders.py",
        "        shutil.rmtree(staging, ignore_errors=True)\n        staging.mkdir()",
        "        staging.mkdir(exist_ok=True)",
        ("storage/test_whole_folders.py", "formats/test_dense.py"),
    ),
    Mutant(
        "files are their owner's alone",
        "storage/whole_folders.py",
        "            usual_permissions(staging)",
        "            pass",
        ("storage/test_whole_folders.py",),
    ),
    Mutant(
        "a weighted sum forgets what 1 in M stood for",
        "tuner/weighted_sum.py",
        "w * layer.units[a] * layer.M(a).double()",
        "w * layer.units[name] * layer.M(a).double()",
        ("tuner/test_weighted_sum.py",),
    ),
    Mutant(
        "adapters between other directions are added up",
        "tuner/weighted_sum.py",
        "if len(set(what.values())) > 1:",
        "if False:",
        ("tuner/test_weighted_sum.py",),
    ),
    Mutant(
        "NaN in an embedding is prepared",
        "prepare.py",
        "    check_tensors(",
        "    list(",
        ("test_prepare.py",),
    ),
    Mutant(
        "NaN in a norm is written",
        "checkpoint/making/work.py",
        "    check_tensors(",
        "    list(",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "training goes on with a NaN loss",
        "tuner/stop_at_nan.py",
        "norms = [*self._losses, *(",
        "norms = [*(",
        ("tuner/test_stop_at_nan.py",),
    ),
    Mutant(
        "a base that is damaged a little is taken without a word",
        "tuner/adapter_file.py",
        "        if other:\n            logger",
        "        if False:\n            logger",
        ("tuner/test_doors.py",),
    ),
    Mutant(
        "layer ignores the bound of its scale",
        "tuner/layer.py",
        "stored = bounded_inverse(s, rms)",
        "stored = bounded_inverse(s, 0 * rms)",
        ("tuner/test_layer.py",),
    ),
    Mutant(
        "bias fed to the output side",
        "tuner/layer.py",
        "if not isinstance(bias, Tensor):",
        "if True:",
        ("tuner/test_layer.py::test_a_large_bias_on_the_output_side_is_not_scaled_by_the_adapter",),
    ),
    Mutant(
        "merging forgets W",
        "tuner/layer.py",
        "merged = W.clone()",
        "merged = torch.zeros_like(W)",
        ("tuner/test_layer.py::test_merging_gives_the_adapters_outputs_and_unmerging_the_base_bit_for_bit",),
    ),
    Mutant(
        "loading accepts an adapter of another base",
        "tuner/adapter_file.py",
        "if not difference <= TOLERANCE:",
        "if False:",
        ("tuner/test_saving.py::test_a_base_other_than_the_adapters_is_refused_with_both_named",),
    ),
    Mutant(
        "scales of int8 blocks rounded down",
        "storage/stored_matrix.py",
        "return torch.where(nearest.to(torch.float32) < values, above, nearest)",
        "return nearest",
        ("storage/test_stored_matrix.py",),
    ),
    Mutant(
        "columns of a stored matrix read one block off",
        "storage/stored_matrix.py",
        "first, last = columns.start // block,",
        "first, last = columns.start // block + 1,",
        ("storage/test_stored_matrix.py",),
    ),
    Mutant(
        "residual with the directions added twice",
        "storage/residual.py",
        "residual = W - (U.T",
        "residual = W + (U.T",
        ("storage/test_residual.py",),
    ),
    Mutant(
        "sliced product without its bias",
        "storage/nf4_product.py",
        "if bias is None else torch.addmm(",
        "if True else torch.addmm(",
        ("storage/test_nf4_product.py",),
    ),
    Mutant(
        "sliced gradient scaled by its neighbour's maxima",
        "storage/nf4_product.py",
        "columns.start // state.blocksize : columns.stop",
        "0 : columns.stop",
        ("storage/test_nf4_product.py",),
    ),
    Mutant(
        "lean norm passes the gradient by",
        "lean/norms.py",
        "return grad, None, None",
        "return g, None, None",
        ("lean/test_norms.py",),
    ),
    Mutant(
        "output side reads W x with what another adapter adds on a residual base",
        "tuner/layer.py",
        "if alike and self._reads_residual(name)]",
        "if self._reads_residual(name)]",
        ("tuner/test_layer.py::test_an_adapter_on_a_residual_base_and_a_one_sided_one_add_up",),
    ),
    Mutant(
        "unit of an adapter taken from the base at hand",
        "tuner/adapter_file.py",
        "layer.take_unit(adapter, float(unit), own_scale=self.config.include_factors)",
        "pass",
        ("tuner/test_calibration.py::test_an_adapter_on_them_trains_is_saved_with_them_and_loads_without_data",),
    ),
    Mutant(
        "unit left out of the two-sided form",
        "tuner/layer.py",
        'return None if self.settings[adapter].unit == "one" else self.units[adapter]',
        "return None",
        ("tuner/test_layer.py::test_the_delta_weight_is_the_dense_reference",),
    ),
    Mutant(
        "unit counts the rank for the entries",
        "tuner/layer.py",
        "unit_of(length, pattern.count, pattern.rank)",
        "unit_of(length, pattern.rank, pattern.rank)",
        ("tuner/test_layer.py::test_the_delta_weight_is_the_dense_reference",),
    ),
    Mutant(
        "unit left out of the one-sided form",
        "tuner/layer.py",
        "return stored * self.units[adapter]",
        "return stored",
        ("tuner/test_layer.py::test_the_delta_weight_is_the_dense_reference",),
    ),
    Mutant(
        "what is given back has no gradient",
        "maths/dense_update.py",
        "through += times_transpose(g.to(h.dtype), ctx.E)",
        "pass",
        ("tuner/test_given_back.py",),
    ),
    Mutant(
        "what rounding took has the wrong sign",
        "tuner/given_back.py",
        "(W.to(held.device).float() - held.float())",
        "(held.float() - W.to(held.device).float())",
        ("tuner/test_given_back.py",),
    ),
    Mutant(
        "of another calibration the errors are those held already",
        "tuner/bases.py",
        "error = None if form.error is None else names[form.error]",
        "error = form.error",
        ("tuner/test_given_back.py",),
    ),
    Mutant(
        "a prepared directory for every adapter from data",
        "checkpoint/making/job.py",
        'return replace(self, config=None, given={"basis": "data", **said})',
        "return self",
        ("tuner/test_given_back.py",),
    ),
    Mutant(
        "the factors of a dense M in bf16",
        "tuner/config.py",
        "LEAN_BITS if lean else PAPER_BITS",
        "PAPER_BITS",
        ("tuner/test_forms.py",),
    ),
    Mutant(
        "the factors of the paper's patterns in int8",
        "tuner/config.py",
        'lean = self.base is None and (self.pattern == "dense" or self.basis == "data")',
        "lean = self.base is None",
        ("tuner/test_forms.py",),
    ),
    Mutant(
        "what the residual base leaves alone is not quantised",
        "storage/quantization.py",
        "left_alone = left_alone or name in left",
        "left_alone = left_alone or under(name, [*left])",
        ("test_prepare.py",),
    ),
    Mutant(
        "a card is fitted without what is given back",
        "prepare.py",
        "fields = with_basis(fields, calibration, residual)",
        "pass",
        ("tuner/test_given_back.py",),
    ),
    Mutant(
        "one learning rate for all, dense between singular vectors or not",
        "tuner/learning_rate.py",
        "return RATE_OF_WEIGHT if",
        "return RATE if",
        ("tuner/test_learning_rate.py",),
    ),
    Mutant(
        "calibration looks at the padding",
        "tuner/calibration.py",
        "return x[self._mask.bool()]",
        "pass",
        ("tuner/test_calibration.py::test_padding_is_not_looked_at",),
    ),
    Mutant(
        "an adapter on directions from data saved without them",
        "tuner/config.py",
        'self.include_factors or self.basis == "data"',
        "self.include_factors",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "an adapter saved before there was a unit gets one",
        "tuner/config.py",
        'self.unit = "weight" if self.base is None else "one"',
        'self.unit = "weight"',
        ("test_from_before.py",),
    ),
    Mutant(
        "NaN in a stored factor let through",
        "storage/factor_files.py",
        "if tensor.is_floating_point() and not all_finite(tensor):",
        "if False:",
        ("storage/test_factor_files.py",),
    ),
    Mutant(
        "fewer stored directions than asked for",
        "storage/factor_files.py",
        "StoredBasis(StoredMatrix(bits, size, parts)) if rows >= rank else None",
        "StoredBasis(StoredMatrix(bits, size, parts))",
        ("storage/test_factor_files.py",),
    ),
    Mutant(
        "stored lengths of other directions",
        "storage/factor_files.py",
        "return (s[:rank].to(device, copy=True)",
        "return (s[-rank:].to(device, copy=True)",
        ("storage/test_factor_files.py",),
    ),
    Mutant(
        "factors that an adapter brought along taken for the base's",
        "tuner/bases.py",
        "source is None or source is not sources.own)",
        "True)",
        ("tuner/test_self_contained.py::test_a_new_adapter_does_not_take_over_what_another_brought_along",),
    ),
    Mutant(
        "other factors put together with those held",
        "tuner/bases.py",
        "return all(torch.equal(a.to(b.device), b) for a, b in pairs)",
        "return True",
        ("tuner/test_self_contained.py::test_adapters_of_different_factors_stand_side_by_side",),
    ),
    Mutant(
        "factors of an adapter used on any weight",
        "tuner/sources.py",
        "if not difference <= TOLERANCE:",
        "if False:",
        ("tuner/test_self_contained.py::test_another_model_is_refused_by_a_layers_name",),
    ),
    Mutant(
        "factors left out of an adapter's digest",
        "tuner/self_contained.py",
        'return "".join(self._of_tensor(name, described) for name in names)',
        'return ""',
        ("tuner/test_self_contained.py::test_a_changed_factor_is_refused",),
    ),
    Mutant(
        "factors used without comparing the weights",
        "use_factors.py",
        "if difference <= TOLERANCE or",
        "if True or",
        ("tuner/test_stored_factors.py::test_use_factors_refuses_another_models_by_name",),
    ),
    Mutant(
        "all directions that are held stored with an adapter that reads fewer",
        "tuner/self_contained.py",
        "layer.basis(held), rank)",
        "layer.basis(held))",
        ("tuner/test_self_contained.py::test_an_adapter_of_a_smaller_rank_carries_no_more_than_it_reads",),
    ),
    Mutant(
        "an adapter saved with an option that is gone is read without it",
        "tuner/removed.py",
        "if name in saved and saved[name] not in harmless]",
        "if False]",
        ("tuner/test_removed.py",),
    ),
    Mutant(
        "an option that is gone is refused through our own class alone",
        "tuner/registration.py",
        'if saved.get("peft_type") == QSVFT or issubclass(cls, QSVFTConfig):',
        "if issubclass(cls, QSVFTConfig):",
        ("tuner/test_removed.py",),
    ),
    Mutant(
        "a directory prepared with an option that is gone is read without it",
        "checkpoint/prepared/quantizer.py",
        'recorded_fields(adapter or {}, "quantization_config")',
        "dict(adapter or {})",
        ("test_from_before.py::test_a_directory_of_an_option_that_is_gone_is_refused",),
    ),
    Mutant(
        "chunked loss shifts the labels the wrong way",
        "lean/chunked_loss.py",
        "F.pad(labels, (0, 1), value=ignore_index)[..., 1:]",
        "F.pad(labels, (0, 1), value=ignore_index)[..., :-1]",
        ("lean/test_chunked_loss.py::test_loss_and_gradients_are_the_models_own",),
    ),
    Mutant(
        "tokens that do not count get a gradient",
        "lean/cross_entropy.py",
        "weights = counts.to(scores.dtype).unsqueeze(1)",
        "weights = torch.ones_like(counts, dtype=scores.dtype).unsqueeze(1)",
        ("lean/test_cross_entropy.py::test_loss_and_gradients_are_those_of_the_plain_formula",),
    ),
    Mutant(
        "gradient of the loss scaled in fp16",
        "lean/cross_entropy.py",
        "result[part] = gradient[part].to(exact) * scale",
        "result[part] = gradient[part] * scale.to(gradient.dtype)",
        ("lean/test_cross_entropy.py::test_a_small_factor_from_above_is_not_rounded_to_fp16",),
    ),
    Mutant(
        "logits of a chunk live on beside their fp32 copy",
        "lean/cross_entropy.py",
        "    del logits\n",
        "",
        ("lean/test_cross_entropy.py::test_the_peak_is_that_of_one_chunk_and_the_stored_gradient",),
    ),
    Mutant(
        "slices of the head's gradient summed in bf16",
        "lean/vocabulary.py",
        "dtype=torch.promote_types(g.dtype, torch.float32))",
        "dtype=g.dtype)",
        ("lean/test_vocabulary.py",),
    ),
    Mutant(
        "a tied head held on its own",
        "lean/vocabulary.py",
        "if one is module or (weight is not None and any(p is weight for p in one.parameters(recurse=False)))",
        "if one is module",
        ("lean/test_vocabulary.py",),
    ),
    Mutant(
        "offloading sends weights away",
        "lean/offload.py",
        " and id(storage) not in self.held",
        "",
        ("lean/test_offload.py",),
    ),
    Mutant(
        "offloaded to the default device",
        "lean/offload.py",
        'device="cpu", pin_memory=self.pinned',
        "pin_memory=self.pinned",
        ("lean/test_offload.py",),
    ),
    Mutant(
        "offloading stays on after an error",
        "lean/offload.py",
        "_leave, always_call=True)",
        "_leave)",
        ("lean/test_offload.py",),
    ),
    Mutant(
        "recommendation without the allowance",
        "memory/fit/recommend.py",
        "key=lambda rung: fits(peak_of(rung), card_gib))",
        "key=lambda rung: peak_of(rung) <= card_gib * GIB)",
        ("memory/fit/test_recommend.py",),
    ),
    Mutant(
        "a step down that contradicts a fixed option",
        "memory/fit/ladder.py",
        "if step.option in rung.fixed or not",
        "if step.option in rung.fixed[1:] or not",
        ("memory/fit/test_recommend.py",),
    ),
    Mutant(
        "a fit that keeps only what was given",
        "memory/fit/options.py",
        "    return {**options, **found.options}\n",
        "    return dict(options)\n",
        ("memory/fit/test_options.py",),
    ),
    Mutant(
        "the factors of a prepared directory up for choice",
        "loading.py",
        "{**_fixed(record), **options}",
        "options",
        ("memory/fit/test_options.py",),
    ),
    Mutant(
        "all processes prepare into the cache at once",
        "checkpoint/making/cache.py",
        'lock = FileLock(locks / f"{folder.name}.lock")',
        'lock = FileLock(locks / f"{folder.name}-{os.getpid()}.lock")',
        ("test_loading.py",),
    ),
    Mutant(
        "GB read as GiB",
        "memory/fit/options.py",
        '"gb": 10**9',
        '"gb": GIB',
        ("memory/fit/test_options.py",),
    ),
    Mutant(
        "plain attributes not counted",
        "memory/held.py",
        "_gradients(model), _unregistered(model))",
        "_gradients(model))",
        ("memory/test_description.py",),
    ),
    Mutant(
        "logits read without gradients lose their graph",
        "lean/deferred_logits.py",
        "with torch.enable_grad():",
        "with nullcontext():",
        ("lean/test_chunked_loss.py::test_logits_that_are_read_are_the_models_with_their_graph",),
    ),
    Mutant(
        "a name given twice in a checkpoint's header",
        "storage/json_files.py",
        "if len(result) < len(pairs):",
        "if len(result) > len(pairs):",
        ("storage/test_headers.py::test_a_name_given_twice_is_refused",),
    ),
    Mutant(
        "an index that names a file elsewhere",
        "storage/tensor_index.py",
        """ and not set(name) & set("/\\\\:\\0")""",
        "",
        ("checkpoint/source/test_checkpoint.py::test_an_index_cannot_name_a_file_elsewhere",),
    ),
    Mutant(
        "a shard that changed is read",
        "checkpoint/source/checkpoint.py",
        "self._check_unchanged(entry.file)",
        "_ = entry.file",
        ("checkpoint/source/test_checkpoint.py::test_a_file_that_changed_is_not_read",),
    ),
    Mutant(
        "a checkpoint's weights stay in the dtype that they are stored in",
        "checkpoint/source/pieces.py",
        "checkpoint.read(key).to(dtype)",
        "checkpoint.read(key)",
        ("checkpoint/source/test_names.py",),
    ),
    Mutant(
        "what is kept in fp32 read in 16 bits",
        "checkpoint/source/architecture.py",
        "tensor.data = tensor.data.to(torch.float32)",
        "tensor.data = tensor.data.to(dtype)",
        ("checkpoint/source/test_names.py",),
    ),
    Mutant(
        "tied weights that differ read as one",
        "checkpoint/source/tied.py",
        "and not _same(",
        "and _same(",
        ("checkpoint/source/test_names.py",),
    ),
    Mutant(
        "parameters that no key gives",
        "checkpoint/source/names.py",
        "if holder not in given and",
        "if holder not in held and",
        ("checkpoint/source/test_names.py",),
    ),
    Mutant(
        "calibration fits wherever its lack does",
        "memory/fit/recommend.py",
        "fits(calibrated_peak, card_gib)",
        "fits(peak, card_gib)",
        ("memory/fit/test_recommend.py",),
    ),
    Mutant(
        "a token past the last is trained",
        "tuner/names.py",
        "if max(ids) >= len(weight):",
        "if max(ids) > len(weight):",
        ("tuner/test_trained_tokens.py",),
    ),
    Mutant(
        "rows of one weight are trained apart",
        "tuner/names.py",
        "if tied and len(",
        "if not tied and len(",
        ("tuner/test_trained_tokens.py",),
    ),
    Mutant(
        "calibration looks at what attention drops",
        "tuner/calibration.py",
        """(name == "p" and "Dropout" in type(module).__name__) or "drop" in name""",
        """"drop" in name""",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "U is what a head that was drawn at random asks for",
        "tuner/calibration.py",
        "_Watch(layers, config, has_new_head(model, config))",
        "_Watch(layers, config, False)",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "a vocabulary that trains whole is a new head",
        "tuner/tasks.py",
        "if getter is not None and getter() is not None:",
        "if getter is None:",
        ("tuner/test_calibration.py",),
    ),
    Mutant(
        "a slow pattern is left to run",
        "tuner/slow_patterns.py",
        "len(_REPEAT.findall(text)) > 1",
        "len(_REPEAT.findall(text)) > 99",
        ("tuner/test_slow_patterns.py",),
    ),
    Mutant(
        "a pipe in place of a config is passed over",
        "loading.py",
        "if os.path.lexists(folder / name):",
        "if (folder / name).is_file():",
        ("fuzz/test_special_files.py",),
    ),
    Mutant(
        "a pipe beside a checkpoint is passed over",
        "checkpoint/making/streaming.py",
        "for path in folder.glob(pattern)})",
        "for path in folder.glob(pattern) if path.is_file()})",
        ("fuzz/test_special_files.py",),
    ),
    Mutant(
        "rows of no whole blocks are read as they were",
        "storage/blocks_over_rows.py",
        "[1, prod(shape)]",
        "shape",
        ("storage/test_blocks_over_rows.py",),
    ),
    Mutant(
        "the offset of double quantisation summed in fp32",
        "storage/nf4.py",
        "offset = _mean(absmax)",
        "offset = absmax.mean()",
        ("storage/test_nf4.py",),
    ),
    Mutant(
        "a card quantises in a CPU's stretches",
        "storage/nf4.py",
        "_LAUNCH = 2**30",
        "_LAUNCH = 2**18",
        ("storage/test_nf4.py",),
    ),
    Mutant(
        "a number at a threshold takes the upper code",
        "storage/nf4.py",
        "numpy.greater(scaled, threshold, out=above)",
        "numpy.greater_equal(scaled, threshold, out=above)",
        ("storage/test_nf4.py",),
    ),
    Mutant(
        "a part is written under its own name at once",
        "storage/whole_files.py",
        'temporary = staging / f"{path.name}-{os.getpid()}"',
        "temporary = path",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "parts of another plan are taken for finished",
        "checkpoint/making/directory.py",
        '(metadata.get("qsvft_unit"), metadata.get("qsvft_plan")) != (unit, self.plan)',
        'metadata.get("qsvft_unit") != unit',
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "finished parts are done again",
        "checkpoint/making/streaming.py",
        "if unit.name not in records]",
        "]",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "another source of the same shapes is not noticed",
        "checkpoint/making/streaming.py",
        "if source_digest(units[name], job.checkpoint, job.source_model) != record.source:",
        "if False:",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "a source that changes while it is read is not noticed",
        "checkpoint/making/job.py",
        "        self.checkpoint.check_unchanged()\n",
        "",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "factors of the weight before it is quantised",
        "checkpoint/making/work.py",
        """            layer = quantized_linear(layer, options.bits)
            written |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.state_dict().items()}
""",
        """            made = quantized_linear(layer, options.bits)
            written |= {f"{name}.{leaf}": tensor for leaf, tensor in made.state_dict().items()}
""",
        ("checkpoint/making/test_streaming.py",),
    ),
    Mutant(
        "what has to be decomposed is not refused",
        "loading.py",
        "if held < stored.rank:",
        "if False:",
        ("test_loading.py",),
    ),
    Mutant(
        "a fresh head is loaded as a layer of 4 bits",
        "checkpoint/prepared/quantizer.py",
        "[name for name, shape in held.items() if shape is None]",
        '[name for name in held if name == "lm_head"]',
        ("test_loading.py",),
    ),
    Mutant(
        "a prepared directory is not compared with its digests",
        "checkpoint/prepared/quantizer.py",
        "prepared.check()",
        "pass",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "factors of a damaged directory are used",
        "use_factors.py",
        "prepared.check()",
        "pass",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "a tensor that is missing from a prepared directory is not noticed",
        "checkpoint/prepared/check.py",
        "if missing := self.records.keys() - self.entries.keys():",
        "if missing := set():",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "dtypes of a prepared directory may be relabelled",
        "checkpoint/prepared/check.py",
        "if (DTYPE_NAMES[entry.dtype], list(entry.shape)) != (dtype, list(shape)):",
        "if list(entry.shape) != list(shape):",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "a prepared directory's config may be another",
        "checkpoint/prepared/check.py",
        "if found is not None and any(one != found for one in known):",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "values of a prepared directory are not compared",
        "checkpoint/prepared/check.py",
        "if tensor_sha256(self.files.mapped(name)) != self.records[name].sha256:",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "files of two preparations go together",
        "checkpoint/prepared/check.py",
        "if other is not None:",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "another blocksize is taken for the format's",
        "checkpoint/prepared/check.py",
        "if state.get(field) != expected:",
        "if field not in state:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "parts of a quantised weight may be missing",
        "checkpoint/prepared/check.py",
        'raise self._wrong("", f"no {name}", "every part of a quantised weight")',
        "return",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "a quantised weight may have another shape than the model",
        "checkpoint/prepared/quantizer.py",
        "if found is not None and found != expected:",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "a finished part with other values is kept",
        "checkpoint/making/directory.py",
        "held.check(values=True)",
        "held.check()",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "verify compares nothing",
        "loading.py",
        "if verify:",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "values narrower than keys are given to the kernel as they are",
        "memory/attention.py",
        "if width < key.shape[-1]:",
        "if False:",
        ("memory/test_attention.py",),
    ),
    Mutant(
        "every architecture is asked for the attention by its name",
        "memory/attention.py",
        "if kind._supports_attention_backend else {}",
        "if True else {}",
        ("memory/test_attention.py",),
    ),
    Mutant(
        "a boolean mask is added as it is",
        "memory/attention.py",
        ".masked_fill_(~attn_mask, -torch.inf)",
        "",
        ("memory/test_attention.py",),
    ),
    Mutant(
        "an adapter's damaged config is left to its reader",
        "tuner/registration.py",
        "read_object(Path(path_json_file))",
        "pass",
        ("fuzz/test_damaged_files.py",),
    ),
    Mutant(
        "an adapter of no known type is a KeyError",
        "tuner/registration.py",
        "if not isinstance(found, str) or found not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:",
        "if False:",
        ("fuzz/test_damaged_files.py",),
    ),
    Mutant(
        "a model's damaged JSON is left to its reader",
        "loading.py",
        "_check_json(Path(path_or_id))",
        "pass",
        ("fuzz/test_damaged_files.py",),
    ),
    Mutant(
        "a million layers are built",
        "checkpoint/source/architecture.py",
        "if isinstance(count, int) and count > len(checkpoint.entries):",
        "if False:",
        ("checkpoint/source/test_architecture.py::test_more_layers_than_tensors_are_refused_before_they_are_built",),
    ),
    Mutant(
        "a model is built before its config is compared",
        "loading.py",
        "if record and os.path.isdir(path_or_id):",
        "if False:",
        ("checkpoint/prepared/test_check.py",),
    ),
    Mutant(
        "a layer's number that is not there is passed over",
        "tuner/targets.py",
        "_check_layers(wanted, names)",
        "pass",
        ("tuner/test_misspelt_names.py",),
    ),
    Mutant(
        "heads that train whole are adapted as well",
        "tuner/targets.py",
        'if not any(one.endswith(heads) for one in name.split("."))',
        "if True",
        ("tuner/test_tasks.py",),
    ),
    Mutant(
        "noise in M is as large for every alpha",
        "tuner/layer.py",
        "size = _NOISE * float(frobenius_norm(weight)) / self.units[adapter_name]",
        "size = _NOISE",
        ("tuner/test_layer.py",),
    ),
    Mutant(
        "a state dict without a directory is not refused",
        "checkpoint/prepared/quantizer.py",
        "if not files:",
        "if False:",
        ("test_loading.py",),
    ),
    Mutant(
        "adapters are saved with the base",
        "checkpoint/prepared/model_state.py",
        'if any(part.startswith("qsvft_") for part in parts) or "modules_to_save" in parts:',
        'if "modules_to_save" in parts:',
        ("test_loading.py",),
    ),
    Mutant(
        "tensors of a written file in the order of their names",
        "storage/tensor_writer.py",
        "key=lambda item: (-_divisor(item[1].nbytes), item[0])",
        "key=lambda item: item[0]",
        ("storage/test_tensor_writer.py",),
    ),
    Mutant(
        "the data of a written file begin anywhere",
        "storage/tensor_writer.py",
        'text += b" " * (-(8 + len(text)) % ALIGNMENT)',
        "pass",
        ("storage/test_tensor_writer.py",),
    ),
    Mutant(
        "numbers at odd addresses are left in a model in memory",
        "prepare.py",
        "align_tensors(model, odd_only=True)",
        "pass",
        ("anywhere/test_files.py",),
    ),
    Mutant(
        "a model in memory is moved though it lies well enough",
        "maths/aligned.py",
        "multiple = tensor.element_size() if odd_only else ALIGNMENT",
        "multiple = ALIGNMENT",
        ("anywhere/test_files.py",),
    ),
    Mutant(
        "quantisation states stay where they lie",
        "storage/alignment.py",
        '_move_attributes(state, ("absmax", "code", "offset"), moved)',
        "pass",
        ("storage/test_alignment.py",),
    ),
    Mutant(
        "a weight is decomposed where it lies",
        "maths/decomposition.py",
        "yield from map(aligned, weight.split(rows))",
        "yield from weight.split(rows)",
        ("anywhere/test_addresses.py",),
    ),
    Mutant(
        "a probe in fp32",
        "tuner/layer.py",
        "x = fixed_noise(self.in_features, 1, weight.device).unsqueeze(0)",
        "x = fixed_noise(self.in_features, 1, weight.device).float().unsqueeze(0)",
        ("tuner/test_probe.py",),
    ),
    Mutant(
        "a sketch in fp32",
        "tuner/probe.py",
        "x = fixed_noise(weight.shape[1], 1, weight.device).unsqueeze(0)",
        "x = fixed_noise(weight.shape[1], 1, weight.device).float().unsqueeze(0)",
        ("tuner/test_probe.py",),
    ),
    Mutant(
        "a probe keeps the bits that depend on the order of sums",
        "tuner/probe.py",
        "return (bits + half & -(1 << _DROPPED)).view(torch.float32)",
        "return bits.view(torch.float32)",
        ("tuner/test_probe.py",),
    ),
    Mutant(
        "lengths measured in fp32",
        "storage/factors.py",
        "weight.T, torch.float64, _STRETCH)",
        "weight.T, torch.float32, _STRETCH)",
        ("storage/test_factors.py",),
    ),
    Mutant(
        "the map of double quantisation as torch spaces it out here",
        "storage/nf4.py",
        "code = dynamic_map().to(absmax.device)",
        "code = None",
        ("anywhere/test_other_processors.py",),
    ),
    Mutant(
        "the map of double quantisation rounded twice",
        "storage/dynamic_map.py",
        "from_first, from_last = float(first) + step * index,",
        "from_first, from_last = first + numpy.float32(step) * index.astype(numpy.float32),",
        ("storage/test_dynamic_map.py",),
    ),
)


@dataclass(frozen=True)
class Outcome:
    """``caught_by`` names the first test that failed; ``trouble`` says what else went wrong."""

    caught_by: str | None
    trouble: str | None
    seconds: float


def run(mutant: Mutant | None, tests: tuple[str, ...]) -> Outcome:
    """Run test files against a copy of the package, with one bug or with none."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qsvft-mutant-") as folder:
        copy = Path(folder)
        leave = shutil.ignore_patterns("__pycache__", ".*")
        shutil.copytree(ROOT / "qsvft", copy / "qsvft", ignore=leave)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=leave)
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "copy_guard.py").write_text(GUARD, encoding="utf-8")
        if mutant is not None:
            mutant.apply(copy / "qsvft")
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "copy_guard", "-p", "no:cacheprovider"]
            + [f"tests/{name}" for name in tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    output = process.stdout + process.stderr
    failed = re.search(r"^FAILED tests/(\S+)", output, re.MULTILINE)
    caught_by = failed.group(1) if process.returncode == 1 and failed else None
    trouble = None if process.returncode == 0 or caught_by else "\n".join(output.splitlines()[-25:])
    return Outcome(caught_by, trouble, time.monotonic() - start)


def run_all(mutants: list[Mutant], jobs: int) -> Iterator[tuple[Mutant, Outcome]]:
    """Each mutant with its outcome, as they finish."""
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(run, mutant, mutant.tests): mutant for mutant in mutants}
        for future in as_completed(pending):
            yield pending[future], future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run only mutants with this text in their name")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default 2)")
    arguments = parser.parse_args()
    console = Console()
    mutants = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    if not mutants:
        console.print(f"[red]no mutant has '{arguments.only}' in its name[/red]")
        return 1

    files = tuple(sorted({name for mutant in mutants for name in mutant.tests}))
    console.print(f"without a bug: {len(files)} test files (or single tests) must pass ...")
    baseline = run(None, files)
    if baseline.caught_by or baseline.trouble:
        console.print(f"[red]the tests fail without any mutant:[/red] {baseline.caught_by or ''}")
        console.print(baseline.trouble or "", markup=False)
        return 1

    console.print(f"they pass ({baseline.seconds:.0f} s); {len(mutants)} mutants ...")
    outcomes: dict[str, Outcome] = {}
    for mutant, outcome in run_all(mutants, arguments.jobs):
        outcomes[mutant.name] = outcome
        verdict = "broken" if outcome.trouble else "caught" if outcome.caught_by else "SURVIVED"
        console.print(f"{len(outcomes):3}/{len(mutants)}  {verdict:8}  {mutant.name} ({outcome.seconds:.0f} s)")
    return report(console, mutants, outcomes)


def report(console: Console, mutants: list[Mutant], outcomes: dict[str, Outcome]) -> int:
    """Print the table; 1 if a mutant survived or a run broke."""
    table = Table(title="Mutants", header_style="bold")
    for heading in ("bug", "in", "caught by"):
        table.add_column(heading, overflow="fold")
    caught = 0
    for mutant in mutants:
        outcome = outcomes[mutant.name]
        caught += outcome.caught_by is not None
        verdict = "[red]run broke[/red]" if outcome.trouble else "[red]nothing: it survives[/red]"
        cell = verdict if outcome.caught_by is None else outcome.caught_by.split("::")[-1].replace("[", r"\[")
        table.add_row(mutant.name, mutant.file, cell)
    console.print(table)
    for mutant in mutants:
        if trouble := outcomes[mutant.name].trouble:
            console.print(f"[red]{mutant.name}[/red]")
            console.print(trouble, markup=False)
    console.print(f"{caught} of {len(mutants)} caught")
    return 0 if caught == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
