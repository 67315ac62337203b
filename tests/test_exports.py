"""What docs/serving.md says of each kind of adapter: what it can become, for which base, and that it is the same model.

A cell of the table is a test here, and a test a cell.
"""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from small_models import logits, randomize, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import qsvft
from qsvft.options.choices import ONTO
from qsvft.tuner import QSVFTLinear

sys.path.insert(0, str(Path(__file__).parent / "docs"))
from pages import table_with

EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
KINDS = {
    "singular directions": {},
    "one-sided": {"sides": "one"},
    "calibrated, with what it gives back": {"calibration": [{"input_ids": tokens(), "labels": tokens()}]},
    "residual base": {"residual": True},
    "experts in 4 bits": EXPERTS,
    "experts in 16 bits": {"bits": 16, **EXPERTS},
    "a head that trains whole": {"head": True},
    "rows of the embeddings": {"trainable_token_indices": [5, 7, 9]},
    "biases": {"bias": "qsvft_only"},
}
TABLE = {row["adapter"]: row for row in table_with("docs/serving.md", "adapter", "`lora`", "`dense`")}
FORMATS = ("lora", "dense")


@pytest.fixture(scope="module")
def sources(llama, tmp_path_factory):
    """Checkpoints in fp32: a Llama, one of experts, one with biases."""
    small = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "intermediate_size": 96}
    found = {"llama": llama}
    for kind, name in (("mixtral", "MixtralForCausalLM"), ("qwen2", "Qwen2ForCausalLM")):
        torch.manual_seed(0)
        made = getattr(transformers, name)(AutoConfig.for_model(kind, **small))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.1)
        found[kind] = tmp_path_factory.mktemp(kind)
        made.save_pretrained(found[kind])
    return found


def trained(sources, folder, options):
    """A model with an adapter of random numbers, saved; its source, and the class that it is loaded as."""
    options = {**options}
    kind = "mixtral" if "target_parameters" in options else "qwen2" if "bias" in options else "llama"
    source, bits = sources[kind], options.pop("bits", 4)
    if options.pop("head", False):
        torch.manual_seed(1)
        loader = AutoModelForSequenceClassification
        plain = loader.from_pretrained(source, num_labels=3, dtype=torch.float32)
        model = qsvft.prepare(plain, bits, rank=8, progress=False)
    else:
        loader = AutoModelForCausalLM
        model = qsvft.from_pretrained(source, bits, rank=8, progress=False, **options)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "qsvft_M" not in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return model, source, loader, bits


def base_of(model, source, loader, bits, onto):
    """A base as others load it: in fp32, or quantised as the adapter's."""
    options = {"num_labels": 3} if loader is AutoModelForSequenceClassification else {}
    plain = loader.from_pretrained(source, dtype=torch.float32, **options)
    if onto == "held" and bits != 16:
        whole = ["score"] if options else []
        plain = qsvft.quantize(plain, bits, skip_modules=whole, progress=False)
    return plain


def expected(model, source, loader, bits, onto):
    """The logits of the adapted model; onto the original, of its weights and what was learned."""
    if onto == "held":
        return logits(model)
    merged = base_of(model, source, loader, bits, onto)
    learned = {m.module_name: (m, m.get_delta_weight("default").clone()) for m in model.modules() if is_adapted(m)}
    plain = randomize_back(model)
    with torch.no_grad():
        for name, (layer, delta) in learned.items():
            change = delta - plain[name]
            leaf = name.rpartition(".")[2]
            if leaf.isdigit():
                merged.get_parameter(name.removesuffix(f".{leaf}"))[int(leaf)] += change
            else:
                merged.get_submodule(name).weight += change
            bias = getattr(layer.get_base_layer(), "bias", None)
            if bias is not None:
                merged.get_submodule(name).bias.copy_(bias)
        for name, module in model.base_model.model.named_modules():
            if hasattr(module, "modules_to_save"):
                merged.get_submodule(name).load_state_dict(module.modules_to_save["default"].state_dict())
            if hasattr(module, "token_adapter"):
                rows = module.token_adapter.trainable_tokens_delta["default"]
                merged.get_submodule(name).weight[module.token_adapter.token_indices["default"]] = rows
    return logits(merged)


def is_adapted(module):
    return isinstance(module, QSVFTLinear)


def randomize_back(model):
    """What each layer's adapter changes without M: what it gives back."""
    values = {name: p.detach().clone() for name, p in model.named_parameters() if "qsvft_M" in name}
    randomize(model, scale=0.0)
    found = {m.module_name: m.get_delta_weight("default").clone() for m in model.modules() if is_adapted(m)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return found


def possible(form, made, folder):
    """For which base an adapter can be exported; where it is, it is the same model."""
    model, source, loader, bits = made
    found, said = [], []
    for onto in ONTO:
        options = {"format": form, "onto": onto, "dtype": "float32", "base": source, "progress": False}
        try:
            qsvft.export(folder / "adapter", folder / f"{form}-{onto}", **options)
        except ValueError as error:
            said.append(str(error))
            continue
        if form == "lora":
            loaded = PeftModel.from_pretrained(base_of(model, source, loader, bits, onto), folder / f"{form}-{onto}")
        else:
            loaded = loader.from_pretrained(folder / f"{form}-{onto}", dtype=torch.float32)
        wanted, before = expected(model, source, loader, bits, onto), logits(base_of(model, source, loader, bits, onto))
        assert (logits(loaded) - wanted).norm() < 1e-3 * (wanted - before).norm()
        found.append(onto)
    assert all("onto='original'" in one for one in said)  # the way out
    return ", ".join(found)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind, form, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("QSVFT_CACHE", str(tmp_path / "cache"))
    made = trained(sources, tmp_path / "adapter", KINDS[kind])
    assert possible(form, made, tmp_path) == TABLE[kind][f"`{form}`"]


def test_every_cell_has_its_test_and_every_test_its_cell():
    assert TABLE.keys() == KINDS.keys()
    assert {heading for row in TABLE.values() for heading in row} == {"adapter", *(f"`{form}`" for form in FORMATS)}
