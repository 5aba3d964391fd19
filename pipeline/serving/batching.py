"""Requests that wait while the model is busy are answered together: nothing waits for company, and none waits alone.

A request is answered by one version of the model, whichever is there when its turn comes; its rows are never parted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.answer import Answer
from pipeline.contracts import Sample
from pipeline.errors import InputError

Row = Mapping[str, Any]
_CHARACTERS_A_TOKEN = 4
"""About, in English: how much text goes into one batch is judged before it is tokenised."""


class Overloaded(Exception):
    """More rows wait than are taken."""


@dataclass(frozen=True)
class Version:
    """A loaded model and its name."""

    words: str
    predictor: Any
    """A :class:`pipeline.modeling.predictor.Predictor`."""

    def answer_each(self, requests: Sequence[Sequence[Row]]) -> list[list[Answer] | InputError]:
        """Answer requests together; one that cannot be answered gets its error, the others their answers."""
        found: list[list[Answer] | InputError | None] = [None] * len(requests)
        samples: dict[int, list[Sample]] = {}
        for number, rows in enumerate(requests):
            try:
                samples[number] = self.predictor.samples(rows)
            except InputError as error:
                found[number] = error
        try:
            answers = iter(self.predictor.answer([sample for each in samples.values() for sample in each]))
            found = [[next(answers) for _ in samples[n]] if one is None else one for n, one in enumerate(found)]
        except InputError:  # of one of them: each is asked on its own
            for number, each in samples.items():
                try:
                    found[number] = self.predictor.answer(each)
                except InputError as error:
                    found[number] = error
        return [one for one in found if one is not None]


@dataclass
class _Request:
    rows: Sequence[Row]
    answer: asyncio.Future[tuple[str, list[Answer]]]
    characters: int = field(init=False)

    def __post_init__(self) -> None:
        self.characters = sum(len(v) for row in self.rows for v in row.values() if isinstance(v, str))


Together = Callable[[list[Sequence[Row]]], Awaitable[tuple[str, list[list[Answer] | InputError]]]]
"""Answers requests together: name of the version, and each one's answers or its error."""


class Batcher:
    """Answers requests as they come, those that wait together.

    Args:
        answer: asks the model.
        batch_tokens: so much text, about, is answered together; a longer request stands alone.
        max_waiting_rows: most rows that wait; more are refused.
        workers: batches that are under way at once: as many as there are models to answer them.
    """

    def __init__(self, answer: Together, batch_tokens: int, max_waiting_rows: int, workers: int = 1) -> None:
        self.waiting_rows = 0
        self._answer = answer
        self._characters = batch_tokens * _CHARACTERS_A_TOKEN
        self._max_waiting_rows, self._workers = max_waiting_rows, workers
        self._queue: deque[_Request] = deque()
        self._work: set[asyncio.Task[None]] = set()

    async def ask(self, rows: Sequence[Row], timeout_s: float) -> tuple[str, list[Answer]]:
        """Return the name of the version that answered, and an answer a row.

        Raises:
            InputError: a row cannot be answered.
            Overloaded: too many rows wait.
            TimeoutError: its turn did not come, or its answer took too long.
        """
        if self.waiting_rows and self.waiting_rows + len(rows) > self._max_waiting_rows:
            raise Overloaded(f"{self.waiting_rows} rows wait already, at most {self._max_waiting_rows} may")
        request = _Request(rows, asyncio.get_running_loop().create_future())
        self._queue.append(request)
        self.waiting_rows += len(rows)
        if len(self._work) < self._workers:
            work = asyncio.create_task(self._run())
            self._work.add(work)
            work.add_done_callback(self._work.discard)
        return await asyncio.wait_for(request.answer, timeout_s)

    async def _run(self) -> None:
        while batch := self._next():
            try:
                version, found = await self._answer([request.rows for request in batch])
                answers: list[Any] = [one if isinstance(one, InputError) else (version, one) for one in found]
            except Exception as error:  # noqa: BLE001 - whatever the model raised is each request's own end
                answers = [error] * len(batch)
            for request, answer in zip(batch, answers, strict=True):
                if request.answer.done():
                    continue
                if isinstance(answer, Exception):
                    request.answer.set_exception(answer)
                else:
                    request.answer.set_result(answer)

    def _next(self) -> list[_Request]:
        batch: list[_Request] = []
        characters = 0
        while self._queue:
            head = self._queue[0]
            if not head.answer.done():  # who waits for it may have gone
                if batch and characters + head.characters > self._characters:
                    break
                batch.append(head)
                characters += head.characters
            self._queue.popleft()
            self.waiting_rows -= len(head.rows)
        return batch
