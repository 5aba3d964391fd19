"""Who became champion, when and why: an append-only ledger inside the model registry itself.

Each entry is a version of the registered model ``NAME-ledger``: the registry numbers them atomically, on sqlite,
PostgreSQL and a server alike. An entry names the entry it was written after. The first one after a given entry counts,
any other is void; so of two promotions at once one wins, whoever reads the ledger sees the same winner, and there is
no lock that a killed process could leave behind.

Who takes an expired lease over writes a *fence* with the lease's number first. What a holder of an earlier lease writes
after it is void, however long that holder was stopped between its last check and its entry (a fencing token,
Kleppmann, "How to do distributed locking", 2016).

Each entry carries a hash of itself, of the verdict it rests on, and of all before it, so an edit by hand is noticed.
"""

from __future__ import annotations

import getpass
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack
from pipeline.progress import say
from pipeline.promotion.entries import (
    ANCHOR,
    OWN,
    Action,
    Entry,
    LeaseLost,
    LedgerEdited,
    champions,
    check_unedited,
    edited,
    read_entry,
    running_hash,
    signature,
    standing,
)
from pipeline.promotion.versions import ensure_model, search_versions

_SOURCE = "ledger:/"
"""No file stands behind an entry; a server refuses sources in its own artifact store that no run has made."""


class Ledger:
    """The ledger of one model.

    Args:
        client: an ``MlflowClient``.
        model: name of the registered model whose champions are recorded.
    """

    def __init__(self, client: Any, model: str) -> None:
        self._client, self.name = client, f"{model}-ledger"
        self._ignored: set[int] = set()

    def entries(self) -> list[Entry]:
        """Return every entry, void ones too; versions that something else registered are left out, with a line.

        Raises:
            LedgerEdited: one is no entry any more.
        """
        found = []
        for version in search_versions(self._client, self.name):
            number, tags = int(version.version), dict(version.tags)
            if not any(name in tags for name in OWN):
                if number not in self._ignored:
                    say(f"version {number} of {self.name!r} is no entry of the ledger: ignored")
                    self._ignored.add(number)
                continue
            try:
                found.append(read_entry(number, tags, version.creation_timestamp))
            except (KeyError, ValueError, TypeError) as error:
                raise LedgerEdited(edited(number, f"cannot be read ({type(error).__name__}: {error})")) from error
        return found

    def standing(self) -> list[Entry]:
        """Return the entries that count, oldest first, fences too.

        Raises:
            LedgerEdited: one was edited by hand.
        """
        entries = self.entries()
        chain = standing(entries)
        check_unedited(entries, chain)
        return chain

    def chain(self) -> list[Entry]:
        """Return the changes of champion that count, oldest first.

        Raises:
            LedgerEdited: one was edited by hand.
        """
        return champions(self.standing())

    def append(
        self,
        action: Action,
        version: Any,
        previous: int | None,
        why: Iterable[str],
        after: int,
        before: Callable[[], int | None] = lambda: None,
        decision: PromotionDecision | None = None,
    ) -> Entry:
        """Write the entry that follows entry ``after``.

        Args:
            action: what was asked for.
            version: the registry's version that is to become champion.
            previous: the champion before it.
            why: reasons in words.
            after: number of the last entry that the caller saw; 0 for none.
            before: called right before the entry is written; returns the number of the lease that the caller holds.
            decision: that a promotion rests on.

        Raises:
            HeldBack: a promotion rests on no verdict to promote, or another entry came first.
            LeaseLost: another process took the lease over; the entry is void.
        """
        if action == "promote" and (decision is None or decision.verdict != "PROMOTE"):
            raise HeldBack(f"a promotion must rest on a PROMOTE verdict, got {decision and decision.verdict}")
        tags = {"version": str(version.version), "previous": str(previous or ""), "why": json.dumps(list(why))}
        if decision is not None:
            digest = hashlib.sha256(decision.model_dump_json(by_alias=True).encode()).hexdigest()
            anchor = version.version if decision.becomes_anchor else decision.anchor
            tags["decision"] = f"{decision.verdict} {digest}" + (f"{ANCHOR}{anchor}" if anchor else "")
        text = f"{action}: version {version.version} after {previous or 'none'}"
        written = self._write(action, tags, after, before, text)
        chain = self.standing()
        if mine := [entry for entry in chain if entry.number == written]:
            return mine[0]
        self._check_lease(chain, next(entry.lease for entry in self.entries() if entry.number == written))
        winner = next(entry for entry in chain if entry.number > after)
        what = (
            "a retraining took the lease over"
            if winner.action == "fence"
            else f"version {winner.version} became champion"
        )
        raise HeldBack(
            f"the champion must not change while a promotion is decided, but {what} at "
            f"{winner.time:%Y-%m-%d %H:%M:%S} UTC ({winner.action} by {winner.who}); "
            "compare with the new champion and promote again"
        )

    def fence(self, lease: int) -> None:
        """Make void whatever a holder of an earlier lease may still write.

        Args:
            lease: number of the lease that was taken over.

        Raises:
            LeaseLost: it has been taken over again.
        """
        chain = self.standing()
        while not any(entry.action == "fence" and entry.lease == lease for entry in chain):
            self._check_lease(chain, lease)
            last = chain[-1].number if chain else 0  # another entry may come before ours: then once more, after that
            self._write("fence", {}, last, lambda: lease, f"lease {lease} taken over")
            chain = self.standing()

    def _write(
        self,
        action: Action,
        more: Mapping[str, str],
        after: int,
        before: Callable[[], int | None],
        description: str,
    ) -> int:
        ensure_model(self._client, self.name, "Append-only: one version a change of champion. Do not edit or delete.")
        earlier = ""
        for entry in self.standing():
            if entry.number <= after:
                earlier = running_hash(earlier, entry)
        tags = {"version": "0", "previous": "", "why": "[]", "decision": "", **more}
        tags |= {
            "action": action,
            "who": user(),
            "after": str(after),
            "before_sha256": earlier,
        }
        tags["lease"] = str(before() or "")
        made = self._client.create_model_version(
            self.name, f"{_SOURCE}{action}", tags={**tags, "sha256": signature(tags)}, description=description
        )
        return int(made.version)

    def _check_lease(self, chain: Iterable[Entry], lease: int | None) -> None:
        newer = [entry for entry in chain if lease is not None and (entry.lease or 0) > lease]
        if newer:
            raise LeaseLost(
                f"the lease must be held until the end, {newer[0].who} took it over at {newer[0].time:%H:%M:%S} UTC; "
                "nothing was changed"
            )


def user() -> str:
    """Return the name of who runs this process, ``unknown`` where the machine has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"
