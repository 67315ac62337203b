"""Small models for the ids that PEFT's tests name: the same families, made here."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

SMALL = {"vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 37, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1}
GROUPED = {**SMALL, "eos_token_id": 2, "num_key_value_heads": 2}
NARROW = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512}
NARROW |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", {**GROUPED, "ffn_dim": 37, "word_embed_proj_dim": 32}),
    "gptj": ("GPTJForCausalLM", {**NARROW, "rotary_dim": 4}),
    "gpt2": ("GPT2LMHeadModel", NARROW),
    "gemma3": ("Gemma3ForCausalLM", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", GROUPED),
    "llamaforseq": ("LlamaForSequenceClassification", GROUPED),
    "llama": ("LlamaForCausalLM", GROUPED),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 1024, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {"decoder_attention_heads": 4, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "max_position_embeddings": 100},
    ),
    "cliptext": ("CLIPTextModelWithProjection", SMALL),
    "bertforseq": ("BertForSequenceClassification", SMALL),
    "bert": ("BertModel", SMALL),
    "robertaforseq": ("RobertaForSequenceClassification", SMALL),
    "roberta": ("RobertaModel", SMALL),
    "debertav2": ("DebertaV2Model", {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta": ("DebertaModel", {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
}


def local(name: str) -> str:
    """The folder of the model that stands for an id, or the name itself where none does."""
    if "/" not in name or Path(name).exists():
        return name
    if name.endswith("/opt-125m"):
        wide = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128}
        return str(_saved("opt", num_hidden_layers=12, **wide))
    plain = name.rsplit("/", 1)[-1].lower().replace("-", "").replace("_", "")
    families = [key for key in FAMILIES if key in plain]
    return str(_saved(max(families, key=len))) if families and "tiny" in plain else name


@cache
def _saved(family: str, **changes: Any) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="peft-suite-")) / family
    kind, settings = FAMILIES[family]
    model = getattr(transformers, kind)
    torch.manual_seed(0)
    model(model.config_class(**{**settings, **changes})).eval().save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({f"<{number}>": number for number in range(1024)}, unk_token="<3>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<3>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
