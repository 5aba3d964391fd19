"""Live requests and the two versions that may see them: the champion answers, a challenger is tried beside it.

In the shadow the challenger scores some requests after they were answered. As a canary it answers the keys that a hash
draws; where it fails, the champion answers instead, and where it falls behind it is taken back for good.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pipeline.answer import Answer
from pipeline.errors import InputError, masked
from pipeline.ingestion.drift import DriftThresholds, drift_of, profile_of
from pipeline.ingestion.profile import SAMPLES, DataProfile, profile_texts
from pipeline.serving.batching import Batcher, Row
from pipeline.serving.live_log import LiveLog, note_drift, read_state, take_back
from pipeline.serving.server_config import ServerConfig
from pipeline.serving.traffic import Seen, fault, part_of

_SHADOW_S = 60.0
"""Longest time that a shadow may take."""
_LEAST_TEXTS = 500
"""Of a task, before they are held against its training's."""
_CHARACTERS = 4096
"""Of a text, that are looked at."""
_log = logging.getLogger(__name__)


class LiveTraffic:
    """Answers requests, one a call of :meth:`answer`.

    Args:
        config: of the server.
        champion: asks the champion.
        challenger: asks the challenger.
        describe: returns what the challenger says of itself, None where there is none.
    """

    def __init__(
        self,
        config: ServerConfig,
        champion: Batcher,
        challenger: Batcher | None = None,
        describe: Callable[[], Awaitable[dict[str, Any] | None]] | None = None,
    ) -> None:
        self._config, self._champion, self._challenger, self._describe = config, champion, challenger, describe
        self._log = LiveLog(config.log.url, config.log.max_mib, config.log.flush_s)
        self._taken_back: dict[str, str] = {}
        self._seen = (Seen(), Seen())
        """Of champion and canary, since this challenger came."""
        self._background: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None
        self._texts = LiveTexts(config.drift_against)
        self.challenger: str | None = None
        """Name of the version that is tried."""

    async def answer(
        self, request: str, key: str | None, rows: Sequence[Row], timeout_s: float
    ) -> tuple[str, list[Answer]]:
        """Return the name of the version that answered, and an answer a row; errors are those of :class:`Batcher`."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._look())
        self._texts.add(rows)
        if self._is_canary(key or request) and (found := await self._by_canary(request, key, rows, timeout_s)):
            return found
        begun, answers = time.monotonic(), None
        try:
            model, answers = await self._champion.ask(rows, timeout_s)
        finally:
            self._seen[0].note(time.monotonic() - begun, answers)
        if self._is_tried and part_of("shadow", request) < self._config.shadow.share:
            work = asyncio.create_task(self._shadow(request, key, rows, model, answers))
            self._background.add(work)
            work.add_done_callback(self._background.discard)
        return model, answers

    @property
    def _is_tried(self) -> bool:
        return self.challenger is not None and self.challenger not in self._taken_back

    def _is_canary(self, key: str) -> bool:
        return self._is_tried and part_of(f"canary {self.challenger}", key) < self._config.canary.share

    async def _by_canary(
        self, request: str, key: str | None, rows: Sequence[Row], timeout_s: float
    ) -> tuple[str, list[Answer]] | None:
        begun, answers = time.monotonic(), None
        try:
            model, answers = await self._asked(rows, timeout_s / 2)  # which leaves time for the champion
        except InputError:  # who asks is told; that is no fault of the version
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the champion answers
            _log.warning("the canary did not answer: %s", masked(repr(error)))
        self._seen[1].note(time.monotonic() - begun, answers)
        if answers is None:
            return None
        self._keep(request, key, rows, "canary", model, answers)
        return model, answers

    async def _shadow(
        self, request: str, key: str | None, rows: Sequence[Row], model: str, answers: Sequence[Answer]
    ) -> None:
        try:
            tried, others = await self._asked(rows, _SHADOW_S)
        except Exception as error:  # noqa: BLE001 - nobody waits for it
            _log.info("a shadow did not answer: %s", masked(repr(error)))
            return
        self._keep(request, key, rows, "live", model, answers)
        self._keep(request, key, rows, "shadow", tried, others)

    async def _asked(self, rows: Sequence[Row], timeout_s: float) -> tuple[str, list[Answer]]:
        if self._challenger is None:
            raise InputError("a challenger must be served to be asked, there is none; set shadow or canary")
        return await self._challenger.ask(rows, timeout_s)

    def _keep(
        self, request: str, key: str | None, rows: Sequence[Row], role: str, model: str, answers: Sequence[Answer]
    ) -> None:
        def known(number: int, row: Row, answer: Answer) -> tuple[Any, ...]:
            own = None if row.get("id") is None else str(row["id"])
            return request, number, own, key, answer[0], model, role, answer[1], answer[4]

        self._log.add(known(n, row, answer) for n, (row, answer) in enumerate(zip(rows, answers, strict=True)))

    async def _look(self) -> None:
        while True:
            try:
                await self._look_once()
            except Exception as error:  # noqa: BLE001 - the log's store may be away; answers go on
                _log.warning("live traffic could not be looked after: %s", masked(repr(error)))
            await asyncio.sleep(self._config.poll_s)

    async def _look_once(self) -> None:
        url = self._config.log.url
        if self._describe is not None:
            found = await self._describe()
            model = found["model"] if found else None
            if model != self.challenger:
                self._seen = (Seen(), Seen())
                self.challenger = model
            self._taken_back = (await asyncio.to_thread(read_state, url))["taken_back"] | self._taken_back
            if self._is_tried and (why := fault(self._seen[1], self._seen[0], self._config.canary)) is not None:
                _log.warning("%s is taken back: %s", model, why)
                self._taken_back = {**self._taken_back, str(model): why}
                await asyncio.to_thread(take_back, url, str(model), why)
        if self._log.is_due:
            await asyncio.to_thread(self._log.flush)
        if (reasons := await asyncio.to_thread(self._texts.new_drift)) is not None:
            _log.warning("live texts against the training's: %s", "; ".join(reasons) or "no drift any more")
            if url:
                await asyncio.to_thread(note_drift, url, reasons)


class LiveTexts:
    """The newest texts of each task against those of its training.

    Args:
        against: shards of the training; empty for no look.
    """

    def __init__(self, against: str) -> None:
        self._against = against
        self._before: DataProfile | None = None
        self._texts: dict[str, deque[str]] = {}
        self._said: tuple[str, ...] = ()
        self._count = self._looked = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the texts of rows."""
        for row in rows if self._against else ():
            texts = [value for name, value in row.items() if isinstance(value, str) and name not in ("task", "id")]
            kept = self._texts.setdefault(str(row.get("task"))[:100], deque(maxlen=SAMPLES))
            kept.append(" ".join(texts)[:_CHARACTERS])
            self._count += 1
            while len(self._texts) > 1000:  # names that are no tasks
                self._texts.pop(next(iter(self._texts)))

    def new_drift(self) -> tuple[str, ...] | None:
        """Return what lies beyond its threshold, where that is not what was said before, else None."""
        if self._count - self._looked < _LEAST_TEXTS:
            return None
        self._looked = self._count
        if self._before is None:
            self._before = profile_of(self._against.rstrip("/"))
        tasks = {}
        for name, before in self._before.tasks.items():
            texts = list(self._texts.get(name, ()))
            if len(texts) >= _LEAST_TEXTS:
                known = {"samples": len(texts), "label_counts": before.label_counts}
                tasks[name] = profile_texts(texts, **known, rejected_share=before.rejected_share)
        now = DataProfile(split="live", samples_read=SAMPLES, tasks=tasks)
        reasons = tuple(r.partition(": ")[2] for r in drift_of(self._before, now, DriftThresholds()).reasons)
        names = tuple(reason.partition(" must")[0] for reason in reasons)
        if names == self._said:
            return None
        self._said = names
        return reasons
