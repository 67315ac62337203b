"""An adapter merged into its base, a decoder layer at a time: what is in memory is a file of a gibibyte, not the model.

    W + dW in fp32, rounded once to the dtype of the file

The files hold a model as its class saves it, so that everything reads them that reads its checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import tqdm

from ..checkpoint.making.job import give_memory_back
from ..checkpoint.making.streaming import companions
from ..checkpoint.source.renames import as_in_checkpoints
from ..checkpoint.source.tied import holders
from ..storage.factors import frobenius_norm
from ..storage.tensor_index import INDEX_NAME, SINGLE_NAME, first_few
from ..storage.tensor_writer import write_tensors
from ..storage.weights import all_finite, dense_layer, dense_weight, dtype_name
from ..storage.whole_files import check_room
from ..tuner.layer import QSVFTLinear
from ..tuner.lora_factors import lora_factors
from ..tuner.one_by_one import ADAPTER, SavedAdapter
from .base import Base
from .exported import Errors, Exported

SHARD_BYTES = 2**30
"""A file is closed when it holds so much."""

_PREFIX, _TOKENS = "base_model.model.", ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class _Group:
    """Tensors that are made and written together.

    Attributes:
        names: in the model's state.
        layers: the adapted layers among them.
        nbytes: how much is written.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...]
    nbytes: int


