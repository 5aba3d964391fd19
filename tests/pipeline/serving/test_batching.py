"""Requests that are answered together: each whole, in its order, by one version, and none for another's fault."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pipeline.contracts import Sample
from pipeline.errors import InputError
from pipeline.serving.batching import Answer, Batcher, Overloaded, Row, Together, Version
from tests.pipeline.serving.null_model import TASKS, NullModel


class Predictor(NullModel):
    """The null model with rows, which can be held up and counts how it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def samples(self, rows: Sequence[Mapping[str, Any]]) -> list[Sample]:
        if any("text" not in row for row in rows):
            raise InputError("row 0 must hold a text")
        name = TASKS[0].name
        return [Sample(key=str(i), task=name, fields={"text": row["text"]}, label=0) for i, row in enumerate(rows)]

    def answer(self, samples: Sequence[Sample]) -> list[Answer]:
        self.go_on.wait(10)
        self.asked.append(len(samples))
        return super().answer(samples)


def _asking(*versions: Version) -> Together:
    """Return what asks the versions in turn, the last one from then on."""
    left = list(versions)

    async def ask(requests: list[Sequence[Row]]) -> tuple[str, list[list[Answer] | InputError]]:
        version = left.pop(0) if len(left) > 1 else left[0]
        return version.words, await asyncio.to_thread(version.answer_each, requests)

    return ask


def _rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_what_waits_is_answered_together_and_each_gets_its_own() -> None:
    async def run() -> tuple[list[Any], list[int]]:
        predictor = Predictor()
        predictor.go_on.clear()
        batcher = Batcher(_asking(Version("v1", predictor)), batch_tokens=100, max_waiting_rows=100)
        asked = [asyncio.create_task(batcher.ask(_rows(*"x" * i), 10)) for i in range(1, 6)]
        await asyncio.sleep(0.05)
        assert batcher.waiting_rows == 0  # the first batch took them all
        predictor.go_on.set()
        return await asyncio.gather(*asked), predictor.asked

    answers, asked = asyncio.run(run())
    assert [len(rows) for _, rows in answers] == [1, 2, 3, 4, 5] and asked == [15]


def test_a_batch_ends_where_the_text_is_enough() -> None:
    async def run() -> list[int]:
        predictor = Predictor()
        batcher = Batcher(_asking(Version("v1", predictor)), batch_tokens=10, max_waiting_rows=100)
        await asyncio.gather(*(batcher.ask(_rows("x" * size), 10) for size in (30, 10, 1, 100, 3)))
        return predictor.asked

    assert asyncio.run(run()) == [2, 1, 1, 1]


@pytest.mark.parametrize("bad", [[{}], _rows("unspeakable")])
def test_one_bad_request_costs_no_other_its_answer(bad: list[dict[str, str]]) -> None:
    async def run() -> list[Any]:
        batcher = Batcher(_asking(Version("v1", Predictor())), batch_tokens=1000, max_waiting_rows=100)
        asked = [batcher.ask(rows, 10) for rows in (_rows("a"), bad, _rows("bb", "c"))]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, error, last = asyncio.run(run())
    assert isinstance(error, InputError) and len(first[1]) == 1 and len(last[1]) == 2


def test_a_request_is_answered_by_one_version_whenever_it_changes() -> None:
    async def run() -> list[Any]:
        old, new = Predictor(), Predictor()
        old.go_on.clear()
        answer = _asking(Version("v1", old), Version("v2", new))
        batcher = Batcher(answer, batch_tokens=1, max_waiting_rows=100)
        before = asyncio.create_task(batcher.ask(_rows("aaaa", "bbbb"), 10))
        after = asyncio.create_task(batcher.ask(_rows("cccc", "dddd"), 10))
        await asyncio.sleep(0.05)
        old.go_on.set()
        found = await asyncio.gather(before, after)
        assert (old.asked, new.asked) == ([2], [2])
        return [words for words, _ in found]

    assert asyncio.run(run()) == ["v1", "v2"]


def test_more_than_may_wait_is_refused_and_what_nobody_waits_for_is_not_computed() -> None:
    async def run() -> None:
        predictor = Predictor()
        predictor.go_on.clear()
        batcher = Batcher(_asking(Version("v1", predictor)), batch_tokens=1, max_waiting_rows=3)
        first = asyncio.create_task(batcher.ask(_rows("aaaa"), 10))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.ask(_rows("b", "c"), 0.05))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="2 rows wait already, at most 3 may"):
            await batcher.ask(_rows("d", "e"), 10)
        with pytest.raises(TimeoutError):
            await late
        predictor.go_on.set()
        await first
        _, answers = await batcher.ask(_rows("d", "e"), 10)
        assert len(answers) == 2 and predictor.asked == [1, 2] and batcher.waiting_rows == 0

    asyncio.run(run())


def test_a_model_that_fails_ends_its_requests_and_answers_the_next() -> None:
    async def run() -> None:
        predictor = Predictor()
        batcher = Batcher(_asking(Version("v1", predictor)), batch_tokens=1, max_waiting_rows=3)
        with pytest.raises(AttributeError):
            await batcher.ask([None], 10)  # type: ignore[list-item]
        assert len((await batcher.ask(_rows("a"), 10))[1]) == 1

    asyncio.run(run())


def test_so_many_batches_are_under_way_as_there_are_models_for() -> None:
    async def run() -> None:
        predictor = Predictor()
        predictor.go_on.clear()
        batcher = Batcher(_asking(Version("v1", predictor)), batch_tokens=1, max_waiting_rows=100, workers=2)
        asked = [asyncio.create_task(batcher.ask(_rows("aaaa"), 10)) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert batcher.waiting_rows == 1
        predictor.go_on.set()
        assert len(await asyncio.gather(*asked)) == 3

    asyncio.run(run())
