"""fit="8GiB": the options are those of qsvft.recommend, and nothing is changed where nothing fits."""

import pytest
import torch
from small_models import load, logits, same_tensors, save_llama, state
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, LlamaForCausalLM, ViTConfig, ViTModel

import qsvft
from qsvft import QSVFTConfig
from qsvft.lean.vocabulary import QuantizedModule
from qsvft.memory.cards import GIB, needed_bytes
from qsvft.memory.fit.ladder import ladder
from qsvft.memory.fit.options import card_size
from qsvft.memory.scenario import count_step
from qsvft.memory.shapes import model_without_values
from qsvft.tuner import QSVFTLinear

TOKENS = 64


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama wide enough that each step down the ladder saves bytes."""
    return save_llama(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture(scope="module")
def rungs(llama):
    """The settings for the small Llama, each with a card in GiB on which it is the best that fits."""
    config = load(llama).config
    found = ladder(model_without_values(config), {})
    ledgers = [count_step(config, rung.method, 1, TOKENS, rung.checkpointing)[0] for rung in found]
    needed = [needed_bytes(ledger.peaks()["total"].nbytes) for ledger in ledgers]
    # Offloading does nothing for checkpoints this small, so that no card asks for it.
    return [
        (rung, (own + above) / 2 / GIB)
        for rung, own, above in zip(found, needed, [GIB, *needed], strict=False)
        if own < above
    ]


def adapted(model):
    return [module for module in model.modules() if isinstance(module, QSVFTLinear)]


def described(model):
    """What ``prepare`` decided, read off the model."""
    inner = model.get_base_model()
    config = model.peft_config["default"]
    return {
        "rank": config.rank,
        "pattern": config.pattern,
        "factor_bits": config.factor_bits,
        "sides": config.sides,
        "checkpointing": inner.model.layers[0].gradient_checkpointing,
        "offload": hasattr(inner.model, "qsvft_offload"),
        "vocabulary": {m.stored.bits for m in inner.modules() if isinstance(m, QuantizedModule)},
        "chunked_loss": type(inner) is not LlamaForCausalLM,
        "held": qsvft.held_bytes(model),
        "layers": len(adapted(model)),
    }


@pytest.mark.parametrize("place", [0, 1, 3, -1])
def test_the_layers_are_exactly_those_of_the_recommendation(llama, rungs, place):
    rung, card = rungs[place]
    model = load(llama)
    found = qsvft.recommend(model, card, TOKENS)
    assert found.fits and found.options == rung.options
    by_hand = qsvft.prepare(model, bits=4, **found.options)
    for fit in (found, {"card_gib": card, "seq_len": TOKENS}):
        fitted = qsvft.prepare(load(llama), bits=4, fit=fit)
        assert described(fitted) == described(by_hand)
        assert torch.equal(logits(fitted), logits(by_hand))
    assert described(by_hand)["factor_bits"] == (rung.settings["factor_bits"] or 8)
    assert described(by_hand)["checkpointing"] is rung.checkpointing


@pytest.mark.parametrize(
    "fit", ["24GiB", "24 gb", 24, 24.5, {"card_gib": "24GiB", "batch_size": 2, "optimizer": "sgd"}]
)
def test_a_large_card_gets_the_best_settings_however_it_is_written(model, fit):
    found = described(qsvft.prepare(model, fit=fit))
    assert (found["rank"], found["factor_bits"], found["checkpointing"]) == (128, 8, False)
    assert not found["vocabulary"] and not found["offload"]


def test_the_lengths_and_sizes_of_the_step_decide(llama, rungs):
    card = rungs[1][1]
    short, long = ({"card_gib": card, "seq_len": length} for length in (TOKENS, 8 * TOKENS))
    assert qsvft.recommend(load(llama), **short).options != qsvft.recommend(load(llama), **long).options
    fitted = qsvft.prepare(load(llama), fit={"card_gib": card, "seq_len": TOKENS // 4, "batch_size": 4})
    assert described(fitted)["checkpointing"] is True


def test_a_model_in_4_bits_already_gets_what_a_dense_one_gets(llama, rungs):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    fit = {"card_gib": rungs[3][1], "seq_len": TOKENS}
    theirs = qsvft.prepare(load(llama, quantization_config=quantization, device_map="cpu"), fit=fit)
    ours = qsvft.prepare(load(llama), fit=fit)
    assert described(theirs) == described(ours) and described(ours)["factor_bits"] == 4
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize(
    "given",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "offload": True},
        {"gradient_checkpointing": False},
        {"quantize_embeddings": 8, "factor_bits": 8},
        {"rank": 16, "sides": "one"},
        {"pattern": "plain", "chunked_loss": False},
        {"target_modules": ["q_proj"]},
        {"quantize_embeddings": 16, "offload": False},
    ],
    ids=str,
)
def test_what_was_given_stays(llama, rungs, given):
    fit = {"card_gib": rungs[-1][1], "seq_len": TOKENS}
    needed = qsvft.recommend(load(llama), **fit, **given).needed_bytes
    fit["card_gib"] = max(fit["card_gib"], needed / GIB)  # what is fixed may need more
    found = described(qsvft.prepare(load(llama), fit=fit, **given))
    for name in ("rank", "pattern", "factor_bits", "sides", "offload"):
        assert found[name] == given.get(name, found[name])
    assert found["checkpointing"] is given.get("gradient_checkpointing", found["checkpointing"])
    if "quantize_embeddings" in given:
        assert found["vocabulary"] == {given["quantize_embeddings"]} - {16}
    assert found["layers"] == (1 if "target_modules" in given else 7)
    assert found["chunked_loss"] is given.get("chunked_loss", True)


def test_without_a_card_the_defaults_are_what_they_were(model):
    found = described(qsvft.prepare(model))
    assert found["checkpointing"] is True and found["offload"] is False and not found["vocabulary"]


@pytest.mark.parametrize("place", [0, 3, -1])
def test_a_checkpoint_is_prepared_as_the_card_asks(llama, rungs, tmp_path, place):
    fit = {"card_gib": rungs[place][1], "seq_len": TOKENS}
    streamed = qsvft.from_pretrained(llama, fit=fit, dtype="bfloat16", cache_dir=tmp_path, progress=False)
    in_memory = qsvft.prepare(load(llama), fit=fit)
    assert described(streamed) == described(in_memory)
    assert torch.equal(logits(streamed), logits(in_memory))


def test_a_prepared_directory_keeps_its_factors_and_fits_with_what_is_open(llama, tmp_path):
    options = {"rank": 64, "factor_bits": 8}
    folder = qsvft.prepare_checkpoint(llama, tmp_path / "p", dtype="bfloat16", progress=False, **options)
    lean = qsvft.recommend(load(llama), 8, TOKENS, **options, gradient_checkpointing=True, quantize_embeddings=4)
    found = {}
    for size, card in (("large", 24), ("small", lean.needed_bytes / GIB)):
        fit = {"card_gib": card, "seq_len": TOKENS}
        found[size] = described(qsvft.from_pretrained(folder, fit=fit, progress=False))
        assert {name: found[size][name] for name in options} == options
    assert not found["large"]["checkpointing"] and not found["large"]["vocabulary"]
    assert found["small"]["checkpointing"] and found["small"]["vocabulary"] == {4}


def test_what_was_given_to_from_pretrained_stays(llama, tmp_path):
    options = {"rank": 16, "gradient_checkpointing": True, "chunked_loss": False, "quantize_embeddings": 8}
    found = qsvft.from_pretrained(llama, fit=24, dtype="bfloat16", cache_dir=tmp_path, progress=False, **options)
    assert described(found) == described(qsvft.prepare(load(llama), fit=24, **options))
    assert described(found)["vocabulary"] == {8} and described(found)["checkpointing"]


def test_where_nothing_fits_nothing_is_prepared(llama, tmp_path):
    fit = {"card_gib": 0.7505, "seq_len": TOKENS}
    options = {"dtype": "bfloat16", "cache_dir": tmp_path / "cache", "progress": False}
    with pytest.raises(ValueError, match="nothing fits"):
        qsvft.from_pretrained(llama, fit=fit, **options)
    with pytest.raises(ValueError, match="base of 4 bits, got bits=8"):
        qsvft.from_pretrained(llama, 8, fit=8, **options)
    for other in ({"config": QSVFTConfig()}, {"adapter": "somewhere"}):
        with pytest.raises(ValueError, match="fit chooses what is in a config"):
            qsvft.from_pretrained(llama, fit=8, **other, **options)
    assert not (tmp_path / "cache").exists()


def unchanged(model, message, **arguments):
    """A preparation that is refused, and leaves every tensor and class as it was."""
    before, classes = state(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message) as caught:
        qsvft.prepare(model, **arguments)
    assert [type(module) for module in model.modules()] == classes
    assert same_tensors(state(model), before)
    return str(caught.value)


def test_where_nothing_fits_the_text_is_the_recommendations(model):
    found = qsvft.recommend(model, 0.7505, TOKENS)
    assert not found.fits
    fit = {"card_gib": 0.7505, "seq_len": TOKENS}
    assert unchanged(model, "nothing fits", fit=fit) == str(found) == unchanged(model, "nothing fits", fit=found)
    change = found.nearest_change
    assert f"{next(iter(change.values())):g}" in str(found)
    assert qsvft.prepare(model, fit={**fit, **change})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fit": "8"}, "'8GiB'.*got '8'"),
        ({"fit": "eight GiB"}, "got 'eight GiB'"),
        ({"fit": "-8GiB"}, "got '-8GiB'"),
        ({"fit": True}, "got True"),
        ({"fit": [8]}, r"got \[8\]"),
        ({"fit": 0}, "above 0"),
        ({"fit": float("nan")}, "above 0"),
        ({"fit": {"seq_len": 64}}, "expected card_gib"),
        ({"fit": {"card_gib": 8, "tokens": 64}}, "got {'card_gib': 8, 'tokens': 64}"),
        ({"fit": {"card_gib": 8, "seq_len": 1}}, "seq_len.*got 1"),
        ({"fit": {"card_gib": 8, "optimizer": "lion"}}, "'lion'"),
        ({"fit": 8, "bits": 8}, "base of 4 bits, got bits=8"),
        ({"fit": 8, "bits": 16}, "got bits=16"),
        ({"fit": 8, "config": QSVFTConfig()}, "fit chooses what is in a config"),
        ({"fit": 8, "rank": 999}, "rank=999 is over the limit"),
        ({"fit": 8, "ranks": 9}, "'ranks' is unknown"),
        ({"fit": 8, "modules_to_save": ["lm_head"]}, "'modules_to_save' is unknown, or not counted"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(model, arguments, message):
    assert "\n" not in unchanged(model, message, **arguments)


def test_options_beside_a_recommendation_have_to_be_its_own(llama):
    found = qsvft.recommend(load(llama), 1, TOKENS, factor_bits=8)
    unchanged(load(llama), r"rank=16 is not.*recommend\(\.\.\., rank=16\)", fit=found, rank=16)
    unchanged(load(llama), "factor_bits=4 is not", fit=found, factor_bits=4)
    same = qsvft.prepare(load(llama), fit=found, factor_bits=8, offload=False, rank=None, pattern="dense", sides="both")
    assert described(same)["factor_bits"] == 8


def test_a_model_whose_step_is_not_counted_is_refused(llama):
    classifier = AutoModelForSequenceClassification.from_pretrained(llama, dtype=torch.bfloat16)
    unchanged(classifier, "LlamaForSequenceClassification: expected a causal language model", fit=8)
    vision = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    unchanged(ViTModel(vision).to(torch.bfloat16), "not a causal language model", fit=8)
    unchanged(nn.Sequential(nn.Linear(32, 32)), "got Sequential", fit=8)
    unchanged(load(llama, torch.float32), "is in float32, the step is counted in bf16", fit=8)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        ("8GiB", 8 * 2**30),
        (" 8 gib ", 8 * 2**30),
        ("8GB", 8 * 10**9),
        ("8.5 GB", 8.5 * 10**9),
        ("8192MiB", 8 * 2**30),
        ("8000 MB", 8 * 10**9),
        (8, 8 * 2**30),
        (7.5, 7.5 * 2**30),
    ],
)
def test_a_size_means_its_unit(size, nbytes):
    assert card_size(size) * GIB == pytest.approx(nbytes, rel=1e-12)
