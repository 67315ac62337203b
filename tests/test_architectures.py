"""One flow through language models: prepare, one step, save, reload, merge, the merged checkpoint as a plain model."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import transformers
from peft import PeftModel
from small_models import coefficients, load, logits, randomize, same_tensors, state, tokens
from transformers import AutoConfig

import qsvft

VOCABULARY = 96
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
ENCODER = {k: DECODER[k] for k in DECODER if k not in ("bos_token_id", "eos_token_id")}


@dataclass
class Architecture:
    """A family: its model class, its settings and its experts' parameters."""

    model: str
    model_type: str
    settings: dict
    experts: tuple[str, ...] = ()

    def options(self, form):
        return {**form, "target_parameters": [*self.experts]} if self.experts else form

    def config(self):
        return AutoConfig.for_model(self.model_type, **self.settings)

    def inputs(self):
        generator = torch.Generator().manual_seed(5)
        ids = torch.randint(3, VOCABULARY, (2, 10), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids

    def load(self, folder):
        return getattr(transformers, self.model).from_pretrained(folder, dtype=torch.bfloat16)


ARCHITECTURES = {
    "Llama": Architecture("LlamaForCausalLM", "llama", GROUPED),
    "Mistral": Architecture("MistralForCausalLM", "mistral", {**GROUPED, "sliding_window": 8}),
    "Gemma 2": Architecture("Gemma2ForCausalLM", "gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 8}),
    "Qwen2": Architecture("Qwen2ForCausalLM", "qwen2", GROUPED),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1}
        | {"eos_token_id": 2, "pad_token_id": 0},
    ),
    "GPT-NeoX": Architecture("GPTNeoXForCausalLM", "gpt_neox", DECODER),
    "BERT masked": Architecture("BertForMaskedLM", "bert", ENCODER),
    "Falcon": Architecture("FalconForCausalLM", "falcon", DECODER),
    # Some of their layers are left as they are, for their parents ask whether they are quantised.
    "FalconMamba": Architecture(
        "FalconMambaForCausalLM", "falcon_mamba", {**DECODER, "state_size": 4, "time_step_rank": 4}
    ),
    "Jamba": Architecture(
        "JambaForCausalLM",
        "jamba",
        {**GROUPED, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}
        | {"attn_layer_offset": 0, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    ),
}


GATED = ("experts.gate_up_proj", "experts.down_proj")
MIXTURE = {**GROUPED, "num_experts_per_tok": 2, "num_local_experts": 4}
ARCHITECTURES |= {
    "Mixtral": Architecture("MixtralForCausalLM", "mixtral", MIXTURE, experts=GATED),
    "Qwen2-MoE": Architecture(  # a gate with one output beside its experts
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {**GROUPED, "num_experts_per_tok": 2, "num_experts": 4}
        | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
        experts=GATED,
    ),
    "gpt-oss": Architecture(  # transposed, with biases, gate and up interleaved
        "GptOssForCausalLM", "gpt_oss", {**MIXTURE, "head_dim": 16}, experts=GATED
    ),
    "DeepSeek V3": Architecture(  # the first layer has no experts, the others have shared ones as well
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {**DECODER, "num_key_value_heads": 4, "moe_intermediate_size": 64, "n_shared_experts": 1}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
        | {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16},
        experts=GATED,
    ),
}


ONE_SIDED = {"sides": "one", "pattern": "banded", "off_diagonals": 2}
EACH_FORM = pytest.mark.parametrize("form", [ONE_SIDED, {}], ids=["one-sided", "default"])


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request, tmp_path_factory):
    """An architecture and its checkpoint on disk, with weights wide enough to matter in bf16."""
    architecture = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    model = getattr(transformers, architecture.model)(architecture.config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return architecture, folder


@torch.no_grad()
def outputs(architecture, model):
    training = model.training
    logits = model.eval()(**architecture.inputs()[0]).logits
    model.train(training)
    return logits


def quantised(architecture, folder):
    return qsvft.quantize(architecture.load(folder), 4)


def train_one_step(architecture, model):
    inputs, labels = architecture.inputs()
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()


def error(found, expected):
    """|found - expected| / |expected|"""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@EACH_FORM
def test_the_whole_flow_from_checkpoint_to_merged_checkpoint(family, tmp_path, form):
    architecture, folder = family
    base = outputs(architecture, quantised(architecture, folder))
    model = qsvft.prepare(architecture.load(folder), bits=4, **architecture.options(form))
    assert torch.equal(outputs(architecture, model), base)

    before = state(model)
    train_one_step(architecture, model)
    after = state(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    M = set(coefficients(model))
    assert moved <= M
    assert len(moved) > 0.9 * len(M)

    randomize(model, scale=0.6 if architecture.experts else 0.7)
    expected = outputs(architecture, model)
    assert error(expected, base) > 0.1
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(quantised(architecture, folder), tmp_path / "adapter")
    assert torch.equal(outputs(architecture, again), expected)
    assert same_tensors(coefficients(again), coefficients(model))

    merged = again.merge_and_unload()
    found = outputs(architecture, merged)
    assert type(merged).__name__ == architecture.model
    assert not any("qsvft" in name or "lora" in name for name in merged.state_dict())
    # A rounding of the merged weight may send a token to another expert.
    assert error(found, expected) < (0.1 if architecture.experts else 0.05)
    merged.save_pretrained(tmp_path / "merged")
    plain = architecture.load(tmp_path / "merged")
    assert torch.equal(outputs(architecture, plain), found)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_a_merged_checkpoint_gives_the_same_logits_in_a_process_that_never_imports_qsvft(llama, tmp_path):
    model = randomize(qsvft.prepare(load(llama), bits=4))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.save({"ids": tokens(), "logits": logits(merged)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        "torch.set_num_threads(1)\n"
        "expected = torch.load(sys.argv[2] + '/expected.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[2] + '/merged', dtype=torch.bfloat16).eval()\n"
        "with torch.no_grad():\n"
        "    found = model(input_ids=expected['ids']).logits\n"
        "assert 'qsvft' not in sys.modules and 'bitsandbytes' not in sys.modules\n"
        "print(torch.equal(found, expected['logits']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(llama), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"
