"""Each row is served by its own task's adapter, in every way that a model can be run."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.errors import RoutingError
from tests.mtl_lora.conftest import Stack, clone, make_model


def _alone(model, x, ids):
    """Return the outputs of a loop over rows, each as a batch of one."""
    return torch.cat([model(row[None], task_ids=int(task)) for row, task in zip(x, ids, strict=True)])


def _gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=25, deadline=None)
@given(ids=st.lists(st.integers(0, 2), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_a_batch_equals_its_rows_alone(ids, seed):
    model = make_model()
    x = torch.randn(len(ids), 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(model(x, task_ids=ids), _alone(model, x, ids), rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(list(range(6))))
def test_a_permuted_batch_permutes_the_output(order):
    model = make_model()
    x = torch.randn(6, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1, 2, 0, 1, 1])
    y = model(x, task_ids=ids)
    torch.testing.assert_close(model(x[list(order)], task_ids=ids[list(order)]), y[list(order)], rtol=1e-12, atol=0)


def test_ids_a_token_route_packed_sequences(model):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 0, 1]])
    y = model(x, task_ids=ids)
    for task in range(3):
        torch.testing.assert_close(y[ids == task], model(x, task_ids=task)[ids == task], rtol=1e-10, atol=1e-10)


def test_one_task_may_be_an_id_a_name_or_a_tensor(model):
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    expected = model(x, task_ids=torch.tensor([1, 1, 1]))
    for one in (1, "b", torch.tensor(1), ["b", "b", "b"], torch.tensor([1, 1, 1], dtype=torch.int32)):
        torch.testing.assert_close(model(x, task_ids=one), expected, rtol=1e-12, atol=1e-12)


def test_rows_without_a_sequence_axis(model):
    x = torch.randn(3, 6, dtype=torch.float64)
    ids = [0, 2, 1]
    torch.testing.assert_close(model(x, task_ids=ids), _alone(model, x, ids), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, "must be given"),
        ([0, 3], r"\[0, 3\), got 0..3"),
        (-1, "got -1"),
        ("z", "got 'z'"),
        (torch.tensor([0.0, 1.0]), "whole numbers"),
        ([0, 1, 2], "one id for each row"),
        (torch.zeros(2, 9, dtype=torch.int64), "one id for each row or token"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), "shape"),
    ],
)
def test_wrong_ids_are_refused(model, ids, message):
    with pytest.raises(RoutingError, match=message):
        model(torch.randn(2, 4, 6, dtype=torch.float64), task_ids=ids)


def test_a_single_task_needs_no_ids():
    model = make_model(tasks=("only",))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x, task_ids=0))


def test_a_layer_outside_of_its_model_says_so():
    model = make_model()
    with pytest.raises(RoutingError, match="not its base"):
        model.base_model(torch.randn(2, 3, 6, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("per_token", [False, True])
def test_checkpointed_gradients_equal_plain_ones(kind, per_token):
    model = make_model()
    checkpointed = clone(model)
    checkpointed.base_model.checkpointing = kind
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(3, (4, 3)) if per_token else torch.tensor([2, 0, 1, 2])
    expected = _gradients(model, model(x, task_ids=ids))
    got = _gradients(checkpointed, checkpointed(x, task_ids=ids))
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_checkpointed_backward_recomputes_with_its_own_forwards_ids(kind, order):
    model = make_model()
    checkpointed = clone(model)
    checkpointed.base_model.checkpointing = kind
    x = torch.randn(2, 4, 3, 6, dtype=torch.float64, requires_grad=True)
    ids = [torch.tensor([0, 0, 1, 1]), torch.tensor([2, 1, 2, 0])]
    expected = [_gradients(model, model(x[i], task_ids=ids[i])) for i in order]
    outputs = [checkpointed(x[i], task_ids=ids[i]) for i in (0, 1)]
    with torch.no_grad():
        checkpointed(x[0], task_ids=2)
    for place, i in enumerate(order):
        for name, grad in _gradients(checkpointed, outputs[i]).items():
            torch.testing.assert_close(grad, expected[place][name], rtol=1e-12, atol=1e-12)


def test_one_backward_over_two_checkpointed_forwards():
    model = make_model()
    checkpointed = clone(model)
    checkpointed.base_model.checkpointing = "not_reentrant"
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = _gradients(model, torch.cat([model(x, task_ids=0), model(x, task_ids=[1, 2])]))
    got = _gradients(checkpointed, torch.cat([checkpointed(x, task_ids=0), checkpointed(x, task_ids=[1, 2])]))
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-12, atol=1e-12)


class _Nested(torch.nn.Module):
    """Checkpoints a stack that itself checkpoints its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack().double()
        self.kind: str | None = None

    def forward(self, x):
        self.stack.checkpointing = self.kind
        if self.kind is None:
            return self.stack(x)
        return torch.utils.checkpoint.checkpoint(self.stack, x, use_reentrant=self.kind == "reentrant")


