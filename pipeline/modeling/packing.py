"""Examples laid out as one sequence without padding, in which what prompts of a task begin with in common stands once.

Prompts and label words of a task form a trie: a template's words, an offer that is compared with several others, the
prompt before each of its label words. Each node is computed once and takes part in every row that runs through it, so
its gradient is the sum over those rows. Only attention sees rows, gathered from the nodes.

Axes: M nodes, B rows, S sequence, E examples, C classes (padded), P answer nodes, K terms (one a label-word token).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.modeling.image_inputs import ImageInputs

Link = Literal["softmax", "sigmoid", "identity"]
"""What makes an answer of an example's scores: probabilities over its classes, one of each class, or a number."""
LINKS: tuple[Link, ...] = ("softmax", "sigmoid", "identity")
_FIRST_IMAGE = -1 - (1 << 32)
"""The root of the first image's prompts; those of tasks stand above it."""
_SHORTEST_SHARE = 0.75
"""Rows that attend together are at least this share of the longest one: more padding costs more than another call."""


@dataclass(frozen=True)
class Example:
    """One tokenised sample."""

    name: str
    """``TASK/KEY``."""
    task: int
    prompt: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]
    """Token ids of each class's label word; of a written answer its own alone."""
    target: tuple[float, ...]
    length_normalized: bool
    weight: float = 1.0
    is_written: bool = False
    """Whether the answer is a text: its log-likelihood is then taken among all texts, not among label words."""
    image: ImageInputs | None = None
    """What the prompt shows beside its tokens."""

    link: ClassVar[Link] = "softmax"
    scale: ClassVar[tuple[float, float]] = (0.0, 1.0)

    @property
    def num_classes(self) -> int:
        """Classes that it may be of."""
        return len(self.words)

    @property
    def num_tokens(self) -> int:
        """Tokens the model must read for it: the prompt, and of each label word all but the last."""
        return len(self.prompt) + sum(len(word) - 1 for word in self.words)

    @property
    def neighbours(self) -> tuple[Any, ...]:
        """Sorted by it, examples that share the beginning of their prompts stand together."""
        return self.task, self.image.digest if self.image else b"", self.prompt


@dataclass(frozen=True)
class HeadExample:
    """One tokenised sample of a task with a head: rows in which every token sees every other, so none is shared."""

    name: str
    """``TASK/KEY``."""
    task: int
    rows: tuple[tuple[int, ...], ...]
    """Token ids: one row for all classes, or one a class where each answer is read with the question."""
    token_types: tuple[tuple[int, ...], ...]
    """For each token of the rows to which of the two segments it belongs."""
    head_rows: tuple[int, ...]
    """For each class the row of the heads that scores it."""
    target: tuple[float, ...]
    """Probability of each class under the label; with the link ``identity`` the label on the head's scale."""
    weight: float = 1.0
    link: Link = "softmax"
    scale: tuple[float, float] = (0.0, 1.0)
    """With the link ``identity`` the number that a score of 0 stands for, and by how much a score of 1 is more."""

    @property
    def num_classes(self) -> int:
        """Classes that it may be of."""
        return len(self.head_rows)

    @property
    def num_tokens(self) -> int:
        """Tokens the model must read for it."""
        return sum(map(len, self.rows))

    @property
    def neighbours(self) -> tuple[Any, ...]:
        """Sorted by it, examples of a task and of like length stand together."""
        return self.task, self.num_tokens


