"""Which task each row belongs to, from one forward until its backward is done.

The model's source is not touched: :class:`Router` holds the ids of the forward that is running, and every adapted
layer asks it. Activation checkpointing runs layers again *during the backward*, when the model's forward has long
returned and perhaps another one has run. Each autograd node carries the sequence number of its creation, so the
router notes the range of numbers of each forward; a layer that runs inside a backward looks up the node being
evaluated and finds the ids of the forward that the node belongs to, however many forwards came since.

Limits. Sequence numbers count a thread's nodes, so one model's forwards with gradients must run in one thread; without
gradients several threads may ask one model, whose forwards wait for each other. A layer inside a
compiled region reads the newest forward's ids: where compiled layers stand inside checkpoints that are not compiled
with them, run each backward before the next forward.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_lora.errors import RoutingError

__all__ = ["Router", "TaskIds", "normalise_task_ids"]

TaskIds = int | str | Tensor | Sequence[int] | Sequence[str]
"""Ids or names: one for the whole batch, or (B,) one a row, or (B, S) one a token (tensor only)."""

_REMEMBERED_FORWARDS = 256
"""How many forwards with gradients may wait for a checkpointed backward; only small id tensors are kept."""


def normalise_task_ids(task_ids: TaskIds | None, task_names: Sequence[str]) -> Tensor:
    """Return the ids as an int64 tensor: () for one task, (B,) a row, (B, S) a token.

    Ids on the CPU are checked against the number of tasks here. Ids on an accelerator are not, because that would
    wait for the device; an id out of range then fails in the device's own index check.

    Raises:
        RoutingError: ids are missing with several tasks, of another type or shape, or out of range.
    """
    num_tasks = len(task_names)
    if task_ids is None:
        if num_tasks > 1:
            raise RoutingError(f"task_ids must be given when there are several tasks, got None; {num_tasks} are known")
        return torch.zeros((), dtype=torch.int64)
    if isinstance(task_ids, str):
        task_ids = _id_of(task_ids, task_names)
    elif not isinstance(task_ids, (int, Tensor)):
        task_ids = [_id_of(item, task_names) if isinstance(item, str) else item for item in task_ids]
    ids = task_ids if isinstance(task_ids, Tensor) else torch.tensor(task_ids, dtype=torch.int64)
    if ids.dim() > 2:
        raise RoutingError(f"task_ids must have shape (), (batch,) or (batch, sequence), got {tuple(ids.shape)}")
    if ids.dtype != torch.int64:
        if ids.dtype not in (torch.int32, torch.int16, torch.uint8, torch.int8):
            raise RoutingError(f"task_ids must be whole numbers, got {ids.dtype}; use torch.int64")
        ids = ids.to(torch.int64)
    if not torch.compiler.is_compiling() and ids.device.type == "cpu" and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= num_tasks:
            raise RoutingError(f"task_ids must lie in [0, {num_tasks}), got {low}..{high}; tasks: {list(task_names)}")
    return ids


def _id_of(name: str, task_names: Sequence[str]) -> int:
    if name not in task_names:
        raise RoutingError(f"a task name must be known, got {name!r}; the tasks are {list(task_names)}")
    return list(task_names).index(name)


@dataclass
class _Pass:
    """One forward: its ids, and the sequence numbers [first, last) of the autograd nodes that it made."""

    ids: Tensor
    first: int
    last: int | None = None

    def made(self, sequence_number: int) -> bool:
        return self.first <= sequence_number and (self.last is None or sequence_number < self.last)


class Router:
    """Holds the ids of the running forward and of those whose backward may still come; shared by all layers.

    Forwards of several threads, as in a server, wait for each other: a layer looks up here whose ids are running.

    Attributes:
        ids: ids of the newest forward, kept after it returns; None before the first.
        image_ids: (I,) ids of the images of the newest forward, one an image; None where it did not tell.
        is_disabled: whether the adapter is switched off, so that layers behave as the base.
        allows_expansion: whether a layer may see k rows for each id, as beam search makes them.
        kept_folds: folded matrices that layers keep while weights are known not to change; None outside of that.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.image_ids: Tensor | None = None
        self.is_disabled = False
        self.allows_expansion = False
        self.kept_folds: dict[tuple[object, torch.dtype], Tensor] | None = None
        self._indicator: tuple[Tensor, Tensor] | None = None
        self._depth = 0
        self._passes: deque[_Pass] = deque(maxlen=_REMEMBERED_FORWARDS)
        self._recomputed = threading.local()
        self._tokens: Tensor | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, bool]:
        """Copies and pickles carry no running forward."""
        return {"is_disabled": self.is_disabled}

    def __setstate__(self, state: dict[str, bool]) -> None:
        self.__init__()  # type: ignore[misc]
        self.is_disabled = state["is_disabled"]

    def exclusive(self) -> AbstractContextManager[Any]:
        """Let no other thread's forward run inside; a traced one, which is of one thread, needs no lock."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    @contextmanager
    def route(self, ids: Tensor, image_ids: Tensor | None = None) -> Iterator[None]:
        """Make ``ids`` those of the forward inside; a nested forward gives the outer one its ids back.

        Args:
            ids: as :func:`normalise_task_ids` returns them.
            image_ids: (I,) one an image, for whoever makes the features of a forward's images.
        """
        with self.exclusive():
            outer, running = (self.ids, self.image_ids), self._start(ids)
            self.ids, self.image_ids, self._depth, self._indicator = ids, image_ids, self._depth + 1, None
            try:
                yield
            finally:
                self._depth -= 1
                if running is not None:
                    running.last = torch.autograd._get_sequence_nr()
                if self._depth:
                    self.ids, self.image_ids = outer

    @property
    def is_running(self) -> bool:
        """Whether a forward is running."""
        return self._depth > 0

    def _start(self, ids: Tensor) -> _Pass | None:
        """Remember a forward whose backward may come; a traced one needs none, ids being inputs of its graph."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return None
        running = _Pass(ids, torch.autograd._get_sequence_nr())
        self._passes.append(running)
        return running

    @contextmanager
    def narrowed(self, tokens: Tensor | None) -> Iterator[None]:
        """Let layers inside see only these places of ids a token (B, S), which part of a model computes; None: all."""
        outer, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = outer

    @contextmanager
    def fixed_weights(self) -> Iterator[None]:
        """Let layers keep their folded matrices until the end; for loops of inference such as decoding."""
        with self.exclusive():
            outer = self.kept_folds
            self.kept_folds = {} if outer is None else outer
            try:
                yield
            finally:
                self.kept_folds = outer

    def indicator(self, ids: Tensor, num_tasks: int, dtype: torch.dtype) -> Tensor:
        """Return (M, T, 1), 1 where a row is of a task, for ids (M,); the same tensor for all layers of a forward."""
        kept = self._indicator
        if kept is None or kept[0] is not ids or kept[1].dtype != dtype:
            tasks = torch.arange(num_tasks, device=ids.device)
            kept = self._indicator = ids, (ids.unsqueeze(1) == tasks).unsqueeze(-1).to(dtype)
        return kept[1]

    def current(self) -> Tensor:
        """Return the ids for a layer that runs now, in a forward or inside a checkpointed backward.

        Raises:
            RoutingError: no forward has set ids, or the forward that is recomputed is no longer remembered.
        """
        if not torch.compiler.is_compiling():
            node = torch._C._current_autograd_node()
            if node is not None:
                return self._narrow(self._recomputing(node._sequence_nr()))
        if self.ids is None:
            raise RoutingError("a layer ran before any task ids were set; call the MTLLoRAModel, not its base")
        return self._narrow(self.ids)

    def _narrow(self, ids: Tensor) -> Tensor:
        return ids if self._tokens is None or ids.dim() < 2 else ids[:, self._tokens]

    def _recomputing(self, sequence_number: int) -> Tensor:
        for candidate in reversed(self._passes):
            if candidate.made(sequence_number):
                self._recomputed.ids = candidate.ids
                return candidate.ids
        # A node made by a recomputation itself (nested checkpointing) belongs to the forward being recomputed.
        ids: Tensor | None = getattr(self._recomputed, "ids", None)
        if ids is None or (self._passes and sequence_number < self._passes[0].first):
            raise RoutingError(
                f"a recomputed layer's forward must be one of the last {_REMEMBERED_FORWARDS} with gradients, "
                "got an older one; run the backward sooner"
            )
        return ids
