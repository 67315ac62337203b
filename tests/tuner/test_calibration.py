"""Directions from data: what they are, that finding them changes nothing, and an adapter on them from end to end."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from small_models import coefficients, load, logits, randomize, same_tensors, save_llama, state, tokens
from transformers import BertConfig, BertForSequenceClassification

import qsvft
from qsvft import QSVFTConfig
from qsvft.tuner import QSVFTLinear

OPTIONS = {"basis": "data", "sides": "both", "pattern": "dense", "rank": 8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def batches(count=3, rows=4, length=16, first=0):
    found = [tokens(rows, length, first + seed) for seed in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in found]


def passed_through(model, data):
    """(x, g) of every linear layer but the head, all tokens in rows, by hooks of the test's own."""
    found, read = {}, {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    hooks = []
    for name, layer in layers.items():
        found[name] = ([], [])
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].detach()})))

        def backward(_, __, outputs, name=name):
            found[name][0].append(read[name].flatten(0, 1))
            found[name][1].append(outputs[0].flatten(0, 1))

        hooks.append(layer.register_full_backward_hook(backward))
    for batch in data:
        model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    return {name: tuple(torch.cat(rows).double() for rows in pair) for name, pair in found.items()}


def layers(model):
    return {
        name.removeprefix("base_model.model."): m for name, m in model.named_modules() if isinstance(m, QSVFTLinear)
    }


@pytest.mark.parametrize("checkpointing", [True, False])
def test_u_and_v_are_the_leading_directions_of_what_passes_through_a_layer(llama, checkpointing):
    seen = passed_through(load(llama, torch.float32), batches())
    model = qsvft.prepare(
        load(llama, torch.float32), 16, calibration=batches(), gradient_checkpointing=checkpointing, **OPTIONS
    )
    for name, layer in layers(model).items():
        form = layer.forms["default"]
        for key, rows in ((form.inward, seen[name][0]), (form.outward, seen[name][1])):
            held = layer.basis(key).dense(torch.float64)
            best = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[:8].sum()
            # The sketch of so even a spectrum: the weights are random.
            assert 0.9 < float((rows @ held.T).square().sum() / best) < 1.01, (name, key)
            torch.testing.assert_close(held @ held.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=2e-2)


def test_they_hold_more_of_the_gradient_than_singular_vectors(llama):
    seen = passed_through(load(llama, torch.float32), batches(first=50))  # other batches than those of the calibration
    held = {}
    for basis, more in (("data", {"calibration": batches()}), ("singular", {})):
        model = qsvft.prepare(load(llama, torch.float32), 16, **{**OPTIONS, "basis": basis}, **more)
        held[basis] = 0.0
        for name, layer in layers(model).items():
            x, g = seen[name]
            U, V = (
                layer.basis(key).dense(torch.float64)
                for key in (layer.forms["default"].outward, layer.forms["default"].inward)
            )
            held[basis] += float((U @ g.T @ x @ V.T).square().sum() / (g.T @ x).square().sum())
    assert held["data"] > 2 * held["singular"]


def test_calibrating_changes_nothing_of_the_model(llama):
    model = qsvft.quantize(load(llama), bits=4).eval()
    model.model.norm.weight.requires_grad_(False)
    before, asked = state(model), [name for name, p in model.named_parameters() if p.requires_grad]
    expected = logits(model)
    qsvft.calibrate(model, QSVFTConfig(**OPTIONS), batches())
    assert same_tensors(state(model), before)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == asked
    assert all(p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_an_adapter_on_them_trains_is_saved_with_them_and_loads_without_data(llama, tmp_path, bits):
    options = {**OPTIONS, "factor_bits": bits, "residual": False}
    model = qsvft.prepare(load(llama), 4, calibration=batches(), **options)
    assert torch.equal(logits(model), logits(qsvft.prepare(load(llama), 4, rank=8)))
    model(**batches(1)[0]).loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)
    randomize(model)
    model.save_pretrained(tmp_path)
    assert any("_data_8" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = PeftModel.from_pretrained(qsvft.quantize(load(llama), bits=4), tmp_path)
    assert torch.equal(logits(again), logits(model)) and same_tensors(coefficients(again), coefficients(model))
    again.save_pretrained(tmp_path / "again")
    third = PeftModel.from_pretrained(qsvft.quantize(load(llama), bits=4), tmp_path / "again")
    assert torch.equal(logits(third), logits(model))


def test_merged_it_computes_what_the_adapter_does(llama):
    model = randomize(qsvft.prepare(load(llama, torch.float32), 4, calibration=batches(), **OPTIONS))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


def test_padding_is_not_looked_at(llama):
    ids = tokens(4, 12)
    padded = torch.cat([ids, torch.full((4, 9), 7)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 9, dtype=ids.dtype)], 1)
    labels = padded.masked_fill(mask == 0, -100)
    models = [
        qsvft.prepare(load(llama, torch.float32), 16, calibration=[batch], **OPTIONS)
        for batch in (
            {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)},
            {"input_ids": padded, "labels": labels, "attention_mask": mask},
        )
    ]
    for one, other in zip(*(layers(model).values() for model in models), strict=True):
        V, W = (layer.basis(layer.forms["default"].inward).dense(torch.float64) for layer in (one, other))
        torch.testing.assert_close(V.T @ V, W.T @ W, rtol=0, atol=3e-2)


