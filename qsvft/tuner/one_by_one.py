"""An adapter's layers one after another, each checked as loading checks it, without the model that they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..storage.factor_files import FactorSource
from ..storage.tensor_files import TensorFiles
from .adapter_file import AdapterReader
from .config import QSVFTConfig
from .layer import QSVFTLinear
from .peft_type import PREFIX
from .sources import Sources, sources_of, weights_file
from .tasks import whole

ADAPTER = "default"
_M = ".qsvft_M.weight"


class SavedAdapter:
    """An adapter as it was saved.

    Args:
        config: read from its folder.

    Raises:
        ValueError: it has no file of weights, or that is damaged or holds no M.
    """

    def __init__(self, config: QSVFTConfig) -> None:
        path = weights_file(*config.where_read) if config.where_read is not None else None
        if path is None:
            where = config.where_read[0] if config.where_read is not None else "the adapter"
            raise ValueError(f"{where}: found no adapter_model.safetensors; expected a saved adapter's folder.")
        files = TensorFiles.from_file(path)
        held = (config.base or {}).get("weights")
        self.config, self.path = config, path
        self._reader = AdapterReader({name: files.read(name) for name in files.paths}, config, {"weights": held})
        self._sources = sources_of(config, nn.Module())
        parameters = self._reader.parameters
        self.names = [key.removeprefix(PREFIX).removesuffix(_M) for key in parameters if key.endswith(_M)]
        """Of its layers, in the model."""
        if not self.names:
            raise ValueError(f"{path}: found no M in it; expected one a layer. Save the adapter again.")
        self.trained_whole = {key: tensor for key, tensor in parameters.items() if is_whole(key, config)}
        """What trains beside M, by its keys in the file: modules, biases, rows of embeddings."""

    def layers(
        self,
        base: Callable[[str], nn.Module],
        factors: FactorSource | None = None,
        order: Sequence[str] | None = None,
    ) -> Iterator[tuple[str, QSVFTLinear]]:
        """Each layer with its M, on its base; what binds all of them is checked after the last.

        Args:
            base: gives a layer's base by its name.
            factors: where factors are that the adapter does not bring along.
            order: of the layers' names; None as they are in the file.

        Raises:
            ValueError: what loading the adapter refuses.
        """
        sources = Sources(self._sources.own, None, factors)
        digests: dict[str, Tensor] = {}
        here: dict[str, bytes] = {}
        for name in self.names if order is None else order:
            layer = QSVFTLinear(base(name), ADAPTER, self.config, name, sources)
            digests[name], here[name] = self._reader.check_layer(name, layer, ADAPTER), layer.base_digest
            with torch.no_grad():
                layer.M(ADAPTER).copy_(self._reader.coefficients(name))
            yield name, layer
        self._reader.check_whole(digests, self.trained_whole, ADAPTER)
        self._reader.say_other_base(here)


def is_whole(key: str, config: QSVFTConfig) -> bool:
    """Whether a saved adapter's tensor is one that trains beside M: of a module, a bias, rows of embeddings."""
    if ".qsvft_" in key:
        return False
    # What is tied to a module that trains whole is not named, and trains with it.
    named = config.ensure_weight_tying or any(f".{name}." in f".{key}" for name in whole(config))
    return named or ".token_adapter." in key or (config.bias != "none" and key.endswith(".bias"))
