"""What stands below the first adapted layer: the same states of a sample in every epoch, made one way and kept.

A sample's states must not depend on the batch that it stands in, else those that are kept would differ in the last bit
from those that are computed. So samples share nothing here, a row attends alone (on an accelerator with those of its
very length), and every pass has the same number of nodes: the shapes in which sums are taken are then the row's own.
Whether that is enough on the machine at hand is proven on a few rows before states are kept.

Axes: M nodes, H hidden size; see :mod:`pipeline.modeling.packing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_lora import AdapterModel
from pipeline.errors import InputError
from pipeline.modeling import packed_attention
from pipeline.modeling.architecture import is_image_text
from pipeline.modeling.kept_states import KeptStates
from pipeline.modeling.layer_cut import LayerCut, count_frozen, numbered_layers
from pipeline.modeling.packing import Batch, Example, HeadExample, Trie, row_places
from pipeline.prefetch import prefetch

_PASS_NODES = {"cpu": 256, "cuda": 2048}
"""Nodes that go through the frozen layers together, always as many; those of a longer sample alone, in multiples."""
_PROBE_LENGTHS = (3, 17, 5, 33, 17, 64, 9, 48, 1, 12, 7, 24)
_READ_AHEAD = 2

AnyExample = Example | HeadExample


def example_key(example: AnyExample) -> bytes:
    """Return a digest of what an example's states follow from, beside the model: its tokens and how they are laid out,
    whatever its task, label or weight."""
    if isinstance(example, HeadExample):
        layout: tuple[Any, ...] = ("rows", example.rows, example.token_types)
    else:
        # Of a word the last token is not read, so words of one token add nothing.
        layout = ("words", example.prompt, tuple(dict.fromkeys(w[:-1] for w in example.words if len(w) > 1)))
    return hashlib.sha256(repr(layout).encode()).digest()


def pass_nodes(model: Any) -> int:
    """Return how many nodes go through a model's frozen layers together."""
    return _PASS_NODES.get(model.device.type, _PASS_NODES["cuda"])


def packed_apart(model: Any, examples: Sequence[AnyExample]) -> dict[str, Any]:
    """Return a model's arguments for the nodes of examples one after another, none of them shared, then filling."""
    trie, rows = Trie(), []
    for number, example in enumerate(examples):
        if isinstance(example, HeadExample):
            rows += trie.add_rows(example)
        else:
            prompt, ends = trie.add(replace(example, task=number))
            rows += list({end[-1]: end for end in ends if len(end) > len(prompt)}.values()) or [prompt]
    filling = -len(trie.tokens) % pass_nodes(model)
    ids, types = [*trie.tokens, *[0] * filling], [*trie.types, *[0] * filling]
    reading, device = getattr(model, "row_reading", None), model.device
    groups = _groups(sorted(rows, key=len, reverse=True), is_alone=device.type == "cpu")
    if filling:
        groups.append(np.arange(len(trie.tokens), len(ids))[:, None])
    position = torch.tensor([*trie.positions, *[0] * filling]) + (reading.first_position if reading else 0)
    inputs = packed_attention.packed_inputs(
        torch.tensor(ids, device=device),
        position.to(device),
        tuple(torch.from_numpy(group).to(device) for group in groups),
        torch.from_numpy(row_places(groups, len(ids))).to(device),
        masks=(None,) * len(groups) if reading else (),
    )
    if reading and reading.has_segments:
        inputs["token_type_ids"] = torch.tensor(types, device=device)[None]
    return inputs


def _groups(rows: list[list[int]], is_alone: bool) -> list[np.ndarray]:
    """Return rows, the longest first, in groups that attend together: on a CPU several threads share out the rows of a
    group, and what each sums up depends on their number."""
    if is_alone:
        return [np.array([row]) for row in rows]
    return [np.array(list(same)) for _, same in groupby(rows, key=len)]


