"""Model shapes by name, for profiling without a checkpoint: only what decides sizes."""

from __future__ import annotations

import os

from transformers import AutoConfig, GemmaConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from ..options.choices import PRESETS


def _llama(**sizes: int) -> LlamaConfig:
    return LlamaConfig(tie_word_embeddings=False, **sizes)


_PRESETS = {
    "llama-2-7b": lambda: _llama(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
    ),
    "llama-3-8b": lambda: _llama(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    "mistral-7b": lambda: MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
    "gemma-2b": lambda: GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
    ),
    "gemma-7b": lambda: GemmaConfig(
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256000,
    ),
    "qwen2.5-7b": lambda: Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
    # Small in every direction, for tests.
    "tiny": lambda: _llama(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=256,
    ),
}


def model_config(name: str) -> PretrainedConfig:
    """The config of a preset, a local directory or a hub id.

    Raises:
        ValueError: one line that names what was asked for and what there is.
    """
    if name in _PRESETS:
        return _PRESETS[name]()
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "holds no readable config.json" if os.path.isdir(name) else "is no directory and no reachable hub id"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"unknown model {name!r}: it {where} ({reason}); expected a preset ({', '.join(PRESETS)}), a directory "
            "with a config.json, or a hub id"
        ) from error