@dataclass(frozen=True)
class Batch:
    """The tensors of some examples."""

    input_ids: Tensor
    """(M,) token ids."""
    position: Tensor
    """(M,) place in the rows that run through the node."""
    token_type: Tensor
    """(M,) segment of the node, 0 or 1; for language models 0, or the kind of a token of a prompt with an image."""
    token_task: Tensor
    """(M,) task index; a task's nodes stand together."""
    rows: tuple[Tensor, ...]
    """Groups of rows of like length, each (B, S): the nodes of each row, the last one repeated as padding."""
    row_masks: tuple[Tensor | None, ...]
    """With heads, for each group which of its places are no padding, (B, S), None where all are; else empty."""
    owner: Tensor
    """(M,) for each node one place of it in the groups, flattened one after another."""
    answer: Tensor
    """(P,) node after which a label word's token is scored; with heads the first node of each row, in order."""
    term_answer: Tensor
    """(K,) place in ``answer`` whose next-token distribution scores the term."""
    term_token: Tensor
    """(K,) the label word's token, or the row of the heads."""
    term_slot: Tensor
    """(K,) place in the flattened (E, C) scores to which the term is added."""
    term_weight: Tensor
    """(K,) 1, or 1 / tokens of the word where the task is length-normalised."""
    target: Tensor
    """(E, C) probability of each class under the label; ordinal labels lie between two; of a regression task the label
    on the head's scale."""
    class_mask: Tensor
    """(E, C) True on the classes that the example has."""
    example_task: Tensor
    """(E,) task index of each example."""
    example_weight: Tensor
    """(E,) weight of each example's loss."""
    link: Tensor
    """(E,) place of each example's link in :data:`LINKS`."""
    scale: Tensor
    """(E, 2) of each example's number."""
    has_links: bool
    """Whether an example has another link than ``softmax``."""
    names: tuple[str, ...]
    """``TASK/KEY`` of each example."""
    num_tokens: int
    """Tokens of the examples, shared ones counted for each."""
    examples: tuple[Example | HeadExample, ...]
    """What was laid out."""
    is_written: Tensor | None = None
    """(E,) whether the answer is a text; None where none is."""
    kept: tuple[Tensor | None, ...] = ()
    """The states of each example below the first adapted layer where they are kept and were read ahead."""
    images: tuple[ImageInputs, ...] = ()
    """The images in the order in which their nodes come."""
    image_task: Tensor | None = None
    """(I,) task index of each image; None where there are none."""
    node_image: Tensor | None = None
    """(M,) place in ``images`` of the node's own, -1 where it has none; None where there are no images."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""

        def move(value: object) -> object:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            return tuple(map(move, value)) if isinstance(value, tuple) else value

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def links(self, link: Link) -> Tensor:
        """Return which examples have a link, (E, 1)."""
        return (self.link == LINKS.index(link))[:, None]

    def answers(self, scores: Tensor) -> Tensor:
        """Return class probabilities, or a regression task's numbers, (E, C) in fp64, of what a scorer returned."""
        scores, scale = scores.double(), self.scale.double()
        if not self.has_links:
            return scores.exp()
        return torch.where(self.links("identity"), scale[:, :1] + scores * scale[:, 1:], scores.exp())

    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the same rows right-padded, for models that take no packed rows.

        Returns:
            Token ids (B, S); attention mask (B, S), 1 on tokens; task of each row (B,); for each answer node one place
            of it in the flattened rows (P,).
        """
        nodes, mask = self.padded_nodes()
        return self.input_ids[nodes], mask.long(), self.token_task[nodes[:, 0]], self.padded_place(nodes)[self.answer]

    def row_images(self) -> tuple[list[ImageInputs], Tensor | None, dict[str, Tensor]]:
        """Return the images of the rows of :meth:`padded`, in their order, the task of each (I,), and by its name the
        kind of each token (B, S), where a model wants to know."""
        if self.node_image is None or self.image_task is None:
            return [], None, {}
        nodes, _ = self.padded_nodes()
        places = self.node_image[nodes[:, 0]]
        places = places[places >= 0]
        found, tasks = [self.images[i] for i in places.tolist()], self.image_task[places]
        name, later = self.images[0].kind_name, self.images[0].later_kind
        if name is None:
            return found, tasks, {}
        return found, tasks, {name: torch.where(self.node_image >= 0, self.token_type, later)[nodes]}

    def padded_nodes(self) -> tuple[Tensor, Tensor]:
        """Return the nodes of all rows, right-padded with the last one of each (B, S), and where they are no padding
        (B, S)."""
        longest = max(group.shape[1] for group in self.rows)
        nodes = torch.cat([torch.cat([g, g[:, -1:].expand(-1, longest - g.shape[1])], 1) for g in self.rows])
        return nodes, is_token(nodes)

    def padded_place(self, nodes: Tensor) -> Tensor:
        """Return for each node its first place in the flattened rows of :meth:`padded_nodes`, which is no padding,
        (M,)."""
        every = torch.arange(nodes.numel(), device=nodes.device)
        return torch.full_like(self.input_ids, nodes.numel()).scatter_reduce(0, nodes.flatten(), every, "amin")


def is_token(rows: Tensor) -> Tensor:
    """Return for rows of nodes (B, S), in which the last node repeated is padding, where they are no padding."""
    mask = torch.ones_like(rows, dtype=torch.bool)
    mask[:, 1:] = rows[:, 1:] != rows[:, :-1]
    return mask


class Trie:
    """Nodes by parent and token; the roots are the tasks."""

    def __init__(self) -> None:
        self.index: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.types: list[int] = []
        self.tasks: list[int] = []
        self.image_roots: dict[tuple[Any, ...], int] = {}
        self.images: list[ImageInputs] = []
        self.node_images: list[int] = []

    def path(
        self, task: int, row: Sequence[int], start: Sequence[int] = (), image: ImageInputs | None = None
    ) -> list[int]:
        """Return the nodes of a row that goes on from other nodes, new ones being made.

        Args:
            task: its index.
            row: token ids.
            start: the nodes that it goes on from; empty: it is a prompt, or its beginning.
            image: what the prompt shows.
        """
        nodes = list(start)
        place = -1 if nodes or image is None else self._place(task, row, image)
        node = nodes[-1] if nodes else -1 - task if place < 0 else _FIRST_IMAGE - place
        kinds = [] if image is None else [image.later_kind] * len(row) if nodes else image.kinds
        for number, token in enumerate(row):
            found = self.index.get((node, token))
            if found is None:
                found = self.index[node, token] = len(self.tokens)
                self.tokens.append(token)
                self.positions.append(len(nodes))
                self.types.append(kinds[number] if kinds else 0)
                self.tasks.append(task)
                self.node_images.append(self.node_images[node] if node >= 0 else place)
            node = found
            nodes.append(node)
        return nodes

    def add(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Return the nodes of an example's prompt, and of the prompt with each word less its last token."""
        prompt = self.path(example.task, example.prompt, image=example.image)
        return prompt, [self.path(example.task, word[:-1], prompt, example.image) for word in example.words]

    def _place(self, task: int, prompt: Sequence[int], image: ImageInputs) -> int:
        """Return which image of the batch this is: another one for the same picture after other tokens."""
        place = self.image_roots.setdefault((task, image.digest, tuple(prompt[: image.end])), len(self.images))
        if place == len(self.images):
            self.images.append(image)
        return place

    def add_rows(self, example: HeadExample) -> list[list[int]]:
        """Return the nodes of each of an example's rows, all of them its own."""
        found = []
        for row, types in zip(example.rows, example.token_types, strict=True):
            found.append(list(range(len(self.tokens), len(self.tokens) + len(row))))
            self.tokens += row
            self.positions += range(len(row))
            self.types += types
            self.tasks += [example.task] * len(row)
        return found

    def count_with(self, example: Example | HeadExample) -> int:
        """Add an example and return how many nodes there are."""
        self.add_rows(example) if isinstance(example, HeadExample) else self.add(example)
        return len(self.tokens)


