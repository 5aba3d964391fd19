"""Which data, code and parent made a champion: read off its provenance and the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.promotion.entries import Entry, champion_at
from pipeline.promotion.provenance import Foreign

if TYPE_CHECKING:
    from pipeline.promotion.registry import Registry, Version


@dataclass(frozen=True)
class Lineage:
    """Where a version comes from.

    Args:
        version: the version itself, with its provenance (data window, manifest digest, base, commit, metrics).
        entry: the ledger entry by which it was champion at the moment asked for; None if asked by number and it
            never was.
        until: when another became champion; None if none has since.
        ancestors: its parents, nearest first.
        also: other champions of the same day, where a day was asked for.
    """

    version: Version
    entry: Entry | None
    until: datetime | None
    ancestors: tuple[Version, ...]
    also: tuple[Entry, ...] = ()

    def rows(self) -> dict[str, Any]:
        """Return the lineage as names and values, in the order one would read it."""
        rows: dict[str, Any] = {"version": self.version.number, "aliases": ", ".join(self.version.aliases) or "none"}
        if self.entry is not None:
            rows["champion from"] = _stamp(self.entry.time)
            rows["champion until"] = _stamp(self.until) if self.until else "now"
            rows["by"] = f"{self.entry.action} of {self.entry.who}"
            rows["because"] = "; ".join(self.entry.why)
        origin = self.version.origin
        rows |= {"made from": f"not recorded: {origin.reason}"} if isinstance(origin, Foreign) else origin.shown()
        rows["run_id"] = self.version.run_id
        rows["ancestors"] = " ← ".join(str(parent.number) for parent in self.ancestors) or "none"
        if self.also:
            rows["also champion that day"] = ", ".join(str(entry.version) for entry in self.also)
        return rows


def lineage(registry: Registry, reference: int | str) -> Lineage:
    """Answer for a version number, an alias, or a day (``2026-05-03``: the champion at the end of that day, UTC).

    Raises:
        InputError: no such version, or no champion yet on that day.
    """
    chain = registry.ledger.chain()
    day = _day(str(reference))
    if day is None:
        version = registry.version(reference)
        mine = [entry for entry in chain if entry.version == version.number]
        entry = mine[-1] if mine else None
        return Lineage(version, entry, _until(chain, entry), _ancestors(registry, version))
    entry = champion_at(chain, datetime.combine(day, time.max, UTC))
    if entry is None:
        first = f"the first became champion on {chain[0].time:%Y-%m-%d}" if chain else "there was none yet"
        raise InputError(f"a day must have had a champion of {registry.name!r}, got {day}: {first}")
    version = registry.version(entry.version)
    also = tuple(e for e in chain if e.time.date() == day and e.number != entry.number)
    return Lineage(version, entry, _until(chain, entry), _ancestors(registry, version), also)


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if "-" in text else None
    except ValueError:
        return None


def _until(chain: Sequence[Entry], entry: Entry | None) -> datetime | None:
    later = [e.time for e in chain if entry is not None and e.number > entry.number]
    return later[0] if later else None


def _ancestors(registry: Registry, version: Version) -> tuple[Version, ...]:
    found: list[Version] = []
    parent = _parent(version)
    while parent and parent not in {v.number for v in found}:
        try:
            found.append(registry.version(parent))
        except InputError:  # it has been deleted, and with it what it came from
            break
        parent = _parent(found[-1])
    return tuple(found)


def _parent(version: Version) -> int | None:
    return None if isinstance(version.origin, Foreign) else version.origin.parent


def _stamp(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
