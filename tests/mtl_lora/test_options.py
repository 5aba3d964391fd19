"""Starts of w, moving temperatures, rates and the overlap of up-projections: off, they change no bit."""

import math

import pytest
import torch
from torch import nn

from mtl_lora import MTLLoRAConfig, MTLLoRAModel, load_adapter, parameter_groups
from mtl_lora.analysis import mixing_weights, up_projection_overlap
from mtl_lora.errors import ConfigError
from tests.mtl_lora.conftest import Stack, make_model

X = torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = [0, 1, 2, 1]


def _fresh(**options):
    torch.manual_seed(0)
    config = MTLLoRAConfig(
        ["a", "b", "c"], **{"r": 2, "target_modules": ["first", "second"], "lora_dropout": 0.0, **options}
    )
    return MTLLoRAModel(Stack().double(), config)


def _states(model):
    return {name: value.clone() for name, value in model.adapter_state_dict().items()}


def test_options_that_are_off_leave_start_and_step_to_the_last_bit():
    """The start as the authors' code draws it, written out here, and a step by parameter groups without rates."""
    model = _fresh()
    torch.manual_seed(0)
    base = Stack().double()
    for block in base.blocks:
        for linear in (block.first, block.second):
            a = torch.empty(2, linear.in_features, dtype=torch.float64)
            w = torch.empty(3, 3, dtype=torch.float64)
            for tensor in (a, w):
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))
            linear.drawn = (a, w)
    for path, layer in model.adapted_layers().items():
        a, w = base.get_submodule(path).drawn
        assert torch.equal(layer.lora_A, a) and torch.equal(layer.lora_mixing, w)
        assert layer.mixing_logits() is layer.lora_mixing and layer.lora_temperature is None
    assert not any("temperature" in name for name in model.adapter_state_dict())
    assert [set(group) for group in parameter_groups(model, 0.1)] == [{"params", "weight_decay"}] * 2


