"""The rivals: each against its slow reference, and all under one interface."""

import json

import pytest
import torch
from torch import nn

from mtl_lora import METHODS, MTLLoRAConfig, build_adapter, load_adapter
from mtl_lora.baselines.lora_per_task import LoRAPerTaskLinear
from mtl_lora.baselines.moelora import MoELoRALinear
from mtl_lora.baselines.multilora import MultiLoRALinear
from mtl_lora.errors import AdapterFileError, ConfigError, MTLLoRAError, RoutingError
from mtl_lora.files import CONFIG_FILE, WEIGHTS_FILE
from mtl_lora.hashes import write_hashes
from mtl_lora.routing import Router
from tests.mtl_lora.conftest import clone
from tests.reference.mtl_lora_reference import lora_linear, moelora_linear, multilora_linear

TASKS = ["a", "b", "c"]


def _randomised(module):
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def _layer(cls, **options):
    torch.manual_seed(0)
    router = Router()
    config = MTLLoRAConfig(TASKS, target_modules=["x"], lora_dropout=0.0, **options)
    return _randomised(cls(nn.Linear(4, 5).double(), config, router)), router


def _grads(y, parameters):
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype)
    return torch.autograd.grad((y.flatten() * weights).sum(), parameters)


def test_multilora_equals_nested_loops():
    layer, router = _layer(MultiLoRALinear, r=2, num_up_projections=3)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    router.ids = torch.tensor([0, 2])
    parameters = [x, layer.lora_A, layer.lora_B, layer.lora_scaling]
    expected = multilora_linear(x.reshape(-1, 4), layer.weight, layer.bias, *parameters[1:], layer.scaling)
    y = layer(x).reshape(-1, 5)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(_grads(y, parameters), _grads(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("r", "experts", "shares"), [(4, 2, [2, 2]), (5, 3, [2, 2, 1]), (2, 1, [2])])
@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_moelora_equals_nested_loops(r, experts, shares, layout):
    layer, router = _layer(MoELoRALinear, r=r, num_up_projections=experts)
    assert layer.rank_shares == shares
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0], [2, 2], [1, 1]])
    if layout == "one":
        ids = torch.ones_like(ids)
    router.ids = {"one": torch.tensor(1), "row": ids[:, 0], "token": ids}[layout]
    parameters = [x, layer.lora_A, layer.lora_B, layer.lora_task_embedding, layer.lora_gate]
    experts_A, experts_B = layer.lora_A.split(shares), layer.lora_B.split(shares, dim=1)
    expected = moelora_linear(
        x.reshape(-1, 4),
        layer.weight,
        layer.bias,
        experts_A,
        experts_B,
        layer.lora_task_embedding,
        layer.lora_gate,
        ids.flatten().tolist(),
        layer.scaling,
    )
    y = layer(x).reshape(-1, 5)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(_grads(y, parameters), _grads(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_one_lora_a_task_is_the_lora_of_each_rows_task(layout):
    layer, router = _layer(LoRAPerTaskLinear, r=2, lora_alpha=6)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 0], [2, 2], [1, 1]])
    if layout == "one":
        ids = torch.ones_like(ids)
    router.ids = {"one": torch.tensor(1), "row": ids[:, 0], "token": ids}[layout]
    parameters = [x, layer.lora_A, layer.lora_B]
    rows = zip(x.reshape(-1, 4), ids.flatten().tolist(), strict=True)
    expected = torch.cat(
        [lora_linear(row[None], layer.weight, layer.bias, layer.lora_A[t], layer.lora_B[t], 3.0) for row, t in rows]
    )
    y = layer(x).reshape(-1, 5)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(_grads(y, parameters), _grads(expected, parameters), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_pefts_methods_equal_nested_loops(method):
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["0"]}
    model = build_adapter(method, nn.Sequential(nn.Linear(4, 5)).double(), TASKS, **options)
    layer = _randomised(model).base_model[0]
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    magnitude = None
    if method == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data.mul_(torch.linspace(0.5, 2, 5, dtype=torch.float64))
        parameters.append(magnitude)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    base = layer.get_base_layer()
    expected = lora_linear(x, base.weight, base.bias, *parameters[:2], 3.0, magnitude)
    y = model(x, task_ids=[0, 2, 1])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(_grads(y, [x, *parameters]), _grads(expected, [x, *parameters]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_peft_lora_has_pefts_outputs(tiny_llama):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    theirs = get_peft_model(clone(tiny_llama), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(1)
    ours = build_adapter(
        "lora", tiny_llama, TASKS, r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
    )
    _randomised(theirs)
    _randomised(ours)
    ids = torch.randint(61, (2, 5))
    assert torch.equal(theirs(ids).logits, ours(ids, task_ids=[0, 2]).logits)
    assert theirs.get_nb_trainable_parameters()[0] == ours.count_parameters()[0]


@pytest.fixture(params=sorted(METHODS))
def method(request):
    return request.param


@pytest.fixture
def built(method, tiny_llama):
    model = build_adapter(method, tiny_llama, TASKS, r=4, num_up_projections=2, lora_dropout=0.1, temperature=0.8)
    return _randomised(model).eval()


@torch.no_grad()
def test_every_method_merges_unmerges_reloads_and_exports(method, tiny_llama, tmp_path):
    from peft import PeftModel

    plain = clone(tiny_llama)
    model = build_adapter(method, tiny_llama, TASKS, r=4, num_up_projections=2, lora_dropout=0.1, temperature=0.8)
    _randomised(model).eval()
    ids = torch.randint(61, (2, 6))
    expected = model(ids, task_ids="b").logits
    assert not torch.allclose(expected, plain(ids).logits, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(ids, task_ids="b").logits, plain(ids).logits)

    model.save_pretrained(tmp_path / "saved")
    loaded = load_adapter(clone(plain), tmp_path / "saved", task_names=TASKS).eval()
    assert type(loaded) is METHODS[method]
    assert torch.equal(loaded(ids, task_ids="b").logits, expected)
    with pytest.raises(AdapterFileError, match="tasks must be"):
        load_adapter(clone(plain), tmp_path / "saved", task_names=["x"])

    folder = model.export_task("b", tmp_path / "b")
    served = PeftModel.from_pretrained(clone(plain), str(folder)).eval()
    torch.testing.assert_close(served(ids).logits, expected, rtol=1e-4, atol=1e-4)

    model.merge("b")
    torch.testing.assert_close(model(ids, task_ids="b").logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge()
    assert torch.equal(model(ids, task_ids="b").logits, expected)

    merged = model.merge_and_unload("b")
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]


def test_every_method_starts_as_the_base(method, tiny_llama):
    plain = clone(tiny_llama)
    model = build_adapter(method, tiny_llama, TASKS, r=4, num_up_projections=2).eval()
    ids = torch.randint(61, (2, 6))
    torch.testing.assert_close(model(ids, task_ids=[0, 1]).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_every_method_trains_only_its_adapter_and_checks_ids(built):
    ids = torch.randint(61, (3, 6))
    built.train()
    before = {name: p.clone() for name, p in built.named_parameters()}
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=0.1)
    built(ids, task_ids=[0, 1, 2], labels=ids).loss.backward()
    optimizer.step()
    changed = {name for name, p in built.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    with pytest.raises(RoutingError):
        built(ids, task_ids=[0, 1, 7])
    with pytest.raises(RoutingError, match="must be given"):
        built(ids)


def test_every_method_generates_with_beams(built):
    ids = torch.randint(61, (2, 4))
    both = built.generate(ids, task_ids=["a", "c"], num_beams=3, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for i, name in enumerate(["a", "c"]):
        alone = built.generate(ids[i : i + 1], task_ids=name, num_beams=3, max_new_tokens=4, pad_token_id=0)
        assert torch.equal(alone[0], both[i, : alone.shape[1]])


def test_every_method_takes_new_tasks(method, built):
    ids = torch.randint(61, (2, 6))
    before = built(ids, task_ids=["a", "b"]).logits
    built.add_task("d", source="b")
    built.rename_task("c", "sea")
    assert torch.equal(built(ids, task_ids=["a", "b"]).logits, before)
    torch.testing.assert_close(built(ids, task_ids=["a", "d"]).logits, before)
    if method in ("mtl_lora", "moelora", "lora_per_task"):
        built.freeze_shared("d")
        built(ids, task_ids=["a", "d"], labels=ids).loss.backward()
        own = {n: p.grad for n, p in built.named_parameters() if p.requires_grad}
        assert all((grad[:3] == 0).all() and (grad[3] != 0).any() for grad in own.values())
    else:
        with pytest.raises(MTLLoRAError, match="per-task parts"):
            built.freeze_shared("d")


def test_an_unknown_method_or_field_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="got 'lorra'"):
        build_adapter("lorra", tiny_llama, TASKS)
    with pytest.raises(ConfigError, match="got \\['rank'\\]"):
        build_adapter("mtl_lora", tiny_llama, TASKS, rank=4)
    with pytest.raises(ConfigError, match="got 2 < 3"):
        build_adapter("moelora", tiny_llama, TASKS, r=2)


@pytest.mark.parametrize("sizes", [{"r": 1 << 33}, {"r": 1 << 80}, {"rank_pattern": {"q_proj": 1 << 40}}])
def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_made(method, tiny_llama, tmp_path, sizes):
    plain = clone(tiny_llama)
    build_adapter(method, tiny_llama, TASKS, r=4, num_up_projections=2).save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    description = json.loads(path.read_text())
    description["config"] |= sizes
    path.write_text(json.dumps(description))
    write_hashes(tmp_path, WEIGHTS_FILE, CONFIG_FILE)
    with pytest.raises(AdapterFileError, match=r"configuration (must )?asks? for"):
        load_adapter(plain, tmp_path)
