"""Who became champion, when and why: an append-only ledger inside the model registry itself.

Each entry is a version of the registered model ``NAME-ledger``: the registry numbers them atomically, on sqlite,
PostgreSQL and a server alike. An entry names the entry it was written after. The first one after a given entry counts,
any other is void; so of two promotions at once one wins, whoever reads the ledger sees the same winner, and there is
no lock that a killed process could leave behind.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, cast

from pipeline.errors import HeldBack

Action = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Entry:
    """One change of champion.

    Args:
        number: position in the ledger, from 1.
        after: number of the entry this one was written after; 0 for the first.
        action: what was asked for.
        version: the model version that became champion.
        previous: the champion before it.
        why: reasons in words.
        who: user who asked.
        time: when, UTC.
    """

    number: int
    after: int
    action: Action
    version: int
    previous: int | None
    why: tuple[str, ...]
    who: str
    time: datetime


def standing(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries that count, oldest first: each the first one written after the one before it."""
    chain: list[Entry] = []
    for entry in sorted(entries, key=lambda e: e.number):
        if entry.after == (chain[-1].number if chain else 0):
            chain.append(entry)
    return chain


def champion_at(chain: Iterable[Entry], moment: datetime) -> Entry | None:
    """Return the entry whose version was champion at a moment; None before the first."""
    before = [entry for entry in chain if entry.time <= moment]
    return before[-1] if before else None


class Ledger:
    """The ledger of one model.

    Args:
        client: an ``MlflowClient``.
        model: name of the registered model whose champions are recorded.
    """

    def __init__(self, client: Any, model: str) -> None:
        self._client, self.name = client, f"{model}-ledger"

    def entries(self) -> list[Entry]:
        """Return every entry, void ones too."""
        return [_entry(version) for version in search_versions(self._client, self.name)]

    def chain(self) -> list[Entry]:
        """Return the entries that count, oldest first."""
        return standing(self.entries())

    def append(self, action: Action, version: Any, previous: int | None, why: Iterable[str], after: int) -> Entry:
        """Write the entry that follows entry ``after``.

        Args:
            action: what was asked for.
            version: the registry's version that is to become champion.
            previous: the champion before it.
            why: reasons in words.
            after: number of the last entry that the caller saw; 0 for none.

        Raises:
            HeldBack: another entry came first.
        """
        ensure_model(self._client, self.name, "Append-only: one version a change of champion. Do not edit or delete.")
        tags = {
            "action": action,
            "version": str(version.version),
            "previous": "" if previous is None else str(previous),
            "why": json.dumps(list(why)),
            "who": user(),
            "after": str(after),
        }
        text = f"{action}: version {version.version} after {previous or 'none'}"
        made = self._client.create_model_version(self.name, version.source, version.run_id, tags=tags, description=text)
        written = int(made.version)
        winner = next(entry for entry in self.chain() if entry.after == after)
        if winner.number != written:
            raise HeldBack(
                f"the champion must not change while a promotion is decided, but version {winner.version} became "
                f"champion at {winner.time:%Y-%m-%d %H:%M:%S} UTC ({winner.action} by {winner.who}); "
                "compare with the new champion and promote again"
            )
        return winner


def search_versions(client: Any, name: str) -> list[Any]:
    """Return all versions of a registered model, every page; an unknown model has none."""
    versions: list[Any] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        versions += page
        token = page.token
        if not token:
            return versions


def ensure_model(client: Any, name: str, description: str) -> None:
    """Make a registered model where it is missing; two makers at once are no fault."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def user() -> str:
    """Return the name of who runs this process, ``unknown`` where the machine has none."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _entry(version: Any) -> Entry:
    tags = version.tags
    return Entry(
        number=int(version.version),
        after=int(tags["after"]),
        action=cast(Action, tags["action"]),
        version=int(tags["version"]),
        previous=int(tags["previous"]) if tags["previous"] else None,
        why=tuple(json.loads(tags["why"])),
        who=tags["who"],
        time=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
    )
