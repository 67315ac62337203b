"""Adapted experts become PEFT's LoRA of parameters, the same model on a base that others load."""

import subprocess
import sys

import pytest
import torch
import transformers
from needs import need
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from small_models import logits, randomize, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import qsvft

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 96}
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    ),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 16}),  # the other way round
}
NAMED = {"both": ["experts.gate_up_proj", "experts.down_proj"], "the first": ["experts.gate_up_proj"]}
NAMED |= {"the last": ["experts.down_proj"], "one layer's": ["layers.1.mlp.experts.gate_up_proj"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of each family."""
    folders = {}
    for family, (model, settings) in FAMILIES.items():
        folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        made = getattr(transformers, model)(AutoConfig.for_model(family, **SMALL, **settings))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.1)
        made.save_pretrained(folders[family])
    return folders


@pytest.fixture(params=FAMILIES)
def source(request, sources):
    return sources[request.param]


def loads_as_lora(source):
    """Skip where PEFT cannot load a LoRA of a model's shared expert."""
    if AutoConfig.from_pretrained(source).model_type == "qwen2_moe":
        need("transformers", "5.6", "makes PEFT take a LoRA of the shared expert for one of the others")


def dense(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("sides", ["both", "one"])
@pytest.mark.parametrize("named", NAMED)
def test_it_is_the_same_model(source, tmp_path, named, sides):
    loads_as_lora(source)
    options = {"target_parameters": NAMED[named], "rank": 8, "rank_pattern": {"[a-z_]+_proj.[0-2]": 4}}
    base = qsvft.prepare_checkpoint(source, tmp_path / "base", 16, progress=False, sides=sides, **options)
    model = randomize(qsvft.from_pretrained(base, progress=False))
    model.save_pretrained(tmp_path / "adapter")
    expected, before = logits(model), logits(dense(source))
    assert (expected - before).norm() > 0.05 * before.norm()
    found = qsvft.export(tmp_path / "adapter", tmp_path / "lora", base=base, dtype="float32", progress=False)
    assert found.error < 1e-6 and found.rank == 8
    lora = PeftModel.from_pretrained(dense(source), tmp_path / "lora")
    assert (logits(lora) - expected).norm() < 1e-4 * (expected - before).norm()
    qsvft.save_as_lora(tmp_path / "from-memory", model)
    again = PeftModel.from_pretrained(dense(source), tmp_path / "from-memory")
    assert (logits(again) - expected).norm() < 1e-4 * (expected - before).norm()


def test_of_a_base_in_4_bits_it_is_for_the_base_before(source, tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))
    options = {"target_parameters": NAMED["both"], "target_modules": [], "rank": 8, "progress": False}
    model = randomize(qsvft.from_pretrained(source, **options))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"experts\.\w+\.\d: is an expert of a base in 4 bits.*onto='original'"):
        qsvft.export(tmp_path / "adapter", tmp_path / "lora", progress=False)
    assert list((tmp_path / "lora").iterdir()) == []
    options = {"onto": "original", "dtype": "float32", "progress": False}
    found = qsvft.export(tmp_path / "adapter", tmp_path / "lora", **options)
    assert 0.02 < found.moved < 0.3  # NF4
    dense_target = tmp_path / "dense"
    qsvft.export(tmp_path / "adapter", dense_target, format="dense", **options)
    lora = PeftModel.from_pretrained(dense(source), tmp_path / "lora")
    assert (logits(lora) - logits(dense(dense_target))).norm() < 1e-5 * logits(lora).norm()
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert not config.target_modules and len(config.target_parameters) == 4
    shapes = {tuple(one.shape) for one in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()}
    assert all(4 * 8 in shape for shape in shapes)


def test_each_loads_in_a_process_that_never_imports_qsvft(sources, tmp_path):
    options = {"target_parameters": NAMED["both"], "rank": 8, "progress": False}
    for family, source in sources.items():
        loads_as_lora(source)
        place = tmp_path / family
        base = qsvft.prepare_checkpoint(source, place / "base", 16, **options)
        model = randomize(qsvft.from_pretrained(base, progress=False))
        model.save_pretrained(place / "adapter")
        qsvft.export(place / "adapter", place / "lora", base=base, dtype="float32", progress=False)
        torch.save({"ids": tokens(), "logits": logits(model)}, place / "expected.pt")
    code = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "for source, place in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    expected = torch.load(place + '/expected.pt')\n"
        "    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)\n"
        "    model = PeftModel.from_pretrained(base, place + '/lora').eval()\n"
        "    with torch.no_grad():\n"
        "        found = model(input_ids=expected['ids']).logits\n"
        "    print(bool((found - expected['logits']).norm() < 1e-4 * expected['logits'].norm()))\n"
        "assert 'qsvft' not in sys.modules\n"
    )
    folders = [folder for family, source in sources.items() for folder in (source, tmp_path / family)]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(FAMILIES)