def micro_batches(
    examples: Sequence[Example | HeadExample], max_tokens: int, max_examples: int | None = None, at_least: int = 1
) -> list[list[int]]:
    """Return which examples go through the model together: neighbours in the trie, up to a number of nodes.

    Args:
        examples: of any tasks.
        max_tokens: most nodes a micro-batch; an example that is longer stands alone.
        max_examples: most examples a micro-batch; None for no limit.
        at_least: micro-batches asked for where there are as many examples: the largest ones are halved.
    """
    parts: list[list[int]] = []
    trie = Trie()
    for i in sorted(range(len(examples)), key=lambda i: examples[i].neighbours):
        is_full = trie.count_with(examples[i]) > max_tokens or (
            parts and max_examples and len(parts[-1]) >= max_examples
        )
        if not parts or is_full:
            parts.append([])
            trie = Trie()
            trie.count_with(examples[i])
        parts[-1].append(i)
    while len(parts) < min(at_least, len(examples)):
        largest = max(
            range(len(parts)), key=lambda p: (len(parts[p]) > 1, sum(examples[i].num_tokens for i in parts[p]))
        )
        part = parts[largest]
        parts[largest : largest + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def pack(examples: Sequence[Example | HeadExample]) -> Batch:
    """Lay examples out as one batch, in the given order."""
    with_heads = [example for example in examples if isinstance(example, HeadExample)]
    return _pack_rows(with_heads) if with_heads else _pack_words([e for e in examples if isinstance(e, Example)])


def _pack_words(examples: Sequence[Example]) -> Batch:
    trie, width = Trie(), max(example.num_classes for example in examples)
    rows: dict[int, list[int]] = {}
    answers: dict[int, int] = {}
    terms: list[tuple[int, int, int, float]] = []
    for e, example in enumerate(examples):
        prompt, ends = trie.add(example)
        rows.setdefault(prompt[-1], prompt)
        for c, (word, nodes) in enumerate(zip(example.words, ends, strict=True)):
            rows.setdefault(nodes[-1], nodes)
            weight = 1.0 / len(word) if example.length_normalized else 1.0
            for node, token in zip(nodes[len(prompt) - 1 :], word, strict=True):
                terms.append((answers.setdefault(node, len(answers)), token, e * width + c, weight))
    inner = {node for nodes in rows.values() for node in nodes[:-1]}  # a row that ends there is part of another one
    return _batch(trie, [nodes for end, nodes in rows.items() if end not in inner], list(answers), terms, examples)


def _pack_rows(examples: Sequence[HeadExample]) -> Batch:
    trie, width = Trie(), max(example.num_classes for example in examples)
    rows: list[list[int]] = []
    terms: list[tuple[int, int, int, float]] = []
    for e, example in enumerate(examples):
        own = trie.add_rows(example)
        for c, head_row in enumerate(example.head_rows):
            terms.append((len(rows) + (c if len(own) > 1 else 0), head_row, e * width + c, 1.0))
        rows += own
    return _batch(trie, rows, [nodes[0] for nodes in rows], terms, examples)


def _batch(
    trie: Trie,
    rows: list[list[int]],
    answers: list[int],
    terms: list[tuple[int, int, int, float]],
    examples: Sequence[Example | HeadExample],
) -> Batch:
    groups, width = _groups(rows), max(example.num_classes for example in examples)
    group_rows = tuple(map(torch.from_numpy, groups))
    masks = [is_token(nodes) for nodes in group_rows] if isinstance(examples[0], HeadExample) else []
    target = torch.zeros(len(examples), width)
    class_mask = torch.zeros(len(examples), width, dtype=torch.bool)
    for e, example in enumerate(examples):
        target[e, : example.num_classes] = torch.tensor(example.target)
        class_mask[e, : example.num_classes] = True
    term_answer, term_token, term_slot, term_weight = zip(*terms, strict=True)
    written = [isinstance(example, Example) and example.is_written for example in examples]
    return Batch(
        input_ids=torch.tensor(trie.tokens),
        position=torch.tensor(trie.positions),
        token_type=torch.tensor(trie.types),
        token_task=torch.tensor(trie.tasks),
        rows=group_rows,
        row_masks=tuple(None if bool(mask.all()) else mask for mask in masks),
        owner=torch.from_numpy(row_places(groups, len(trie.tokens))),
        answer=torch.tensor(answers),
        term_answer=torch.tensor(term_answer),
        term_token=torch.tensor(term_token),
        term_slot=torch.tensor(term_slot),
        term_weight=torch.tensor(term_weight),
        target=target,
        class_mask=class_mask,
        example_task=torch.tensor([example.task for example in examples]),
        example_weight=torch.tensor([example.weight for example in examples]),
        link=torch.tensor([LINKS.index(example.link) for example in examples]),
        scale=torch.tensor([example.scale for example in examples]),
        has_links=any(example.link != "softmax" for example in examples),
        names=tuple(example.name for example in examples),
        num_tokens=sum(example.num_tokens for example in examples),
        is_written=torch.tensor(written) if any(written) else None,
        examples=tuple(examples),
        images=tuple(trie.images),
        image_task=torch.tensor([task for task, *_ in trie.image_roots]) if trie.images else None,
        node_image=torch.tensor(trie.node_images) if trie.images else None,
    )


def _groups(rows: list[list[int]]) -> list[np.ndarray]:
    rows = sorted(rows, key=len, reverse=True)
    groups: list[list[list[int]]] = []
    for nodes in rows:
        if not groups or len(nodes) < _SHORTEST_SHARE * len(groups[-1][0]):
            groups.append([])
        groups[-1].append(nodes)
    return [np.array([n + n[-1:] * (len(group[0]) - len(n)) for n in group]) for group in groups]


def row_places(groups: list[np.ndarray], num_nodes: int) -> np.ndarray:
    """Return for each node its first place in groups of rows, flattened one after another."""
    owners, start = np.zeros(num_nodes, dtype=np.int64), 0
    for group in groups:
        # Backwards, so that a node's first place stays: those where it pads come later.
        owners[group.ravel()[::-1]] = np.arange(start, start + group.size)[::-1]
        start += group.size
    return owners