def test_pefts_own_door_takes_what_calibrate_left_and_says_what_to_do_without(llama):
    config = QSVFTConfig(task_type="CAUSAL_LM", **OPTIONS)
    with pytest.raises(ValueError, match=r"q_proj: basis='data' needs directions .* rank 8 .* qsvft\.calibrate\(model"):
        get_peft_model(qsvft.quantize(load(llama), bits=4), config)
    model = qsvft.quantize(load(llama), bits=4)
    qsvft.calibrate(model, config, batches())
    assert len(layers(get_peft_model(model, QSVFTConfig(task_type="CAUSAL_LM", **OPTIONS)))) == 14


def test_a_prepared_directory_is_calibrated_when_it_is_loaded(llama, tmp_path):
    qsvft.prepare_checkpoint(llama, tmp_path / "prepared", **OPTIONS)
    model = qsvft.from_pretrained(tmp_path / "prepared", calibration=batches(), pattern="dense")
    randomize(model).save_pretrained(tmp_path / "adapter")
    again = qsvft.from_pretrained(tmp_path / "prepared", adapter=tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_a_loss_of_ones_own_is_used(llama):
    asked = []

    def loss(model, batch):
        asked.append(sorted(batch))
        return model(input_ids=batch["input_ids"]).logits.float().logsumexp(-1).mean()

    model = qsvft.quantize(load(llama), bits=4)
    qsvft.calibrate(model, QSVFTConfig(**OPTIONS), batches(2), loss)
    assert asked == [["input_ids", "labels"]] * 2


REFUSED = {
    "no batch": ([], {}, "calibration: found no batch"),
    "no labels": ([{"input_ids": tokens()}], {}, "calibration: the loss of batch 0 is None; expected a finite number"),
    "another basis": (batches(1), {"basis": "singular"}, "calibration: found some with basis='singular'"),
    "no calibration": (None, {}, "calibration: found none with basis='data'"),
    "one side": (batches(1), {"sides": "one"}, r"QSVFTConfig\.basis: expected sides='both' with basis='data'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_says_what_was_found_and_expected(llama, kind):
    data, options, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        qsvft.prepare(load(llama), 4, calibration=data, **{**OPTIONS, **options})


def test_a_layer_that_no_batch_reaches_is_refused_by_name(llama):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match=r"^idle: no batch of the calibration reached this layer \(1 of 2"):
        qsvft.calibrate(
            Model(),
            QSVFTConfig(**{**OPTIONS, "rank": 4}),
            [torch.randn(5, 16)],
            lambda model, x: model(x).square().mean(),
        )


def test_a_loss_that_is_no_number_is_refused(llama):
    model = qsvft.quantize(load(llama), bits=4)
    scale = iter((1.0, float("nan")))
    with pytest.raises(ValueError, match=r"the loss of batch 1 is .*nan"):
        qsvft.calibrate(model, QSVFTConfig(**OPTIONS), batches(2), lambda m, b: m(**b).loss * next(scale))


def test_calibration_given_is_what_the_basis_comes_from(llama):
    model = qsvft.prepare(load(llama), 4, rank=8, calibration=batches())
    assert model.peft_config["default"].basis == "data" and model.peft_config["default"].include_factors
    with pytest.raises(ValueError, match="found some with basis='singular'"):
        qsvft.prepare(load(llama), 4, rank=8, basis="singular", calibration=batches())


def test_the_first_batches_of_a_loader_are_enough(llama):
    drawn = []

    def loader():
        for batch in batches(20, 1, 4):
            drawn.append(batch)
            yield batch

    qsvft.prepare(load(llama), 4, rank=8, calibration=loader())
    assert len(drawn) == 16


def test_signs_in_units_of_alpha_change_the_outputs_by_their_size_over_the_root_of_k():
    """alpha² = Σ |W x|² / (k² Σ |Vᵀ x|²), of W x without the bias, on the very batches."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 40))
    net[0].bias.data += 5.0
    data = [torch.randn(20, 48) * torch.logspace(0, -2, 48) for _ in range(3)]
    config = QSVFTConfig(target_modules=["0", "2"], rank=8, basis="data")
    qsvft.calibrate(net, config, data, lambda model, x: model(x).square().mean())
    inputs = {"0": torch.cat(data), "2": torch.nn.functional.gelu(net[0](torch.cat(data)))}
    adapted = get_peft_model(net, config)
    for name, layer in layers(adapted).items():
        x, W = inputs[name].detach().double(), layer.original_weight().double()
        V = layer.basis(layer.forms["default"].inward).dense(torch.float64)
        expected = (x @ W.T).square().sum() / (8**2 * (x @ V.T).square().sum())
        assert layer.units["default"] ** 2 == pytest.approx(float(expected), rel=0.02), name
        signs = torch.randn(64, generator=torch.Generator().manual_seed(1)).sign()
        layer.M("default").data = signs
        change = x @ layer.get_delta_weight("default").double().T
        assert 0.5 < 8**0.5 * float(change.norm() / (x @ W.T).norm()) < 2, name


@pytest.mark.parametrize("prepared_for", ["singular", "data"])
def test_a_prepared_directory_takes_directions_from_data(llama, tmp_path, prepared_for):
    qsvft.prepare_checkpoint(llama, tmp_path / "prepared", rank=8, basis=prepared_for, progress=False)
    model = qsvft.from_pretrained(tmp_path / "prepared", calibration=batches(), device_map="cpu", progress=False)
    assert model.peft_config["default"].basis == "data"
    assert all("_data_8" in key for layer in layers(model).values() for key in layer.qsvft_bases)


@pytest.mark.parametrize("given", [{}, {"rank": 128}, {"sides": "both"}], ids=str)
def test_a_recommendation_goes_with_calibration_and_with_what_it_was_counted_with(llama, given):
    found = qsvft.recommend(load(llama), card_gib=2, progress=False)
    model = qsvft.prepare(load(llama), fit=found, calibration=batches(), progress=False, **given)
    assert model.peft_config["default"].basis == "data" and model.peft_config["default"].rank == 128
    with pytest.raises(ValueError, match="rank=16 is not what the recommendation was counted with"):
        qsvft.prepare(load(llama), fit=found, calibration=batches(), rank=16, progress=False)


def test_a_checkpoint_takes_directions_from_data(llama, tmp_path):
    options = {"cache_dir": tmp_path, "device_map": "cpu", "progress": False, "calibration": batches()}
    model = qsvft.from_pretrained(llama, rank=8, **options)
    assert model.peft_config["default"].basis == "data"
    assert qsvft.from_pretrained(llama, config=QSVFTConfig(**OPTIONS, task_type="CAUSAL_LM"), **options)


def test_a_layer_that_reads_zeros_alone_has_the_unit_one():
    net = torch.nn.Sequential(torch.nn.Linear(48, 32), torch.nn.Linear(32, 16))
    net[0].weight.data.zero_()
    net[0].bias.data.zero_()
    config = QSVFTConfig(target_modules=["1"], rank=8, basis="data")
    qsvft.calibrate(net, config, [torch.randn(9, 48)], lambda model, x: model(x).square().mean())
    (layer,) = layers(get_peft_model(net, config)).values()
    assert layer.units["default"] == 1.0


def classifier(seed):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=48, max_position_embeddings=32, num_labels=3)
    model = BertForSequenceClassification(config)
    torch.manual_seed(seed)
    model.classifier.reset_parameters()
    return model


def sentences(count=3):
    found = [tokens(8, 12, seed) % 64 for seed in range(count)]
    return [{"input_ids": ids, "labels": torch.arange(8) % 3} for ids in found]


@pytest.mark.parametrize("options", [{}, {"task_type": None, "modules_to_save": ["classifier"]}], ids=str)
def test_with_a_new_head_u_is_of_the_outputs_and_does_not_depend_on_how_the_head_was_drawn(options):
    models = [qsvft.prepare(classifier(seed), 16, calibration=sentences(), **{**OPTIONS, **options}) for seed in (1, 2)]
    assert {one.p for one in models[0].modules() if isinstance(one, torch.nn.Dropout)} == {0.1}  # none while it looked
    outputs = {}
    plain = classifier(1).train()
    for module in plain.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(
                lambda layer, _, y, name=name: outputs.setdefault(name, []).append((y - layer.bias).flatten(0, -2))
            )
    for batch in sentences():
        plain(**batch)
    for name, layer in layers(models[0]).items():
        key = layer.forms["default"].outward
        held = layer.basis(key).dense(torch.float64)
        assert torch.equal(held, layers(models[1])[name].basis(key).dense(torch.float64)), name
        rows = torch.cat(outputs[name]).detach().double()
        best = torch.linalg.eigvalsh(rows.T @ rows).flip(0)[: len(held)].sum()
        assert 0.9 < float((rows @ held.T).square().sum() / best) < 1.01, name


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens", "norm"])
def test_what_trains_whole_of_a_language_model_is_no_new_head(llama, whole):
    given = {"calibration": batches(), **OPTIONS}
    found, expected = (
        qsvft.prepare(load(llama, torch.float32), 16, **given, **more) for more in ({"modules_to_save": [whole]}, {})
    )
    for name, layer in layers(found).items():
        key = layer.forms["default"].outward
        assert torch.equal(*(one.basis(key).dense(torch.float32) for one in (layer, layers(expected)[name]))), name
