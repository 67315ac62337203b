"""What there is to choose among, what each means stands where it is built."""

PATTERNS = ("plain", "banded", "random", "top_k", "dense")
"""Which entries of M train; see :mod:`qsvft.maths.patterns`."""

DECOMPOSITIONS = ("auto", "exact", "randomized", "float32")
"""How U and V are computed; see :mod:`qsvft.maths.decomposition`."""

SIDES = ("one", "both")
BASES = ("singular", "data")
UNITS = ("weight", "one")
BIASES = ("none", "qsvft_only", "all")

BASE_BITS = (4, 8, 16)
"""Of the base, of embeddings and of the head: NF4, int8, as they are."""

STORED_BITS = (16, 8, 4)
"""Of U and V: bf16, int8, NF4."""

METHODS = ("floor", "full", "lora", "qlora", "qlora-kbit", "dora", "vera", "boft", "svft", "svft-authors", "qsvft")
"""What the profiler compares; see :mod:`qsvft.memory.methods`."""

DEFAULT_METHODS = ("floor", "lora", "qlora", "qlora-kbit", "svft", "svft-authors", "qsvft", "full")

PRESETS = ("llama-2-7b", "llama-3-8b", "mistral-7b", "gemma-2b", "gemma-7b", "qwen2.5-7b", "tiny")
"""Models known by name; see :mod:`qsvft.memory.presets`."""

OPTIMIZERS = ("adamw", "adamw8bit", "sgd")
"""That the ledger counts."""

CARDS_GIB: tuple[float, ...] = (8, 12, 16, 24)
"""Cards that a profile shows."""

FORMATS = ("lora", "dense", "gguf", "gguf-lora")
"""Of an export."""

ONTO = ("held", "original")
"""What an export goes onto: the base as the adapter had it, or before it was rounded."""

EXPORT_DTYPES = ("bfloat16", "float16", "float32")
"""Of an export."""

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of an exported LoRA: those that vLLM's ``--max-lora-rank`` takes."""