def node_sources(examples: Sequence[AnyExample]) -> Tensor:
    """Return for each node of a packed batch its place among the nodes of its examples one after another, (M,); a
    shared node's is that in the first example that has it."""
    trie, found, start = Trie(), dict[int, int](), 0
    for example in examples:
        if isinstance(example, HeadExample):
            own = [node for row in trie.add_rows(example) for node in row]
        else:
            prompt, ends = trie.add(example)
            own = list(dict.fromkeys([*prompt, *(node for end in ends for node in end)]))
        for place, node in enumerate(own):
            found.setdefault(node, start + place)
        start += len(own)
    return torch.tensor([found[node] for node in range(len(found))])


def count_nodes(example: AnyExample) -> int:
    """Return the number of an example's own nodes."""
    if isinstance(example, HeadExample):
        return example.num_tokens
    return len(example.prompt) + len({word[:k] for word in example.words for k in range(1, len(word))})


class FrozenPart:
    """The states of samples below the first adapted layer, computed in one way, or read where they are kept.

    Args:
        model: a Hugging Face model that takes packed rows.
        cut: layers below it.
        longest: tokens of the longest row.
        agree: returns the largest of the ranks' numbers, where all must compute equally often; None where they need
            not.

    Attributes:
        kept: where states are kept; None where each is computed anew.
    """

    def __init__(self, model: Any, cut: int, longest: int, agree: Callable[[int], int] | None = None) -> None:
        self.model, self.longest, self.agree = model, longest, agree
        self.layers = LayerCut(model, cut)
        self.kept: KeptStates | None = None

    def compute(self, examples: Sequence[AnyExample]) -> list[Tensor]:
        """Return the states (M, H) of each example's own nodes."""
        found: list[Tensor] = []
        for part in self._passes(examples):
            sizes = [count_nodes(example) for example in part]
            states_MH = self.layers.below(packed_apart(self.model, part))
            found += states_MH[: sum(sizes)].split(sizes)
        return found[: len(examples)]

    def read_ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield batches with the states of theirs that are kept, read while the one before is computed."""
        if self.kept is None:
            return batches
        return prefetch(map(self._with_kept, batches), _READ_AHEAD)

    def _with_kept(self, batch: Batch) -> Batch:
        if self.kept is None:
            return batch
        return replace(batch, kept=tuple(self.kept.read([example_key(example) for example in batch.examples])))

    @contextmanager
    def begun(self, batch: Batch) -> Iterator[None]:
        """Let the model run inside on a batch's nodes from their frozen states on."""
        with self.layers.above(self.states(batch)):
            yield

    def states(self, batch: Batch) -> Tensor:
        """Return the states (M, H) of a packed batch's nodes."""
        batch = batch if batch.kept else self._with_kept(batch)
        found = list(batch.kept or [None] * len(batch.examples))
        missing = [place for place, states in enumerate(found) if states is None]
        fresh = self.compute([batch.examples[place] for place in missing])
        if self.kept is not None and fresh:
            fresh = self.kept.keep([example_key(batch.examples[place]) for place in missing], fresh)
        for place, states in zip(missing, fresh, strict=True):
            found[place] = states
        device = self.model.device
        together = torch.cat([states.to(device, non_blocking=True) for states in found if states is not None])
        return together[node_sources(batch.examples).to(device)]

    def _passes(self, examples: Sequence[AnyExample]) -> list[list[AnyExample]]:
        """Return which examples go through the frozen layers together, one of filling where other ranks have more."""
        passes: list[list[AnyExample]] = []
        nodes, most = 0, pass_nodes(self.model)
        for example in examples:
            size = count_nodes(example)
            if not passes or nodes + size > most:
                passes.append([])
                nodes = 0
            passes[-1].append(example)
            nodes += size
        if self.agree is not None:  # frozen weights are gathered from all ranks
            filling = _probe_examples(self.model, (1,))
            passes += [filling] * (self.agree(len(passes)) - len(passes))
        return passes

    def objection(self) -> str:
        """Return why a row's states depend on its neighbours or on chance, empty where a few rows show none."""
        examples = _probe_examples(self.model, [min(length, self.longest) for length in _PROBE_LENGTHS])
        alone = [self.compute([example])[0] for example in examples]
        half = len(examples) // 2
        orders = [list(range(len(examples)))[::step] for step in (1, -1)]
        for order in [*orders, list(range(half)), [*range(half, len(examples)), 0]]:
            for i, states in zip(order, self.compute([examples[i] for i in order]), strict=True):
                if not torch.equal(states, alone[i]):
                    apart = (states.float() - alone[i].float()).abs().max()
                    return f"states of a row differ by {apart:.2g} with its neighbours"
        return ""


