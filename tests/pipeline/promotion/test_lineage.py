"""A version or a day answers which data, code and parent made the champion."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.contracts import EvaluationReport, MacroResult, TaskResult
from pipeline.errors import InputError
from pipeline.promotion.card import model_card
from pipeline.promotion.entries import Entry, champion_at, standing
from pipeline.promotion.lineage import lineage
from pipeline.promotion.registry import Registry
from tests.pipeline.promotion.conftest import TASKS, add_version, made_from, promote

JANUARY, FEBRUARY = (date(2026, 1, 5), date(2026, 2, 1)), (date(2026, 1, 12), date(2026, 2, 8))


def entry(number: int, after: int, version: int = 1, day: int = 1) -> Entry:
    moment = datetime(2026, 5, day, 12, tzinfo=UTC)
    return Entry(number, after, "promote", version, None, ("why",), "someone", moment)


def test_the_champion_of_a_day_is_the_last_that_stood() -> None:
    chain = standing([entry(1, 0, 4, 1), entry(2, 1, 7, 3), entry(3, 1, 9, 3), entry(4, 2, 8, 6)])
    assert [e.version for e in chain] == [4, 7, 8]
    found = [champion_at(chain, datetime(2026, 5, d, 23, tzinfo=UTC)) for d in (1, 2, 3, 5, 6)]
    assert [e.version for e in found] == [4, 4, 7, 7, 8]
    assert champion_at(chain, datetime(2026, 4, 30, tzinfo=UTC)) is None


@given(st.lists(st.integers(0, 12), max_size=12), st.randoms())
def test_whatever_is_appended_later_the_standing_entries_stand(after: list[int], random) -> None:
    entries = [entry(i + 1, a) for i, a in enumerate(after)]
    full = standing(entries)
    for cut in range(len(entries)):
        part = standing(entries[:cut])
        assert full[: len(part)] == part
    shuffled = list(entries)
    random.shuffle(shuffled)
    assert standing(shuffled) == full


def test_lineage_of_a_day_a_number_and_an_alias(store: str, adapter: Path) -> None:
    registry = Registry("lineage", store)
    add_version(registry, adapter, window=JANUARY, manifest_sha256="a" * 64, git_commit="c1")
    promote(registry, 1)
    add_version(registry, adapter, window=FEBRUARY, manifest_sha256="b" * 64, git_commit="c2")
    promote(registry, 2)
    today = datetime.now(UTC).date()
    found = lineage(registry, today.isoformat())
    assert (found.version.number, found.version.provenance.manifest_sha256) == (2, "b" * 64)
    assert [v.number for v in found.ancestors] == [1]
    assert [e.version for e in found.also] == [1]
    assert found.until is None
    old = lineage(registry, 1)
    assert old.until == lineage(registry, "champion").entry.time
    rows = found.rows()
    assert rows["window"] == "2026-01-12..2026-02-08"
    assert (rows["because"], rows["ancestors"], rows["champion until"]) == ("better", "1", "now")
    yesterday = date.today() - timedelta(days=2)
    with pytest.raises(InputError, match=f"got {yesterday}: the first became champion on"):
        lineage(registry, yesterday.isoformat())


def test_a_parent_that_was_deleted_ends_the_ancestry(store: str, adapter: Path) -> None:
    registry = Registry("orphan", store)
    for _ in range(3):
        promote(registry, add_version(registry, adapter))
    registry._client.delete_model_version("orphan", "1")
    assert [v.number for v in lineage(registry, 3).ancestors] == [2]


def test_the_card_says_what_it_answers_and_how_well() -> None:
    result = TaskResult(n=40, metric="auc", value=0.91, ci95=(0.88, 0.94))
    undefined = TaskResult(n=3, metric="accuracy", value=None, ci95=None, reason="no sample was scored")
    report = EvaluationReport(
        model="m", data={}, tasks={"query_ad": result, "pick": undefined}, macro=MacroResult(value=None, ci95=None)
    )
    card = model_card("ads-relevance", TASKS, report, made_from(window=JANUARY, base="SmolLM2"))
    assert "| query_ad | binary | `query`, `ad` | no, yes |" in card
    assert "| query_ad | auc | 0.9100 | 0.8800 – 0.9400 | 40 |" in card
    assert "| pick | accuracy | undefined | no sample was scored | 3 |" in card
    assert "of SmolLM2. It answers 2 tasks" in card
    assert "- window: 2026-01-05..2026-02-01" in card
    assert "git commit" not in card
