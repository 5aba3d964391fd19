"""The entries of a ledger: which of them count, and whether one was edited; pure functions, tested as laws."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, cast, get_args

from pipeline.errors import InputError
from pipeline.json_text import parse_json

Action = Literal["promote", "rollback", "fence"]
_SIGNED = ("action", "version", "previous", "why", "who", "after", "lease", "decision", "before_sha256")
"""Tags that an entry's hash covers, in order."""
ANCHOR = " anchor "
"""Before the anchor's number in an entry's decision."""
OWN = ("action", "after", "sha256")
"""A version with one of these tags was an entry, whatever became of it."""


class LedgerEdited(InputError):
    """An entry is not as it was written."""


class LeaseLost(RuntimeError):
    """Another process holds the lease now."""


@dataclass(frozen=True)
class Entry:
    """One change of champion, or a fence.

    Args:
        number: position in the ledger, from 1.
        after: number of the entry this one was written after; 0 for the first.
        action: what was asked for; ``fence`` where a lease was taken over and the champion stays.
        version: the model version that became champion; 0 for a fence.
        previous: the champion before it.
        why: reasons in words.
        who: user who asked.
        time: when, UTC.
        lease: number of the lease it was written under; None without one.
        decision: the verdict it rests on, ``PROMOTE``, the decision's sha256 and the anchor from then on; empty for a
            rollback.
        before_sha256: hash of the entries that counted before it; None in entries of earlier releases.
        sha256: of itself; None in entries of earlier releases.
        intact: whether it still has the hash it was written with.
    """

    number: int
    after: int
    action: Action
    version: int
    previous: int | None
    why: tuple[str, ...]
    who: str
    time: datetime
    lease: int | None = None
    decision: str = ""
    before_sha256: str | None = None
    sha256: str | None = None
    intact: bool = True

    @property
    def content(self) -> str:
        """What stands in it, as one text."""
        return json.dumps(
            [self.number, self.after, self.action, self.version, self.previous, self.why, self.who, self.lease]
        )

    @property
    def anchor(self) -> int | None:
        """The version that later candidates are held against while this one is champion; None where it does not say."""
        words = self.decision.split(ANCHOR)
        return int(words[1]) if len(words) == 2 else None


def standing(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries that count, oldest first.

    Each is the first one after the one before it, of those that were not written under a lease which an entry before
    shows to be over.
    """
    chain: list[Entry] = []
    newest_lease = 0
    for entry in sorted(entries, key=lambda e: e.number):
        stale = entry.lease is not None and entry.lease < newest_lease
        if entry.after == (chain[-1].number if chain else 0) and not stale:
            chain.append(entry)
            newest_lease = max(newest_lease, entry.lease or 0)
    return chain


def champions(chain: Iterable[Entry]) -> list[Entry]:
    """Return the changes of champion, without fences."""
    return [entry for entry in chain if entry.action != "fence"]


def check_unedited(entries: Iterable[Entry], chain: Iterable[Entry]) -> None:
    """Make sure that the entries that count are as they were written; those of releases without hashes are believed.

    Args:
        entries: all that there are.
        chain: those that count.

    Raises:
        LedgerEdited: one was edited, added or deleted by hand; it is named.
    """
    before, hashed = "", False
    for entry in chain:
        if not entry.intact:
            raise LedgerEdited(edited(entry.number, "does not have the hash it was written with"))
        if hashed and entry.sha256 is None:
            raise LedgerEdited(
                f"every entry after the first with a hash must have one, entry {entry.number} has none: a hand or an "
                "earlier release wrote it; delete that version of the ledger, and promote or roll back anew"
            )
        if entry.sha256 is not None and entry.before_sha256 != before:
            raise LedgerEdited(edited(entry.after, f"or one before it is not what entry {entry.number} followed"))
        if entry.action == "promote" and entry.sha256 is not None and not entry.decision.startswith("PROMOTE "):
            raise LedgerEdited(edited(entry.number, "promotes without a verdict"))
        before, hashed = running_hash(before, entry), entry.sha256 is not None
    found = {entry.number for entry in entries}
    for entry in entries:
        if entry.sha256 is not None and entry.after and entry.after not in found:
            raise LedgerEdited(edited(entry.after, f"is gone, entry {entry.number} was written after it"))


def running_hash(before: str, entry: Entry) -> str:
    """Return the hash of an entry and of all that counted before it."""
    return hashlib.sha256(f"{before}\n{entry.content}\n{entry.sha256 or ''}".encode()).hexdigest()


def champion_at(chain: Iterable[Entry], moment: datetime) -> Entry | None:
    """Return the entry whose version was champion at a moment; None before the first."""
    before = [entry for entry in chain if entry.time <= moment]
    return before[-1] if before else None


def signature(tags: Mapping[str, str]) -> str:
    """Return the hash that an entry with these tags is written with."""
    return hashlib.sha256(json.dumps([tags.get(name, "") for name in _SIGNED]).encode()).hexdigest()


def edited(number: int, what: str) -> str:
    """Return the words on an edited entry."""
    return (
        f"a ledger must not be edited by hand, its entry {number} {what}; restore its tags from a backup of the "
        "registry, or start a new model: promotion.model_name"
    )


def read_entry(number: int, tags: Mapping[str, str], created_ms: int) -> Entry:
    """Read an entry from its tags, also one of an earlier release.

    Raises:
        KeyError: a tag is missing.
        ValueError: a tag holds something else, or a number below 0.
    """
    action, sha256 = tags["action"], tags.get("sha256")
    if action not in get_args(Action):
        raise ValueError(f"action must be one of {get_args(Action)}, got {action!r}")
    found = Entry(
        number=number,
        after=int(tags["after"]),
        action=cast(Action, action),
        version=int(tags["version"]),
        previous=int(tags["previous"]) if tags["previous"] else None,
        why=tuple(parse_json(tags["why"])),
        who=tags["who"],
        time=datetime.fromtimestamp(created_ms / 1000, UTC),
        lease=int(tags["lease"]) if tags.get("lease") else None,
        decision=tags.get("decision", ""),
        before_sha256=tags.get("before_sha256", "") if sha256 is not None else None,
        sha256=sha256,
        intact=sha256 is None or sha256 == signature(tags),
    )
    numbers = (found.after, found.version, found.previous or 0, found.lease or 0, found.anchor or 0)
    if min(numbers) < 0:
        raise ValueError(f"versions and entries are counted from 1, got {min(numbers)}")
    return found
