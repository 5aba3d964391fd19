"""The registry remembers who was the best champion, and how often a holdout decided."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipeline.promotion.anchor import anchor_of, looks_before
from pipeline.promotion.entries import Entry
from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import PROMOTE, made_from

BOTH = ("ad", "keyword")


def entry(number: int, version: int, anchor: int | None = None, action: str = "promote") -> Entry:
    decision = "" if action == "rollback" else "PROMOTE 0123" + (f" anchor {anchor}" if anchor else "")
    previous, time = (number - 1) or None, datetime(2026, 5, number, tzinfo=UTC)
    return Entry(number, number - 1, action, version, previous, ("why",), "me", time, decision=decision)  # type: ignore[arg-type]


FIRST, SECOND, THIRD = entry(1, 1, 1), entry(2, 2, 1), entry(3, 3, 1)


@pytest.mark.parametrize(
    ("case", "chain", "answers", "expected"),
    [
        ("no champion yet", [], {}, None),
        ("the first is its own", [FIRST], {1: BOTH}, 1),
        ("small falls stay measured from the first", [FIRST, SECOND, THIRD], {1: BOTH, 2: BOTH, 3: BOTH}, 1),
        ("a better one took its place", [FIRST, entry(2, 2, 2), entry(3, 3, 2)], {1: BOTH, 2: BOTH, 3: BOTH}, 2),
        ("the champion took it", [FIRST, entry(2, 2, 2)], {1: BOTH, 2: BOTH}, 2),
        ("entries of earlier releases", [entry(1, 1), entry(2, 2), entry(3, 3)], {1: BOTH, 2: BOTH, 3: BOTH}, 1),
        ("it lacks a task", [FIRST, SECOND, THIRD], {1: ("ad",), 2: BOTH, 3: BOTH}, 2),
        ("nobody else has all", [FIRST, SECOND], {1: ("ad",), 2: BOTH}, 2),
        ("nor has the champion", [FIRST, SECOND], {1: ("ad",), 2: ("ad",)}, 1),
        (
            "a rollback brings its own back",
            [FIRST, entry(2, 2, 2), entry(3, 1, action="rollback")],
            {1: BOTH, 2: BOTH},
            1,
        ),
    ],
)
def test_the_anchor_of(case: str, chain: list, answers: dict, expected: int | None) -> None:
    assert anchor_of(chain, lambda number: answers[number], BOTH) == expected, case


def test_looks_are_other_versions_that_were_judged_on_the_same_samples_of_a_task() -> None:
    mine, other = {"ad": "1" * 64, "keyword": "2" * 64}, {"ad": "3" * 64}
    versions = [
        (1, made_from(manifest_sha256="b" * 64, holdout=other)),
        (2, made_from(manifest_sha256="c" * 64, holdout={"keyword": "2" * 64})),
        (3, made_from(manifest_sha256="a" * 64)),  # of an earlier release: the manifest alone is known
        (4, made_from(manifest_sha256="d" * 64, holdout={"ad": "2" * 64})),
        (5, made_from(manifest_sha256="a" * 64, holdout=mine)),
        (6, made_from(manifest_sha256="a" * 64, holdout=mine)),
    ]
    assert [looks_before(number, versions) for number, _ in versions] == [0, 0, 0, 0, 2, 3]


def test_the_ledger_names_the_anchor_of_each_promotion_and_old_tags_say_nothing_of_samples(registry: Registry) -> None:
    def promote(number: int, champion: int | None, anchor: int | None, becomes: bool) -> None:
        known = {"candidate": str(number), "champion": champion and str(champion), "anchor": anchor and str(anchor)}
        registry.promote(number, PROMOTE.model_copy(update={**known, "becomes_anchor": becomes}))

    tasks = registry.tasks_of(registry.version(1))
    assert registry.anchor(tasks) is None
    promote(1, None, None, True)
    promote(2, 1, 1, False)
    assert [e.anchor for e in registry.ledger.chain()] == [1, 1]
    assert registry.anchor(tasks).number == 1
    assert registry.anchor(tasks, named=3).number == 3
    promote(3, 2, 1, True)
    assert registry.anchor(tasks).number == 3
    registry.rollback()
    assert registry.anchor(tasks).number == 1
    assert registry.looks(3) == 2  # copies of one version: the same manifest
    origin = made_from(holdout={"ad": "1" * 64})
    assert type(origin).from_tags(origin.tags()) == origin
    assert "holdout" not in origin.shown()
