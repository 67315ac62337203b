"""The shapes that are timed: layers as wide as real models have them, and whole models small enough for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, PretrainedConfig

from qsvft.memory.presets import model_config

LAYERS = ("llama-2-7b", "llama-3-8b")
TOKENS = (256, 1024, 4096)
NARROW, TINY = "1024-wide", "tiny"
VOCABULARY = 8192


@dataclass(frozen=True)
class Model:
    """A whole model to step.

    Attributes:
        name: as the tables call it.
        tokens: in a step.
        config: its shapes.
    """

    name: str
    tokens: int
    config: PretrainedConfig


def models() -> dict[str, Model]:
    """Those that need no checkpoint: a narrow one, and two layers of Llama-3-8B's shapes."""
    wide = model_config("llama-3-8b")
    wide.num_hidden_layers, wide.vocab_size = 2, VOCABULARY
    found = (
        Model("Llama 1024 wide, 4 layers", 1024, narrow()),
        Model("Llama-3-8B, 2 layers", 512, wide),
        Model(TINY, 64, tiny()),
    )
    return dict(zip((NARROW, "llama-3-8b", TINY), found, strict=True))


def narrow() -> LlamaConfig:
    """Four layers 1024 wide."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        tie_word_embeddings=False,
    )


def tiny() -> LlamaConfig:
    """A Llama with room for every rival, for trying the benchmark itself."""
    return LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def one_layer(name: str) -> PretrainedConfig:
    """The config of a model by name or directory with one layer and a vocabulary that costs nothing: its linears count.

    Raises:
        ValueError: one line that says what the name could be.
    """
    own = {NARROW: narrow, TINY: tiny}
    config = own[name]() if name in own else model_config(name)
    config.num_hidden_layers, config.vocab_size = 1, 64
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, token, None)
    return config
