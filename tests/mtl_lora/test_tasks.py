"""Tasks come and go without touching the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mtl_lora import MTLLoRAModel, build_adapter, parameter_groups
from mtl_lora.errors import MTLLoRAError, TaskError
from tests.mtl_lora.conftest import Stack, make_model


def _outputs(model, x, names):
    return {name: model(x, task_ids=name) for name in names}


@settings(max_examples=20, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["mean", "copy", "remove", "rename"]), min_size=1, max_size=5),
    transform=st.sampled_from(["full", "diagonal"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_other_tasks_outputs_stay_bit_identical(steps, transform, dtype):
    model = make_model(transform=transform, dtype=dtype)
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    kept = ["a", "b"]
    per_row, per_token = torch.tensor([0, 1, 1, 0]), torch.tensor([[0, 1, 1, 0, 1]] * 4)
    before = _outputs(model, x, kept)
    mixed = [model(x, task_ids=ids) for ids in (per_row, per_token)]
    for number, step in enumerate(steps):
        if step == "mean":
            model.add_task(f"new{number}")
        elif step == "copy":
            model.add_task(f"new{number}", source="a")
        elif step == "rename":
            model.rename_task(len(model.task_names) - 1, f"renamed{number}") if len(model.task_names) > 2 else None
        elif len(model.task_names) > 2:
            model.remove_task(len(model.task_names) - 1)
    after = _outputs(model, x, kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    for old, ids in zip(mixed, (per_row, per_token), strict=True):
        assert torch.equal(old, model(x, task_ids=ids))


def test_a_copied_task_starts_as_its_source_and_the_mean_as_the_mean(model):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert model.add_task("like b", source="b") == 3
    assert torch.equal(model(x, task_ids="like b"), model(x, task_ids="b"))
    model.remove_task("like b")
    model.add_task("mean")
    layer = model.base_model.blocks[0].first
    torch.testing.assert_close(layer.lora_transform[3], layer.lora_transform[:3].mean(0))


def test_removing_a_task_moves_later_ids_down(model):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    last = model(x, task_ids="c")
    model.remove_task("a")
    assert model.task_names == ("b", "c")
    assert torch.equal(model(x, task_ids=1), last)


def test_changed_tasks_are_saved_and_loaded(model, tmp_path):
    model.add_task("d", source="a")
    model.rename_task("b", "beta")
    model.remove_task("c")
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = MTLLoRAModel.from_pretrained(Stack().double(), tmp_path, task_names=["a", "beta", "d"])
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    assert torch.equal(loaded(x, task_ids=[0, 1, 2]), model(x, task_ids=[0, 1, 2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.add_task("a"), "must be free, got 'a'"),
        (lambda m: m.add_task("d", source="zz"), "must be known, got 'zz'"),
        (lambda m: m.remove_task("zz"), "must be known"),
        (lambda m: m.rename_task("a", "b"), "must be free"),
        (lambda m: m.remove_task(7), "got 7"),
    ],
)
def test_wrong_names_are_refused(model, change, message):
    with pytest.raises(TaskError, match=message):
        change(model)
    assert model.task_names == ("a", "b", "c")


def test_the_last_task_stays_and_merged_models_do_not_change():
    model = make_model(tasks=("only",))
    with pytest.raises(TaskError, match="the last"):
        model.remove_task("only")
    model.merge("only")
    with pytest.raises(MTLLoRAError, match="unmerge"):
        model.add_task("other")


def _step(model, optimizer, x, ids):
    optimizer.zero_grad()
    model(x, task_ids=ids).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_freeze_shared_moves_only_the_new_tasks_rows(model, name):
    model.add_task("new")
    model.freeze_shared("new")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups = parameter_groups(model, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=0.1) if name == "adamw" else torch.optim.SGD(groups, 0.1, momentum=0.9)
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    for _ in range(3):
        _step(model, optimizer, x, [3, 3, 0, 1])
    for key, value in model.state_dict().items():
        if key.endswith(("lora_transform", "lora_mixing")):
            assert torch.equal(value[:3], before[key][:3])
            assert not torch.equal(value[3], before[key][3])
        else:
            assert torch.equal(value, before[key])
    model.unfreeze()
    model(x, task_ids=[3, 3, 0, 1]).sum().backward()
    layer = model.base_model.blocks[0].first
    assert layer.lora_A.requires_grad and layer.lora_transform.grad[0].abs().sum() > 0


def test_a_task_never_seen_stays_bit_identical_under_momentum_and_decay(model):
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.05)
    layer = model.base_model.blocks[0].first
    before = layer.lora_transform[2].clone(), layer.lora_mixing[2].clone(), layer.lora_A.clone()
    for _ in range(5):
        _step(model, optimizer, torch.randn(4, 3, 6, dtype=torch.float64), [0, 1, 1, 0])
    assert torch.equal(layer.lora_transform[2], before[0]) and torch.equal(layer.lora_mixing[2], before[1])
    assert not torch.equal(layer.lora_A, before[2])


def test_an_absent_tasks_drift_by_momentum_is_bounded(model):
    rate = 0.01
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=rate)
    layer = model.base_model.blocks[0].first
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    for _ in range(20):
        _step(model, optimizer, x, [0, 1, 2, 0])
    last_seen = layer.lora_transform[2].clone()
    drifts = []
    for _ in range(300):
        _step(model, optimizer, x, [0, 1, 1, 0])
        drifts.append((layer.lora_transform[2] - last_seen).abs().max().item())
    assert 0 < drifts[-1] <= 10.0 * rate
    assert abs(drifts[-1] - drifts[150]) < 1e-4 * rate


METHODS_WITH_TASK_PARTS = ["mtl_lora", "moelora", "lora_per_task"]


@pytest.mark.parametrize("method", ["mtl_lora", "moelora", "multilora", "lora", "dora", "lora_per_task"])
@pytest.mark.parametrize("rate", [None, 0.5])
def test_decay_spares_what_a_task_owns_and_every_vector(method, rate):
    model = build_adapter(method, Stack(), ["a", "b"], r=2, num_up_projections=2, target_modules=["first"])
    model.base_model.head.requires_grad_(True)  # a matrix and a vector besides the adapter
    holder = nn.ModuleDict({"adapted": model, "weighting": nn.ParameterList([nn.Parameter(torch.zeros(2))])})
    owned = {
        id(getattr(layer, name)) for layer in model.adapted_layers().values() for name in layer.task_parameter_names
    }
    assert bool(owned) is (method in METHODS_WITH_TASK_PARTS)
    groups = parameter_groups(holder, weight_decay=0.1, task_learning_rate=rate)
    found = {id(p): group for group in groups for p in group["params"]}
    trainable = [p for p in holder.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable)
    for p in trainable:
        assert found[id(p)]["weight_decay"] == (0.1 if p.dim() > 1 and id(p) not in owned else 0.0)
        assert found[id(p)].get("lr") == (rate if id(p) in owned else None)


def test_nothing_to_train_is_refused_before_an_optimizer_is_made():
    with pytest.raises(MTLLoRAError, match="must train at least one parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.0)