def _probe_examples(model: Any, lengths: Sequence[int]) -> list[AnyExample]:
    size = model.get_input_embeddings().num_embeddings
    found: list[AnyExample] = []
    for number, length in enumerate(lengths):
        row = tuple(size // 3 + (7 * i + 31 * number) % (size // 2) for i in range(length))
        if hasattr(model, "row_reading"):
            found.append(HeadExample("probe", 0, (row,), ((0,) * length,), (0,), (1.0,)))
        else:
            found.append(Example("probe", 0, row, ((row[0],), (row[-1],)), (1.0, 0.0), False))
    return found


def find_frozen_part(
    adapted: AdapterModel, longest: int, agree: Callable[[int], int] | None = None
) -> FrozenPart | str:
    """Return what is frozen below a model's adapter, or why nothing is that could be computed apart.

    Args:
        adapted: the model as it will be trained, whole.
        longest: as in :class:`FrozenPart`.
        agree: as there.
    """
    model: Any = adapted.base_model
    layers = numbered_layers(model)
    if is_image_text(model.config):
        return "its prompts may show images"
    if model.config._attn_implementation != packed_attention.NAME:
        return "its rows are padded"
    if not layers:
        return f"{type(model).__name__} has no plain list of its layers"
    examples = _probe_examples(model, [min(length, longest) for length in _PROBE_LENGTHS[:3]])
    inputs = packed_apart(model, examples)
    ids = torch.zeros_like(inputs["input_ids"])

    def run() -> Any:
        with adapted.router.route(ids):
            return model.base_model(**inputs).last_hidden_state

    training = adapted.training
    try:
        cut, is_plain = count_frozen(model, run)
        if not is_plain:
            return "its layers hand on more than their states"
        if not cut:
            return f"layer 0 of {len(layers)} is trained, or what stands below it"
        part = FrozenPart(model, cut, longest, agree)
        return _own_objection(adapted, part, inputs, run) or part
    finally:
        adapted.train(training)


@torch.no_grad()
def _own_objection(adapted: AdapterModel, part: FrozenPart, inputs: dict[str, Any], run: Callable[[], Any]) -> str:
    """Return why a model run in two parts would not be itself, empty where it is."""
    adapted.train()
    with torch.random.fork_rng():
        one, other = part.layers.below(inputs), part.layers.below(inputs)
    if not torch.equal(one, other):
        return "its own dropout is on below the adapter"
    adapted.eval()
    states_MH = part.layers.below(inputs)
    whole = run()
    with part.layers.above(states_MH):
        upper = run()
    return "" if torch.equal(whole, upper) else "its upper layers need more of the lower ones than their states"


def check_kept(found: FrozenPart | str, is_exact: bool) -> FrozenPart:
    """Return a frozen part whose states may be kept.

    Raises:
        InputError: there is none, or with exact states a row's depend on its neighbours on this machine.
    """
    if isinstance(found, str):
        raise InputError(
            f"training.kept_states needs frozen layers below the adapter that are computed apart, got none: {found}; "
            "adapt upper layers alone (adapter.layers_to_transform), or leave training.kept_states out"
        )
    if is_exact and (objection := found.objection()):
        raise InputError(
            f"exact kept states must be those that would be computed in any batch, on this machine {objection}; "
            "leave training.kept_states out, or take training.kept_states.precision=int8, which is not exact"
        )
    return found
