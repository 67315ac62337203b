"""A conversation with a model: by its tokenizer's chat template, or as a text that goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


class Chat:
    """What was said so far, and the model that answers.

    Args:
        model: of :func:`qsvft.load`, or any causal language model.
        tokenizer: its own; with a chat template each text is a turn, without one it is a text to be continued.
        **options: of ``generate``: max_new_tokens, do_sample, temperature, ...
    """

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
        self.turns: list[dict[str, str]] = []

    def say(self, text: str, show: Callable[[str], None] | None = None) -> str:
        """The model's answer.

        Args:
            text: a turn, or the beginning of a text.
            show: takes the answer piece by piece, as it comes.
        """
        if self.tokenizer.chat_template is None:
            inputs = self.tokenizer(text, return_tensors="pt")
        else:
            self.turns.append({"role": "user", "content": text})
            inputs = self.tokenizer.apply_chat_template(
                self.turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        streamer = None if show is None else _Streamer(self.tokenizer, show)
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                streamer=streamer,
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                **self.options,
            )
        answer = str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        if self.tokenizer.chat_template is not None:
            self.turns.append({"role": "assistant", "content": answer})
        return answer


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.show(text)
