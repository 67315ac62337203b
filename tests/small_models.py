"""Small checkpoints on disk and what the tests do with them again and again."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 96


def save_llama(folder: Path, seed: int = 0, **changes) -> Path:
    """A Llama of two layers, width 64, with its tokenizer; weights an order above the usual, so that outputs differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.bfloat16, **options) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of a fixed batch in eval mode; the model's mode is put back."""
    training = model.training
    model.eval()
    result = model(input_ids=tokens() if ids is None else ids).logits
    model.train(training)
    return result


def coefficients(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Every M of an adapter, by parameter name, as copies."""
    ending = f".qsvft_M.{adapter}.weight"
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(ending)}


@torch.no_grad()
def randomize(model: nn.Module, adapter: str = "default", scale: float = 0.5, seed: int = 1) -> nn.Module:
    """Give every M of an adapter values as after some training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(f".qsvft_M.{adapter}.weight"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32) * scale)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model's state, as copies."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Same keys, dtypes and bits (NaN equals NaN)."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and torch.equal(_bytes(left[key]), _bytes(right[key]))
        for key in left
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