class Dense:
    """A merged model in the making.

    Args:
        saved: the adapter.
        base: its base.
        onto: "held": W as the adapter had it; "original": as it was before it was rounded.
        dtype: of what is written; None as the base has it.

    Raises:
        ValueError: the base lacks a tensor; there is no original.
    """

    def __init__(self, saved: SavedAdapter, base: Base, onto: str, dtype: torch.dtype | None) -> None:
        if onto == "original" and base.original is None:
            raise ValueError(
                f"{base.folder}: holds its weights in {base.bits} bits; expected those before they were rounded, for "
                "onto='original'. Give the checkpoint that it was prepared from: base= (--base on the command line)."
            )
        self._saved, self._base, self._onto, self._dtype = saved, base, onto, dtype
        self.dtype = dtype if dtype is not None else base.dtype
        self._model = base.empty(self.dtype)
        self._state: dict[str, Tensor] = self._model.state_dict(keep_vars=True)
        self._holders = holders(self._model)
        self._own = {_name(key): tensor for key, tensor in saved.trained_whole.items() if not key.endswith(_TOKENS)}
        self._rows = {_name(key): tensor for key, tensor in saved.trained_whole.items() if key.endswith(_TOKENS)}
        self._parts: dict[str, list[str]] = {}
        for layer, parameter in base.experts.items():
            self._parts.setdefault(parameter, []).append(layer)
        self._groups = self._grouped(self._written())
        self._layers: Iterator[tuple[str, QSVFTLinear]] = iter(())
        self._errors = Errors()

    def write(self, folder: Path, progress: bool) -> Exported:
        """Write all files of the model, and say how far off they are."""
        shards = self._shards()
        check_room(folder, sum(group.nbytes for group in self._groups))
        order = [layer for group in self._groups for layer in group.layers]
        self._layers = self._saved.layers(self._base.layer, self._base.factors, order)
        files: dict[str, str] = {}
        total = 0
        with tqdm(total=len(self._groups), desc="merging", unit="part", disable=not progress) as bar:
            for number, shard in enumerate(shards):
                tensors: dict[str, Tensor] = {}
                for group in shard:
                    tensors |= self._converted(dict(self._made(group)))
                    bar.update()
                file = SINGLE_NAME
                if len(shards) > 1:
                    file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
                files |= dict.fromkeys(tensors, file)
                total += sum(tensor.nbytes for tensor in tensors.values())
                write_tensors(tensors, folder / file, {"format": "pt"})
                del tensors
                give_memory_back()
        if (more := next(self._layers, None)) is not None:
            raise AssertionError(f"{more[0]}: was not merged")
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._write_config(folder)
        return self.found(folder)

    def found(self, folder: Path) -> Exported:
        """What was written there."""
        return Exported(
            folder,
            "dense",
            self._onto,
            str(dtype_name(self.dtype)),
            len(self._saved.names),
            error=self._errors.error,
            worst=self._errors.worst,
            of_weights=self._errors.of_weights,
            moved=self._errors.moved,
        )

    def _written(self) -> list[str]:
        """The names of what is written: of tied weights one, unless they have come apart."""
        tied: dict[str, str] = self._model.all_tied_weights_keys
        names = [name for name in self._state if name not in tied or self._apart(name, tied[name])]
        if unknown := sorted(self._own.keys() - self._state.keys() - self._expert_biases()):
            raise ValueError(
                f"{self._saved.path}: the adapter brings {first_few(unknown)}, which {type(self._model).__name__} has "
                "not; expected the model that it was trained on. Give its base."
            )
        if missing := [name for name in names if not self._known(name)]:
            raise ValueError(
                f"{self._base.folder}: the base lacks {len(missing)} tensors of {type(self._model).__name__}, such as "
                f"{first_few(missing)}; expected all of them, or an adapter that brings them. Give the base that the "
                "adapter was trained on, or prepare the checkpoint again."
            )
        return names

    def _apart(self, name: str, other: str) -> bool:
        if name in self._own or other in self._own:
            return name not in self._own or other not in self._own or not torch.equal(self._own[name], self._own[other])
        return self._base.has(name) and self._base.has(other)

    def _known(self, name: str) -> bool:
        parts = self._parts.get(name) or self._parts.get(name.removesuffix("_bias"))
        return name in self._own or parts is not None or self._stored(name) is not None

    def _expert_biases(self) -> set[str]:
        return {f"{layer}.bias" for layer in self._base.experts}

    def _stored(self, name: str) -> str | None:
        """The name under which the directory has a tensor, its own or that of the one that it is tied to."""
        return next((one for one in (name, self._holders.get(name, name)) if self._base.has(one)), None)

    def _grouped(self, names: Sequence[str]) -> list[_Group]:
        """Decoder layers, and other modules, each by itself, where they are converted each by itself."""
        apart: dict[str, list[str]] = {}
        for name in names:
            apart.setdefault(_place(name), []).append(name)
        converted = [self._shapes(group) for group in apart.values()]
        whole = self._shapes(names)
        if {name: shape for one in converted for name, shape in one.items()} != whole:
            return [self._group(names, whole)]
        return [self._group(group, shapes) for group, shapes in zip(apart.values(), converted, strict=True)]

    def _shapes(self, names: Sequence[str]) -> dict[str, tuple[torch.Size, int]]:
        made = self._converted({name: self._state[name].detach() for name in names})
        return {name: (tensor.shape, tensor.nbytes) for name, tensor in made.items()}

    def _group(self, names: Sequence[str], shapes: dict[str, tuple[torch.Size, int]]) -> _Group:
        modules = {name.rpartition(".")[0] for name in names}
        here = {*modules, *(layer for name in names for layer in self._parts.get(name, ()))}
        layers = tuple(layer for layer in self._saved.names if layer in here)
        return _Group(tuple(names), layers, sum(nbytes for _, nbytes in shapes.values()))

    def _shards(self) -> list[list[_Group]]:
        shards: list[list[_Group]] = [[]]
        held = 0
        for group in self._groups:
            if shards[-1] and held + group.nbytes > SHARD_BYTES:
                shards.append([])
                held = 0
            shards[-1].append(group)
            held += group.nbytes
        return shards

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: one.contiguous() for name, one in as_in_checkpoints(self._model, tensors).items()}

    def _made(self, group: _Group) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a group, by their names in the model."""
        merged: dict[str, Tensor] = {}
        for name, layer in islice(self._layers, len(group.layers)):
            merged |= self._merged(name, layer)
        for name in group.names:
            if name in merged:
                tensor = merged.pop(name)
            elif name in self._parts:
                tensor = self._stacked(name, merged)
            elif name.removesuffix("_bias") in self._parts:
                leaves = [f"{layer}.bias" for layer in self._parts[name.removesuffix("_bias")]]
                tensor = torch.stack([merged[leaf] if leaf in merged else self._plain(leaf) for leaf in leaves])
            else:
                tensor = self._plain(name)
            yield name, self._with_rows(name, tensor)

    def _merged(self, name: str, layer: QSVFTLinear) -> dict[str, Tensor]:
        """W + dW of an adapted layer, and its bias."""
        held = layer.original_base()
        if self._onto == "held":
            W = layer.original_weight()
            wanted = layer.merged_weight([ADAPTER])
            plain = dense_layer(held, wanted, self._dtype)
        else:
            W = self._base.original_weight(name)
            B, A = lora_factors(layer, ADAPTER, given_back=False)
            wanted = W.float() + B @ A
            moved = wanted - layer.merged_weight([ADAPTER])
            self._errors.add_move(float(frobenius_norm(moved)), float(frobenius_norm(W.float())))
            plain = dense_layer(held, wanted, self._dtype if self._dtype is not None else W.dtype)
        written = plain.get_parameter("weight").detach()
        written = written.t() if isinstance(plain, Conv1D) else written
        if not all_finite(written):
            raise ValueError(
                f"{name}: W + dW holds numbers that {dtype_name(written.dtype)} has not; expected finite ones. Use "
                "dtype='bfloat16' or 'float32'."
            )
        change = float(frobenius_norm(wanted - W.float()))
        off, size = float(frobenius_norm(written.float() - wanted)), float(frobenius_norm(wanted))
        self._errors.add(name, off, change, size)
        named = ((f"{name}.{leaf}", tensor.detach()) for leaf, tensor in plain.named_parameters())
        return {key: self._plain(key) if key in self._own else tensor for key, tensor in named}

    def _stacked(self, parameter: str, merged: dict[str, Tensor]) -> Tensor:
        """A parameter of experts, of its layers."""
        experts: Any = self._model.get_submodule(parameter.rpartition(".")[0])
        stack: Tensor | None = None
        for number, layer in enumerate(self._parts[parameter]):
            leaf = f"{layer}.weight"
            one = merged.pop(leaf) if leaf in merged else self._plain(leaf)
            one = one.t() if experts.is_transposed else one
            if stack is None:
                stack = one.new_empty(len(self._parts[parameter]), *one.shape)
            stack[number] = one
        assert stack is not None
        return stack

    def _plain(self, name: str) -> Tensor:
        """A tensor of no adapted layer."""
        if name in self._own:
            return self._cast(name, self._own[name])
        module, _, leaf = name.rpartition(".")
        if self._onto == "original":
            assert self._base.original is not None
            if module in self._base.experts:
                return self._cast(name, self._base.original_part(module, leaf))
            if self._base.original.known(name) is not None:
                return self._cast(name, self._base.original.tensor(name))
        if leaf in ("weight", "bias") and self._base.is_quantised(module):
            if leaf == "bias":
                return self._base.tensor(name).to(self.dtype)
            layer = self._base.layer(module)
            weight = dense_weight(layer)
            assert weight is not None
            return dense_layer(layer, weight, self._dtype).get_parameter("weight").detach()
        stored = self._stored(name) or name
        return self._cast(name, self._base.tensor(stored))

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        if self._dtype is None or not tensor.is_floating_point():
            return tensor
        return tensor.to(self._state[name].dtype if name in self._state else self._dtype)

    def _with_rows(self, name: str, tensor: Tensor) -> Tensor:
        """An embedding with the rows that the adapter trained."""
        rows = self._rows.get(name)
        if rows is None:
            return tensor
        tokens = self._saved.config.trainable_token_indices
        if isinstance(tokens, dict):
            tokens = next(found for one, found in tokens.items() if f".{name}".endswith(f".{one}.weight"))
        return tensor.index_copy(0, torch.tensor(tokens), rows.to(tensor.dtype))

    def _write_config(self, folder: Path) -> None:
        config = self._base.config
        config.architectures = [type(self._model).__name__]
        config.dtype = self.dtype
        if any(name in self._model.all_tied_weights_keys for group in self._groups for name in group.names):
            config.tie_word_embeddings = False  # what was tied is not the same any more
        config.save_pretrained(folder)
        for path in companions(self._base.folder):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def _name(key: str) -> str:
    """What a saved adapter's tensor is called in the model."""
    name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
    return f"{name.removesuffix(_TOKENS)}.weight" if name.endswith(_TOKENS) else name


def _place(name: str) -> str:
    """The numbered layer that a tensor is in, or else its module."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: number + 1] if number is not None else parts[:-1])
