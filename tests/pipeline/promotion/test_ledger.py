"""The ledger counts what its writers held the right to write, and notices the hand that edits it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import HeldBack, InputError
from pipeline.promotion.entries import Entry, LeaseLost, LedgerEdited, champions, standing
from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import PROMOTE, promote

NEW = ("sha256", "before_sha256", "decision", "lease")
"""Tags that the entries of earlier releases do not have."""


def entry(number: int, after: int, lease: int | None = None) -> Entry:
    return Entry(number, after, "promote", 1, None, (), "someone", datetime(2026, 5, 1, tzinfo=UTC), lease)


entries = st.lists(st.tuples(st.integers(0, 8), st.none() | st.integers(1, 4)), max_size=10).map(
    lambda rows: [entry(i + 1, after, lease) for i, (after, lease) in enumerate(rows)]
)


@given(entries)
def test_under_a_lease_that_is_over_nothing_counts(found: list[Entry]) -> None:
    chain = standing(found)
    leases = [e.lease for e in chain if e.lease is not None]
    assert leases == sorted(leases)
    assert [e.after for e in chain] == [0, *(e.number for e in chain)][:-1] or not chain
    for cut in range(len(found)):  # what is appended later takes nothing back
        part = standing(found[:cut])
        assert chain[: len(part)] == part


def test_a_fence_changes_no_champion_and_voids_what_was_begun_before_it(registry: Registry) -> None:
    promote(registry, 1)
    seen = registry.ledger.standing()[-1].number
    registry.ledger.fence(2)
    registry.ledger.fence(2)  # once is enough
    assert [e.action for e in registry.ledger.standing()] == ["promote", "fence"]
    assert registry.champion().number == 1
    two = registry._client.get_model_version(registry.name, "2")
    for after in (seen, registry.ledger.standing()[-1].number):  # it may have read the ledger before or after
        with pytest.raises(LeaseLost, match="nothing was changed"):
            registry.ledger.append("promote", two, 1, ["late"], after, lambda: 1, PROMOTE)
    assert registry.champion().number == 1
    with pytest.raises(LeaseLost):
        registry.ledger.fence(1)
    with pytest.raises(HeldBack, match="a retraining took the lease over"):
        registry.ledger.append("promote", two, 1, ["by hand"], seen, decision=PROMOTE)
    promote(registry, 3)  # by hand, no lease: it counts
    assert registry.champion().number == 3
    assert registry.rollback().version == 1


def test_a_fence_may_stand_before_the_first_champion(registry: Registry) -> None:
    registry.ledger.fence(1)
    assert registry.champion() is None
    assert promote(registry, 2).after == 1
    assert registry.champion().number == 2


def test_a_promotion_without_its_verdict_is_not_written(registry: Registry) -> None:
    two = registry._client.get_model_version(registry.name, "2")
    for decision in (None, PROMOTE.model_copy(update={"verdict": "HOLD"})):
        with pytest.raises(HeldBack, match="must rest on a PROMOTE verdict"):
            registry.ledger.append("promote", two, None, ["why not"], 0, decision=decision)
    assert registry.ledger.entries() == []


def test_the_lease_is_asked_when_all_else_is_done_and_right_before_the_entry(registry: Registry) -> None:
    calls: list[str] = []

    class Recording:
        def __init__(self, client: Any) -> None:
            self._client = client

        def __getattr__(self, name: str) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                calls.append(name)
                return getattr(self._client, name)(*args, **more)

            return call

    recorded = Registry(registry.name, registry.uri)
    recorded.__dict__["_client"] = Recording(registry._client)

    def before() -> int:
        calls.append("before")
        return 7

    made = recorded.promote(1, PROMOTE.model_copy(update={"candidate": "1"}), before)
    assert calls.count("before") == 1
    assert calls[calls.index("before") + 1] == "create_model_version"
    assert made.lease == 7
    assert made.decision.startswith("PROMOTE ")


def test_a_verdict_on_another_version_moves_nothing(registry: Registry) -> None:
    with pytest.raises(HeldBack, match="it is on 2 and not on 1"):
        registry.promote(1, PROMOTE.model_copy(update={"candidate": "2"}))


def _set(number: int, **tags: str) -> Callable[[Any, str], None]:
    return lambda client, name: [client.set_model_version_tag(name, str(number), k, v) for k, v in tags.items()]


def _drop(number: int, *tags: str) -> Callable[[Any, str], None]:
    return lambda client, name: [client.delete_model_version_tag(name, str(number), tag) for tag in tags]


BY_HAND = {"action": "promote", "version": "3", "previous": "", "why": "[]", "who": "eve", "after": "3"}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_set(3, version="3"), "its entry 3 does not have the hash"),
        (_set(1, version="3"), "its entry 1 does not have the hash"),
        (_set(2, why='["never"]'), "its entry 2 does not have the hash"),
        (_set(2, decision=""), "its entry 2 does not have the hash"),
        (_drop(3, "sha256"), "entry 3 has none"),
        (_drop(1, *NEW), "its entry 1 or one before it"),
        (_drop(2, "after"), r"its entry 2 cannot be read \(KeyError"),
        (_set(3, version="three"), r"its entry 3 cannot be read \(ValueError"),
        (lambda client, name: client.delete_model_version(name, "2"), "its entry 2 is gone"),
        (lambda client, name: client.create_model_version(name, "x:/y", tags=BY_HAND), "entry 4 has none"),
    ],
)
def test_an_edit_by_hand_is_noticed_and_named(registry: Registry, edit: Callable[[Any, str], None], named: str) -> None:
    for number in (1, 2, 1):
        promote(registry, number)
    edit(registry._client, registry.ledger.name)
    for ask in (registry.champion, registry.ledger.chain, registry.rollback):
        with pytest.raises(LedgerEdited, match=named):
            ask()


def test_a_ledger_of_an_earlier_release_is_read_and_gone_on_with(registry: Registry) -> None:
    for number in (1, 2):
        promote(registry, number)
        _drop(number, *NEW)(registry._client, registry.ledger.name)
    assert [(e.version, e.sha256) for e in registry.ledger.chain()] == [(1, None), (2, None)]
    promote(registry, 3)
    assert [e.version for e in registry.ledger.chain()] == [1, 2, 3]
    _set(1, version="3")(registry._client, registry.ledger.name)  # what stands before the first hash is covered by it
    with pytest.raises(LedgerEdited, match="its entry 2 or one before it is not what entry 3 followed"):
        registry.champion()


def test_what_something_else_registered_under_the_ledger_s_name_is_left_out(
    registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    registry._client.create_registered_model(registry.ledger.name)
    registry._client.create_model_version(registry.ledger.name, "x:/y", tags={"team": "finance"})
    assert registry.champion() is None
    promote(registry, 1)
    registry._client.create_model_version(registry.ledger.name, "x:/y")
    promote(registry, 2)
    assert registry.champion().number == 2
    assert [e.number for e in registry.ledger.chain()] == [2, 4]
    said = capsys.readouterr().err
    assert said.count(f"version 1 of '{registry.ledger.name}' is no entry of the ledger: ignored") == 1


def test_changes_of_champion_are_told_without_fences() -> None:
    fence = Entry(2, 1, "fence", 0, None, (), "someone", datetime(2026, 5, 1, tzinfo=UTC), 3)
    assert champions([entry(1, 0), fence, entry(3, 2)]) == [entry(1, 0), entry(3, 2)]


def test_an_edited_ledger_is_bad_input() -> None:
    assert issubclass(LedgerEdited, InputError)
