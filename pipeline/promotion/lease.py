"""One retraining at a time, on any number of machines: a lease inside the model registry itself.

Each holding is a version of the registered model ``NAME-lease``, written after the one before it; as in the ledger the
first one after a given entry counts, so of two takers at once one wins. The holder beats by a tag. A holding without a
beat for its time-to-live has expired; before it is taken over, the taker watches for a beat by its own monotonic
clock, so that a clock that jumped does not end a holding that lives.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

from pipeline.errors import HeldBack, masked
from pipeline.progress import say
from pipeline.promotion.entries import LeaseLost
from pipeline.promotion.ledger import user
from pipeline.promotion.versions import ensure_model, search_versions

_BEATS = 4
"""Beats in a time-to-live."""


@dataclass(frozen=True)
class Holding:
    """One entry of the lease.

    Args:
        number: position, from 1.
        after: number of the entry it was written after; 0 for the first.
        who: user, machine and process.
        ttl_s: seconds without a beat after which it has expired.
        beat: counter and wall-clock time (epoch seconds) of the last beat.
        released: whether it was given back.
        since: when it was taken.
    """

    number: int
    after: int
    who: str
    ttl_s: float
    beat: tuple[int, float]
    released: bool
    since: datetime


class Lease:
    """A lease on one registered model, held within a ``with`` block.

    Args:
        client: an ``MlflowClient``.
        model: name of the registered model.
        ttl_s: seconds after which a holder that does not beat is taken for dead.
        who: name of this holder; user, machine and process where none is given.
        taken_over: called with this lease's number where the one before has expired, before it is used.
    """

    def __init__(
        self,
        client: Any,
        model: str,
        ttl_s: float = 120.0,
        who: str = "",
        taken_over: Callable[[int], None] = lambda number: None,
    ) -> None:
        self._client, self.name, self.ttl_s = client, f"{model}-lease", ttl_s
        self.who = who or f"{user()}@{socket.gethostname()}, process {os.getpid()}"
        self._mine: int | None = None
        self._taken_over = taken_over
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Take the lease.

        Raises:
            HeldBack: another holder has it; the message names it.
        """
        chain = self._chain()
        last = chain[-1] if chain else None
        expired = last is not None and not last.released
        if last is not None and expired:
            if self._lives(last):
                raise HeldBack(_held(last))
            say(f"the lease of {last.who} has expired; taking it over")
        ensure_model(self._client, self.name, "Who retrains now: one version a holding. Do not edit or delete.")
        tags = {
            "after": str(last.number if last else 0),
            "who": self.who,
            "ttl_s": str(self.ttl_s),
            "beat": f"0 {time.time()}",
            "released": "",
        }
        made = self._client.create_model_version(
            self.name, _SOURCE, tags=tags, description=f"held by {self.who}", await_creation_for=0
        )
        winner = next(h for h in self._chain() if h.after == int(tags["after"]))
        if winner.number != int(made.version):
            raise HeldBack(_held(winner))
        self._mine = winner.number
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()
        if expired:
            try:
                self._taken_over(self._mine)
            except BaseException:
                self._give_back()
                raise
        return self

    def check(self) -> int:
        """Make sure that this process still holds the lease; asked before anything that cannot be taken back.

        Returns:
            The lease's number, which goes into what is written under it.

        Raises:
            LeaseLost: another one does.
        """
        chain = self._chain()
        if self._mine is None or not chain:
            raise LeaseLost("the lease must be held until the end, it is not held or its entry is gone; start again")
        if (last := chain[-1]).number != self._mine:
            raise LeaseLost(f"the lease must be held until the end, {last.who} took it at {last.since:%H:%M:%S} UTC")
        return self._mine

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        try:
            self._client.set_model_version_tag(self.name, str(self._mine), "released", "yes")
        except Exception as failure:  # noqa: BLE001 - it expires by itself
            say(f"the lease could not be given back ({masked(str(failure))}); it expires in {self.ttl_s:.0f} s")

    def _beat(self) -> None:
        beats = 0
        while not self._stop.wait(self.ttl_s / _BEATS):
            beats += 1
            try:
                self._client.set_model_version_tag(self.name, str(self._mine), "beat", f"{beats} {time.time()}")
            except Exception as failure:  # noqa: BLE001 - an outage shorter than the time-to-live is no loss
                say(f"the lease could not be renewed: {type(failure).__name__}")

    def _lives(self, holding: Holding) -> bool:
        age = time.time() - holding.beat[1]
        if 0 <= age < holding.ttl_s:
            return True
        # Expired by the wall clock, or beaten in the future: one of two clocks may be wrong, so watch for a beat.
        end = time.monotonic() + (holding.ttl_s if age < 0 else 1.5 * holding.ttl_s / _BEATS)
        while time.monotonic() < end:
            time.sleep(min(1.0, holding.ttl_s / 10))
            now = next((h for h in self._chain() if h.number == holding.number), None)
            if now is None or now.released:
                return False
            if now.beat[0] != holding.beat[0]:
                return True
        return False

    def _chain(self) -> list[Holding]:
        chain: list[Holding] = []
        found = [_holding(version) for version in search_versions(self._client, self.name)]
        for holding in sorted((h for h in found if h is not None), key=lambda h: h.number):
            if holding.after == (chain[-1].number if chain else 0):
                chain.append(holding)
        return chain


def _held(holding: Holding) -> str:
    return (
        f"one retraining at a time: {holding.who} has held the lease since {holding.since:%Y-%m-%d %H:%M:%S} UTC; "
        f"wait for its end, or {holding.ttl_s:.0f} s after its process died"
    )


def _holding(version: Any) -> Holding | None:
    """Return a version as a holding; None where something else registered it."""
    tags = version.tags
    try:
        count, moment = tags["beat"].split()
        return Holding(
            number=int(version.version),
            after=int(tags["after"]),
            who=tags["who"],
            ttl_s=float(tags["ttl_s"]),
            beat=(int(count), float(moment)),
            released=bool(tags["released"]),
            since=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
        )
    except (KeyError, ValueError) as error:
        say(f"version {version.version} of {version.name!r} is no holding of the lease ({error!r}): ignored")
        return None


_SOURCE = "lease:/held"
"""No file stands behind a holding; a server refuses sources in its own artifact store that no run has made."""
