"""Sentences, or pairs of them, with a class or a number: GLUE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from qsvft.training.plan import base_tokenizer

from .experiment import Data
from .labelled import Labelled, column_of

MAX_LENGTH = 256


class Sentences(Labelled):
    """See :class:`benchmarks.paper.labelled.Labelled`."""

    task_type = "SEQ_CLS"
    auto = AutoModelForSequenceClassification

    @cached_property
    def tokenizer(self) -> Any:
        """The base's."""
        return base_tokenizer(self.experiment.model)

    def read(self, rows: Dataset, data: Data) -> Dataset:
        """Token ids and labels."""
        texts, label = column_of(data, "text"), column_of(data, "label")
        texts = [texts] if isinstance(texts, str) else list(texts)
        missing = [name for name in (*texts, label) if name not in rows.column_names]
        if missing:
            raise ValueError(
                f"columns: found no {', '.join(missing)} in {data.dataset!r}; expected some of "
                f"{', '.join(rows.column_names)}"
            )
        most = self.experiment.training.get("max_length", MAX_LENGTH)

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            read = self.tokenizer(*(row[text] for text in texts), truncation=True, max_length=most)
            return {**read, "labels": self.label(row[label])}

        return rows.map(encode, remove_columns=rows.column_names, desc="Tokens")

    def lengths(self, most: int) -> list[int]:
        """Tokens of the first rows."""
        return [len(row["input_ids"]) for row in self.rows.select(range(min(most, len(self.rows))))]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Rows padded to the longest."""
        read = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = dict(self.tokenizer.pad(read, return_tensors="pt"))
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}

    def example(self, config: Any, batch_size: int, length: int) -> dict[str, torch.Tensor]:
        """A batch without values."""
        ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
        return {"input_ids": ids, "labels": torch.zeros(batch_size, dtype=torch.long, device="meta")}
