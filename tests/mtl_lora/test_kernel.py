"""The hand-written function against nested loops, in values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora.dropout import dropout_mask
from mtl_lora.kernel import _plain, _Settings, adapted_linear
from tests.reference.mtl_lora_reference import mtl_lora_linear

OPTIONS = {"temperature": 0.5, "scaling": 2.0}
NAMES = ("x", "weight", "bias", "down", "up", "transform", "mixing")


def _run(x, weight, bias, down, up, transform, mixing, ids, **options):
    factors = {"down_RI": down, "up_NOR": up, "transform": transform, "mixing_TN": mixing}
    return adapted_linear(x, weight, bias, **factors, ids=ids, **options)


def _run_traced(*tensors, temperature, scaling, trainable_tasks=None):
    """The formula that a compiler sees, without waiting for the compiler."""
    return _plain(*tensors, _Settings(temperature, scaling, 0.0, torch.float64, trainable_tasks, False))


def _problem(batch, sequence, size_in, size_out, r, tasks, ups, full, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    transform = random(tasks, r, r) if full else random(tasks, r)
    tensors = [
        random(batch, sequence, size_in),
        random(size_out, size_in),
        random(size_out),
        random(r, size_in),
        random(ups, size_out, r),
        transform,
        random(tasks, ups),
    ]
    ids = torch.randint(tasks, (batch, sequence), generator=generator)
    return tensors, ids


def _laid_out(x, ids, layout):
    """Return x, ids in a kernel layout, and the id of every flattened row."""
    batch, sequence, size = x.shape
    if layout == "one":
        return x.reshape(1, -1, size), ids[0, 0], [int(ids[0, 0])] * (batch * sequence)
    if layout == "row":
        return x, ids[:, 0].clone(), ids[:, :1].expand(batch, sequence).flatten().tolist()
    return x.reshape(-1, size), ids.reshape(-1, 1), ids.flatten().tolist()


def _gradients(y, tensors, seed):
    weights = torch.randn(y.numel(), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((y.flatten() * weights.to(y.dtype)).sum(), tensors)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 5),
    sequence=st.integers(1, 3),
    size_in=st.integers(1, 5),
    size_out=st.integers(1, 5),
    r=st.integers(1, 3),
    tasks=st.integers(1, 4),
    ups=st.integers(1, 4),
    full=st.booleans(),
    layout=st.sampled_from(["one", "row", "token"]),
    temperature=st.floats(0.05, 3),
    seed=st.integers(0, 10_000),
)
def test_values_and_gradients_equal_nested_loops(
    batch, sequence, size_in, size_out, r, tasks, ups, full, layout, temperature, seed
):
    tensors, ids = _problem(batch, sequence, size_in, size_out, r, tasks, ups, full, seed)
    x, route, flat_ids = _laid_out(tensors[0], ids, layout)
    expected = mtl_lora_linear(x.reshape(-1, size_in), *tensors[1:], flat_ids, temperature, 1.7)
    expected_grads = _gradients(expected, tensors, seed)
    for function in (_run, _run_traced):
        y = function(x, *tensors[1:], route, temperature=temperature, scaling=1.7).reshape(-1, size_out)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for name, ours, theirs in zip(NAMES, _gradients(y, tensors, seed), expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_gradcheck(layout):
    tensors, ids = _problem(3, 2, 3, 4, 2, 3, 2, True, 0)
    x, route, _ = _laid_out(tensors[0], ids, layout)
    x = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: _run(*t, route, **OPTIONS), (x, *tensors[1:]))


@pytest.mark.parametrize("layout", ["one", "row", "token"])
@pytest.mark.parametrize("batch", [2, 5])
def test_without_gradients_the_values_are_the_same(layout, batch):
    tensors, ids = _problem(batch, 3, 4, 5, 2, 3, 2, True, 6)
    x, route, _ = _laid_out(tensors[0], ids, layout)
    expected = _run(x, *tensors[1:], route, **OPTIONS)
    with torch.no_grad():
        assert torch.equal(_run(x, *tensors[1:], route, **OPTIONS), expected)


@pytest.mark.parametrize("needed", range(7))
def test_each_gradient_alone_equals_the_joint_one(needed):
    tensors, ids = _problem(4, 2, 3, 5, 2, 3, 2, True, 1)
    joint = _gradients(_run(*tensors, ids[:, 0], **OPTIONS), tensors, 0)
    alone = [t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors)]
    (got,) = _gradients(_run(*alone, ids[:, 0], **OPTIONS), [alone[needed]], 0)
    torch.testing.assert_close(got, joint[needed], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_absent_task_gets_exactly_zero_gradient(layout):
    tensors, ids = _problem(4, 2, 3, 5, 2, 4, 2, True, 2)
    ids = ids % 2
    x, route, _ = _laid_out(tensors[0], ids, layout)
    y = _run(x, *tensors[1:], route, **OPTIONS)
    grads = torch.autograd.grad(y.sum(), tensors[5:])
    assert all(bool((grad[2:] == 0).all()) for grad in grads)


@pytest.mark.parametrize("layout", ["one", "row", "token"])
def test_dropout_in_the_backward_is_that_of_the_forward(layout):
    tensors, ids = _problem(4, 3, 6, 5, 2, 3, 2, True, 3)
    x, route, _ = _laid_out(tensors[0], ids, layout)
    torch.manual_seed(11)
    y = _run(x, *tensors[1:], route, **OPTIONS, dropout=0.4)
    torch.manual_seed(11)
    mask, factor = dropout_mask(x, 0.4)
    _, weight, bias, down, up, transform, mixing = tensors
    dropped = x * mask * factor
    base = torch.nn.functional.linear(x, weight, bias)
    zero = torch.zeros_like(weight)
    expected = base + _run_traced(dropped, zero, None, down, up, transform, mixing, route, **OPTIONS)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(_gradients(y, tensors, 4), _gradients(expected, tensors, 4), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.9])
def test_dropout_keeps_independent_features_with_the_stated_probability(probability):
    torch.manual_seed(0)
    mask, factor = dropout_mask(torch.empty(1000, 403), probability)
    kept = mask.double().mean().item()
    assert abs(kept - (1 - probability)) < 5 * (probability * (1 - probability) / mask.numel()) ** 0.5
    assert abs(factor * (1 - probability) - 1) < 2e-4
    columns = mask.double() - kept
    neighbours = (columns[:, :-1] * columns[:, 1:]).mean().item()
    assert abs(neighbours) < 5 / mask.numel() ** 0.5
    assert mask.unique().tolist() == [0, 1]


def test_frozen_tasks_get_exactly_zero_gradient():
    tensors, ids = _problem(5, 2, 3, 4, 2, 3, 2, True, 5)
    for function in (_run, _run_traced):
        y = function(*tensors, ids[:, 0], **OPTIONS, trainable_tasks=(1,))
        grads = torch.autograd.grad(y.sum(), tensors[5:])
        assert all(bool((grad[[0, 2]] == 0).all()) for grad in grads)
