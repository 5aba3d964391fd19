"""What is frozen below the adapter: where gradients end, and states that are a sample's own in any batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_lora import AdapterModel
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base
from pipeline.modeling.frozen_part import (
    AnyExample,
    FrozenPart,
    check_kept,
    count_nodes,
    example_key,
    find_frozen_part,
    node_sources,
    packed_apart,
)
from pipeline.modeling.kept_states import KeptStates
from pipeline.modeling.layer_cut import checkpoint_layers, count_frozen, numbered_layers
from pipeline.modeling.packing import Batch, micro_batches, pack
from pipeline.modeling.scoring import ClassScorer, label_loss
from tests.pipeline.modeling.tiny import tiny_encoder_folder, tiny_folder

TASKS = (
    TaskSpec(name="pair", template="Query: {a}\nAd: {b}\nRelevant:", label_words=(" no", " yes")),
    TaskSpec(name="pick", kind="choice", template="{a}?"),
    TaskSpec(
        name="grade", kind="ordinal", template="{a} or {b}", label_words=(" 0", " 1", " 2"), label_values=(0, 1, 2)
    ),
)
LAYERS, LONGEST = 4, 64
ENCODERS, MODELS = ("bert", "modernbert", "roberta"), ("llama", "qwen3")
TEXTS = ("x", "red sofa", "a longer text of a sofa", "blue", "a car or so")


def _samples(count: int) -> list[Sample]:
    found = []
    for i in range(count):
        a, b = TEXTS[i % 5], TEXTS[(i * i + 1) % 5]
        task = TASKS[i % 3]
        choices = ("this", "that one", "none of them") if task.kind == "choice" else ()
        found.append(Sample(key=str(i), task=task.name, fields={"a": a, "b": b}, label=1, choices=choices))
    return found


class _Case:
    """A tiny base, adapted from a layer on, with examples."""

    def __init__(self, folder: Path, kind: str, first: int = 2, **adapter: Any) -> None:
        save = tiny_encoder_folder if kind in ENCODERS else tiny_folder
        base = str(save(folder / kind, kind, num_hidden_layers=LAYERS))
        self.config = BaseModelConfig(base=base, max_length=LONGEST, dtype="float32")
        self.adapted = self.build(first, **adapter)
        self.examples: list[AnyExample] = list(sample_encoder(self.config, TASKS).encode(_samples(15)))
        self.scorer: ClassScorer = class_scorer(self.adapted)

    def build(self, first: int, **adapter: Any) -> AdapterModel:
        model = load_base(self.config)
        upper = tuple(range(first, LAYERS))
        config = AdapterConfig(
            **{"r": 2, "lora_dropout": 0.1, "layers_to_transform": upper, "layers_pattern": ("layers?",), **adapter}
        )
        torch.manual_seed(1)
        names = [task.name for task in TASKS]
        adapted = build_adapter(config, model, names, classes_of_heads(model, TASKS))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return adapted

    def find(self) -> FrozenPart:
        found = find_frozen_part(self.adapted, LONGEST)
        assert isinstance(found, FrozenPart), found
        return found

    def gradients(self, batch: Batch) -> list[torch.Tensor]:
        """Return losses and gradients of a batch in training mode."""
        self.adapted.train()
        self.adapted.zero_grad()
        torch.manual_seed(2)
        losses = label_loss(self.scorer(batch), batch)
        losses.sum().backward()
        return [losses.detach(), *(p.grad.clone() for p in self.adapted.parameters() if p.grad is not None)]

    def kept(self, folder: Path, max_bytes: int = 1 << 24, **more: Any) -> KeptStates:
        return KeptStates(folder, max_bytes, {}, self.adapted.config.hidden_size, torch.float32, **more)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, _Case]:
    return {kind: _Case(tmp_path_factory.mktemp(kind), kind) for kind in (*ENCODERS, *MODELS)}


def _same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize(("kind", "first"), [("bert", 0), ("bert", 2), ("llama", 3)])
def test_gradients_end_at_the_first_adapted_layer(tmp_path: Path, kind: str, first: int, checkpoints: bool) -> None:
    case = _Case(tmp_path, kind, first)
    if checkpoints:
        checkpoint_layers(case.adapted.base_model)
    outputs: list[torch.Tensor] = []
    for layer in numbered_layers(case.adapted.base_model):
        layer.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    case.gradients(pack(case.examples))
    assert [output.requires_grad for output in outputs[:LAYERS]] == [number >= first for number in range(LAYERS)]
    embedded = case.adapted.base_model.get_input_embeddings().weight  # type: ignore[operator]
    assert embedded.grad is None


@pytest.mark.parametrize(
    ("adapter", "frozen"),
    [({}, 2), ({"bias": "lora_only"}, 2), ({"bias": "all"}, 0), ({"train_layer_norms": True}, 0)],
)
def test_trained_biases_and_norms_count_as_trained_layers(tmp_path: Path, adapter: dict[str, Any], frozen: int) -> None:
    case = _Case(tmp_path, "bert", **adapter)
    inputs = packed_apart(case.adapted.base_model, case.examples)
    with case.adapted.router.route(torch.zeros_like(inputs["input_ids"])):
        assert count_frozen(case.adapted.base_model, lambda: case.adapted.base_model(**inputs)) == (frozen, True)


@pytest.mark.parametrize("kind", [*ENCODERS, *MODELS])
def test_the_model_in_two_parts_is_the_whole_one(cases: dict[str, _Case], kind: str) -> None:
    case = cases[kind]
    batch = pack(case.examples)
    case.scorer.frozen = None
    whole = case.gradients(batch)
    case.scorer.frozen = case.find()
    for one, other in zip(whole, case.gradients(batch), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*ENCODERS, *MODELS])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**20), budget=st.integers(20, 600))
def test_states_are_a_samples_own_in_any_batch(cases: dict[str, _Case], kind: str, seed: int, budget: int) -> None:
    case = cases[kind]
    part = case.find()
    order = torch.randperm(len(case.examples), generator=torch.Generator().manual_seed(seed)).tolist()
    examples = [case.examples[i] for i in order]
    for some in micro_batches(examples, budget):
        for i, states in zip(some, part.compute([examples[i] for i in some]), strict=True):
            assert torch.equal(states, part.compute([examples[i]])[0])


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_kept_states_give_the_losses_and_gradients_of_computed_ones_to_the_last_bit(
    cases: dict[str, _Case], tmp_path: Path, kind: str, checkpoints: bool
) -> None:
    case = cases[kind]
    case.scorer.frozen = part = case.find()
    if checkpoints:
        checkpoint_layers(case.adapted.base_model)
    batches = [pack([case.examples[i] for i in some]) for some in micro_batches(case.examples, 120)]
    others = [pack([case.examples[i] for i in some]) for some in micro_batches(case.examples[::-1], 200, 4)]
    computed = [case.gradients(batch) for batch in (*batches, *others)]
    part.kept = case.kept(tmp_path)
    first = [case.gradients(batch) for batch in part.read_ahead(iter((*batches, *others)))]
    found = part.kept.count_read
    second = [case.gradients(batch) for batch in part.read_ahead(iter((*batches, *others)))]
    assert part.kept.count_read - found == 2 * len(case.examples)
    part.kept = case.kept(tmp_path / "small", max_bytes=20_000)  # too few for all: some go while others are used
    with_evictions = [case.gradients(batch) for batch in (*others, *batches, *others, *batches)]
    assert part.kept.count_missed
    case.adapted.base_model.gradient_checkpointing_disable()  # type: ignore[operator]
    for number, expected in enumerate(computed):
        assert _same(expected, first[number])
        assert _same(expected, second[number])
    again = with_evictions[-len(batches) :] + with_evictions[: len(others)]
    assert all(_same(one, other) for one, other in zip(computed, again, strict=True))


def test_int8_states_are_near_and_do_not_depend_on_what_is_kept(cases: dict[str, _Case], tmp_path: Path) -> None:
    case = cases["llama"]
    case.scorer.frozen = part = case.find()
    batch = pack(case.examples)
    exact = case.gradients(batch)[0]
    part.kept = case.kept(tmp_path, precision="int8")
    first, second = case.gradients(batch), case.gradients(batch)
    assert _same(first, second)
    assert not torch.equal(exact, first[0])
    torch.testing.assert_close(exact, first[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_node_takes_its_state_from_the_first_sample_that_has_it(cases: dict[str, _Case], kind: str) -> None:
    examples = cases[kind].examples
    batch = pack(examples)
    own = [pack([example]) for example in examples]
    assert [len(one.input_ids) for one in own] == [count_nodes(example) for example in examples]
    sources = node_sources(examples)
    for name in ("input_ids", "position", "token_type"):
        assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in own])[sources])


def test_a_key_knows_the_tokens_and_nothing_of_task_or_label(cases: dict[str, _Case]) -> None:
    keys = [example_key(example) for kind in ("bert", "llama") for example in cases[kind].examples]
    distinct = {
        (getattr(e, "prompt", None), getattr(e, "rows", None), getattr(e, "token_types", None), getattr(e, "words", ()))
        for kind in ("bert", "llama")
        for e in cases[kind].examples
    }
    assert len(set(keys)) == len(distinct)
    task = TASKS[0].model_copy(update={"name": "other", "label_words": (" yes", " no")})
    sample = _samples(1)[0]
    (one,) = sample_encoder(cases["llama"].config, TASKS).encode([sample])
    (other,) = sample_encoder(cases["llama"].config, [*TASKS, task]).encode(
        [sample.model_copy(update={"task": "other"})]
    )
    assert one.task != other.task
    assert example_key(one) == example_key(other)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("bert", {"first": 0}, "layer 0 of 4 is trained"),
        ("llama", {"first": 0}, "layer 0 of 4 is trained"),
        ("gpt2", {"target_modules": ("attn.c_attn",), "layers_pattern": ("h",)}, "its own dropout is on"),
        ("deberta-v2", {}, "its rows are padded"),
        ("albert", {"layers_to_transform": (), "layers_pattern": ()}, "no plain list of its layers"),
    ],
)
def test_keeping_is_refused_where_nothing_can_be_kept(
    tmp_path: Path, kind: str, changes: dict[str, Any], told: str
) -> None:
    save = tiny_folder if kind in ("llama", "gpt2") else tiny_encoder_folder
    base = str(save(tmp_path / kind, kind, **{"n_layer" if kind == "gpt2" else "num_hidden_layers": LAYERS}))
    model = load_base(BaseModelConfig(base=base, max_length=LONGEST, dtype="float32"))
    first = changes.pop("first", 2)
    layers = {"layers_to_transform": tuple(range(first, LAYERS)), "layers_pattern": ("layers?",)}
    config = AdapterConfig(**{"r": 2, **layers, **changes})
    names = [task.name for task in TASKS]
    adapted = build_adapter(config, model, names, classes_of_heads(model, TASKS))
    found = find_frozen_part(adapted, LONGEST)
    with pytest.raises(InputError, match=f"needs frozen layers below the adapter.*{told}.*leave training.kept_states"):
        check_kept(found, is_exact=True)


def test_exact_states_are_refused_where_neighbours_change_them(
    cases: dict[str, _Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases["bert"]
    part = case.find()
    layer: Any = numbered_layers(case.adapted.base_model)[0]
    own = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *args, **more: own(x + 1e-3 * x.mean(), *args, **more))
    with pytest.raises(InputError, match=r"states of a row differ.*precision=int8"):
        check_kept(part, is_exact=True)
    assert check_kept(part, is_exact=False) is part


def test_ranks_compute_equally_often_where_they_must(cases: dict[str, _Case]) -> None:
    case = cases["llama"]
    part = case.find()
    runs: list[int] = []
    own = part.layers.below
    part.layers.below = lambda inputs: runs.append(1) or own(inputs)  # type: ignore[method-assign,func-returns-value]
    part.agree = lambda mine: mine + 2
    part.states(pack(case.examples[:1]))
    assert len(runs) == 3


@pytest.mark.slow
@pytest.mark.parametrize("base", ["minilm-l6", "smollm2-135m-instruct"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])  # emulated by most
def test_states_of_an_embedded_base_are_a_samples_own_in_any_batch(base: str, dtype: str) -> None:
    config = BaseModelConfig(base=base, max_length=LONGEST, dtype=dtype)  # type: ignore[arg-type]
    model = load_base(config)
    adapted = build_adapter(
        AdapterConfig(r=2, layers_to_transform=(4, 5)), model, ["pair", "pick", "grade"], classes_of_heads(model, TASKS)
    )
    part = find_frozen_part(adapted, LONGEST)
    assert isinstance(part, FrozenPart)
    assert part.layers.cut == 4
    assert part.objection() == ""
    examples = sample_encoder(config, TASKS).encode(_samples(15))
    alone = [part.compute([example])[0] for example in examples]
    for budget in (100, 300, 2000):
        for some in micro_batches(examples, budget):
            for i, states in zip(some, part.compute([examples[i] for i in some]), strict=True):
                assert torch.equal(states, alone[i])
