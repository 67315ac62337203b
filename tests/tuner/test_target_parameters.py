"""``target_parameters``: experts are adapted one by one where they are named, on a base of any bits."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from small_models import logits, randomize, same_tensors, tokens
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import qsvft
from qsvft import QSVFTConfig
from qsvft.storage.experts import is_split
from qsvft.tuner.adapted import AdaptedLinear

SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 96, "num_experts_per_tok": 2, "initializer_range": 0.1}
UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
ATTENTION = 2 * 4


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).to(dtype)


def qwen():
    torch.manual_seed(0)
    sizes = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SMALL, num_experts=4, **sizes))


def adapted(model):
    return [name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, AdaptedLinear)]


def prepare(model, bits=4, **options):
    return qsvft.prepare(model, bits, progress=False, **{"rank": 16, **options})


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_no_expert_router_or_gate_is_adapted_that_is_not_named(bits):
    names = adapted(prepare(mixtral(), bits))
    assert len(names) == ATTENTION and not any("experts" in name for name in names)
    names = adapted(prepare(qwen(), bits))
    assert len(names) == ATTENTION + 2 * 3 and all("gate." not in f"{name}." for name in names)
    assert sum("shared_expert." in name for name in names) == 2 * 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_parameters": [UP]}, ATTENTION + 8),
        ({"target_parameters": ["gate_up_proj", "down_proj"]}, ATTENTION + 16),
        ({"target_parameters": [UP, DOWN], "target_modules": []}, 16),
        ({"target_parameters": [f"model.layers.1.{DOWN}"], "target_modules": ["q_proj"]}, 2 + 4),
        ({"target_parameters": [UP, DOWN], "target_modules": [], "layers_to_transform": [1]}, 8),
        ({"target_parameters": [UP, DOWN], "exclude_modules": ["down_proj.3"]}, ATTENTION + 14),
        ({"target_parameters": [UP, DOWN], "exclude_modules": r".*experts.*\.0"}, ATTENTION + 12),
        ({"target_modules": ["down_proj.2", "q_proj"]}, 2 + 2),
    ],
    ids=str,
)
def test_what_is_named_is_adapted_expert_by_expert(options, expected):
    model = prepare(mixtral(), **options)
    assert len(adapted(model)) == expected
    randomize(model)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    # Also those of an expert that no token went to: processes that train together add up the same gradients.
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("form", [{}, {"sides": "one"}, {"pattern": "banded"}, {"pattern": "plain", "rank": None}])
def test_trained_saved_loaded_merged_and_taken_off(tmp_path, bits, form):
    model = prepare(mixtral(), bits, target_parameters=[UP, DOWN], **form)
    base = logits(qsvft.quantize(mixtral(), bits, progress=False))
    assert (logits(model) - base).norm() < 1e-6 * base.norm()
    expected = logits(randomize(model))
    assert (expected - base).norm() > 0.01 * base.norm()
    model.save_pretrained(tmp_path)
    fresh = qsvft.quantize(mixtral(), bits, progress=False)
    again = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(logits(again), expected)
    # int8 rounds what goes into a layer as well, and the merged model does not
    assert (logits(again.merge_and_unload()) - expected).norm() < (0.15 if bits == 8 else 1e-5) * expected.norm()
    plain = model.unload()
    assert (logits(plain) - base).norm() < 1e-6 * base.norm()
    if bits == 16:
        assert same_tensors(plain.state_dict(), mixtral().state_dict())


def test_in_16_bits_others_than_those_named_stay_in_parameters():
    model = prepare(mixtral(), 16, target_parameters=[f"layers.1.{UP}"]).base_model.model.model
    assert not is_split(model.layers[0].mlp.experts) and is_split(model.layers[1].mlp.experts)


def test_every_door_of_peft_and_transformers_finds_them(tmp_path):
    config = QSVFTConfig(target_parameters=[UP, DOWN], rank=16, task_type="CAUSAL_LM")
    model = randomize(get_peft_model(mixtral(), config))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(mixtral(), tmp_path / "adapter", **options)), expected)
    plain = mixtral()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), expected)
    mixtral().save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.add_adapter(config)
    assert len(adapted(again)) == ATTENTION + 16


def test_two_adapters_one_of_them_without_experts():
    model = prepare(mixtral(), target_parameters=[UP])
    base = logits(model)
    randomize(model)
    first = logits(model)
    model.add_adapter("other", QSVFTConfig(rank=8))
    model.set_adapter("other")
    assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_rows_of_experts_are_no_rows_of_the_batch():
    model = prepare(mixtral(), target_parameters=[DOWN]).eval()
    with pytest.raises(ValueError, match=r"experts\.down_proj\.0 sees rows of its own.*without target_parameters"):
        model(input_ids=tokens(), adapter_names=["default", "__base__"])
    prepare(mixtral()).eval()(input_ids=tokens(), adapter_names=["default", "__base__"])


REFUSED = [
    (
        ["mlp.experts.gate_upproj"],
        r"'mlp\.experts\.gate_upproj' matches no parameter .*'experts\.gate_up_proj', 'experts",
    ),
    (["expert.down_proj"], r"Did you mean 'experts\.down_proj'"),
    (["q_proj.weight"], r"'q_proj\.weight' is the weight of linear layers; .*target_modules=\['q_proj'\]"),
]


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("names", "message"), REFUSED, ids=[str(names) for names, _ in REFUSED])
def test_a_name_that_matches_nothing_is_refused_and_nothing_is_changed(names, message, bits):
    model = mixtral()
    with pytest.raises(ValueError, match=message):
        prepare(model, bits, target_parameters=names)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, QSVFTConfig(target_parameters=[*names, UP], rank=16))
    assert same_tensors(model.state_dict(), mixtral().state_dict())


def test_a_model_without_experts_has_no_such_parameters(llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM; expected None: it has no experts in parameters"):
        prepare(AutoModelForCausalLM.from_pretrained(llama), target_parameters=[UP])
    with pytest.raises(ValueError, match=r"QSVFTConfig\.target_modules: expected names"):
        QSVFTConfig(target_modules=[])