@pytest.mark.parametrize("temperature", [0.1, 0.8])
@pytest.mark.parametrize(("spread", "largest"), [(0.1, (1 / 3, 0.37)), (1.0, (0.4, 0.55))])
def test_a_spread_sets_the_start_of_the_mixture_at_any_temperature(temperature, spread, largest):
    model = _fresh(mixing_spread=spread, temperature=temperature)
    for layer in model.adapted_layers().values():
        assert (layer.lora_mixing / temperature).abs().max() <= spread
    weights = torch.cat(list(mixing_weights(model).values()))
    assert largest[0] < weights.max(-1).values.mean() < largest[1]


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_learned_temperature_is_one_that_is_given(factor):
    learned, given = make_model(learn_temperature=True), make_model(temperature=0.7 * factor)
    for one, other in zip(learned.adapted_layers().values(), given.adapted_layers().values(), strict=True):
        with torch.no_grad():
            one.lora_temperature.fill_(math.log(factor))
            for name, parameter in other.adapter_parameters().items():
                parameter.copy_(getattr(one, name))
    torch.testing.assert_close(learned(X, task_ids=IDS), given(X, task_ids=IDS), rtol=1e-10, atol=1e-10)
    with torch.no_grad(), learned.fixed_weights():
        torch.testing.assert_close(learned(X, task_ids=IDS), given(X, task_ids=IDS), rtol=1e-10, atol=1e-10)
    for one, other in zip(mixing_weights(learned).values(), mixing_weights(given).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_learned_temperature_has_the_gradient_of_finite_differences():
    model = make_model(learn_temperature=True)
    layer = model.adapted_layers()["blocks.0.first"]

    def loss():
        return model(X, task_ids=IDS).square().mean()

    loss().backward()
    step, found = 1e-6, layer.lora_temperature.grad.item()
    with torch.no_grad():
        layer.lora_temperature.add_(step)
        more = loss()
        layer.lora_temperature.sub_(2 * step)
        assert found == pytest.approx(float(more - loss()) / (2 * step), rel=1e-5) and found != 0


def test_a_planned_temperature_goes_by_equal_factors_and_no_gradient_moves_it(tmp_path):
    model = _fresh(temperature=0.1, temperature_start=1.6)
    layers = model.adapted_layers().values()
    for done, expected in ((0.0, 1.6), (0.25, 0.8), (0.5, 0.4), (1.0, 0.1)):
        for layer in layers:
            layer.anneal(done)
            weights = torch.softmax(layer.lora_mixing / expected, -1)
            torch.testing.assert_close(torch.softmax(layer.mixing_logits() / 0.1, -1), weights)
    assert all(float(layer.lora_temperature.detach()) == 0.0 for layer in layers)
    planned = [layer.lora_temperature for layer in layers]
    model.freeze_shared("a")
    model.unfreeze()
    assert not any(p.requires_grad for p in planned)
    listed = {id(p) for group in parameter_groups(model, 0.0) for p in group["params"]}
    assert not listed & {id(p) for p in planned}


@pytest.mark.parametrize("options", [{"learn_temperature": True}, {"temperature_start": 2.0}])
def test_a_moving_temperature_is_saved_merged_and_exported_as_it_stands(options, tmp_path):
    model = make_model(**options).eval()
    for layer in model.adapted_layers().values():
        with torch.no_grad():
            layer.lora_temperature.fill_(0.4)
    expected = model(X, task_ids="b")
    model.save_pretrained(tmp_path / "saved")
    torch.manual_seed(0)
    loaded = load_adapter(Stack().double(), tmp_path / "saved").eval()
    assert torch.equal(loaded(X, task_ids="b"), expected)
    model.add_task("d", source="b")
    assert torch.equal(model(X, task_ids="d"), expected)
    model.export_task("b", tmp_path / "b", example_inputs=(X,))
    torch.testing.assert_close(model.merge_and_unload("b")(X), expected, rtol=1e-6, atol=1e-6)


def test_rates_of_their_own_reach_each_parameter_once():
    model = make_model(learn_temperature=True)
    groups = parameter_groups(model, 0.1, task_learning_rate=2.0, mixing_learning_rate=3.0)
    rates = {id(p): group.get("lr") for group in groups for p in group["params"]}
    assert len(rates) == sum(len(group["params"]) for group in groups)
    for layer in model.adapted_layers().values():
        found = {name: rates[id(p)] for name, p in layer.adapter_parameters().items()}
        assert found == {
            "lora_A": None,
            "lora_B": None,
            "lora_transform": 2.0,
            "lora_mixing": 3.0,
            "lora_temperature": 3.0,
        }
    alone = parameter_groups(model, 0.1, mixing_learning_rate=3.0)
    assert sum(len(group["params"]) for group in alone) == len(rates)


def test_the_overlap_is_that_of_nested_loops_and_zero_for_orthogonal_up_projections():
    model = make_model(num_up_projections=3)
    expected = []
    for layer in model.adapted_layers().values():
        ups = layer.lora_B.detach()
        expected.append(sum(float((ups[i].t() @ ups[j]).square().sum()) for i in range(3) for j in range(i)))
    found = up_projection_overlap(model)
    assert float(found.detach()) == pytest.approx(sum(expected) / len(expected))
    found.backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in model.adapted_layers().values())
    with torch.no_grad():
        for layer in model.adapted_layers().values():
            orthogonal = torch.linalg.qr(torch.randn(layer.out_features, 6, dtype=torch.float64))[0]
            layer.lora_B.copy_(orthogonal.view(-1, 3, 2).transpose(0, 1))
    assert float(up_projection_overlap(model).detach()) < 1e-20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixing_spread": 0.0}, "mixing_spread must be > 0"),
        ({"temperature_start": -1.0}, "temperature_start must be > 0"),
        ({"temperature_start": 1.0, "learn_temperature": True}, "choose one"),
    ],
)
def test_contradictory_starts_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        MTLLoRAConfig(["a"], **options)
