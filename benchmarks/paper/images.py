"""Images with a class: CIFAR-100, Flowers102, Food101, RESISC45."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification

from .experiment import Data
from .labelled import Labelled, column_of
from .shapes import part_of, shape_of


class Images(Labelled):
    """See :class:`benchmarks.paper.labelled.Labelled`."""

    auto = AutoModelForImageClassification

    @cached_property
    def processor(self) -> Any:
        """The base's: sizes and colours."""
        with part_of(self.experiment.model, "image processor"):
            return AutoImageProcessor.from_pretrained(self.experiment.model)

    def read(self, rows: Dataset, data: Data) -> Dataset:
        """Pixels and labels, made as they are asked for."""
        processor, image, label = self.processor, column_of(data, "image"), column_of(data, "label")
        missing = [name for name in (image, label) if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"columns: found no {', '.join(missing)} in {data.dataset!r}; expected some of "
                f"{', '.join(rows.column_names)}"
            )

        def pixels(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
            found = processor([one.convert("RGB") for one in batch[image]], return_tensors="pt")
            return {"pixel_values": found["pixel_values"], "labels": [self.label(value) for value in batch[label]]}

        return rows.with_transform(pixels)

    def lengths(self, most: int) -> list[int]:
        """Patches and the class token of an image, all alike."""
        config = shape_of(self.experiment)
        return [(config.image_size // config.patch_size) ** 2 + 1]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows as a batch."""
        return {
            "pixel_values": torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    def example(self, config: Any, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        """A batch without values."""
        shape = (batch_size, config.num_channels, config.image_size, config.image_size)
        labels = torch.zeros(batch_size, dtype=torch.long, device="meta")
        return {"pixel_values": torch.empty(shape, dtype=torch.bfloat16, device="meta"), "labels": labels}