@pytest.mark.parametrize("kind", ["reentrant", "not_reentrant"])
def test_nested_checkpoints_recompute_with_the_outer_forwards_ids(kind):
    torch.manual_seed(0)
    model = make_model(base=_Nested())
    nested = copy.deepcopy(model)
    nested.base_model.kind = kind
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    expected = _gradients(model, model(x, task_ids=[2, 0, 1]))
    y = nested(x, task_ids=[2, 0, 1])
    nested(x, task_ids=1)
    for name, grad in _gradients(nested, y).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


def test_a_forgotten_forward_is_an_error_and_not_a_wrong_gradient():
    model = make_model()
    model.base_model.checkpointing = "not_reentrant"
    x = torch.randn(1, 6, dtype=torch.float64)
    first = model(x, task_ids=0)
    for _ in range(300):
        model(x, task_ids=1)
    with pytest.raises(RoutingError, match="run the backward sooner"):
        first.sum().backward()


def test_a_nested_forward_gives_the_outer_one_its_ids_back(model):
    class Asking(torch.nn.Module):
        def __init__(self, inner, asked):
            super().__init__()
            self.first, self.asked = inner, asked

        def forward(self, x):
            before = self.first(x)
            self.asked(x, task_ids=2)
            return before + self.first(x)

    x = torch.randn(2, 4, 6, dtype=torch.float64)
    layer = model.base_model.blocks[0].first
    outer = Asking(layer, model)
    with model.router.route(torch.tensor([0, 1])):
        y = outer(x)
    with model.router.route(torch.tensor([0, 1])):
        torch.testing.assert_close(y, 2 * layer(x))


@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_the_adapted_layers_compile_without_a_graph_break(model, layout):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ids in ([0, 2, 1], [1, 1, 2]):
        x = torch.randn(3, 4, 6, dtype=torch.float64)
        row = torch.tensor(ids)
        route = {"one": row[1], "row": row, "token": row[:, None].expand(3, 4).contiguous()}[layout]
        expected = _gradients(model, model(x, task_ids=route))
        for name, grad in _gradients(model, compiled(x, task_ids=route)).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-10)


def test_switching_the_adapter_off_gives_the_base():
    torch.manual_seed(0)
    base = Stack().double()
    model = make_model(base=clone(base))
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with model.disable_adapter():
        assert torch.equal(model(x, task_ids=1), base(x))
    assert not torch.equal(model(x, task_ids=1), base(x))


def test_a_copied_or_pickled_model_routes_by_itself(model):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    expected = model(x, task_ids=[0, 2])
    for twin in (clone(model), pickle.loads(pickle.dumps(model))):
        twin(x, task_ids=[1, 1])
        assert {layer.router for layer in twin.adapted_layers().values()} == {twin.router}
        assert model.router.ids.tolist() == [0, 2]
        assert torch.equal(twin(x, task_ids=[0, 2]), expected)


def test_forwards_of_several_threads_each_have_their_own_ids(model):
    for layer in model.adapted_layers().values():  # another thread may run between any two layers
        layer.register_forward_pre_hook(lambda *_: time.sleep(1e-3))
    tasks = [0, 1, 2, None]
    inputs = torch.randn(2, 4, 6, dtype=torch.float64)

    def ask(task):
        with torch.no_grad():
            if task is not None:
                return model(inputs, task_ids=task)
            with model.disable_adapter():
                return model(inputs, task_ids=0)

    alone = {task: ask(task) for task in tasks}
    asked = tasks * 8
    with ThreadPoolExecutor(8) as pool:
        for task, found in zip(asked, pool.map(ask, asked), strict=True):
            assert torch.equal(found, alone[task])
