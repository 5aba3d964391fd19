"""What a version was made from goes into its tags and comes back the same; other tags are told apart."""

from __future__ import annotations

import json
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.promotion.provenance import Foreign, ForeignVersion, Provenance, days
from pipeline.promotion.registry import Version

HASH = st.integers(0, 2**256 - 1).map("{:064x}".format)
TASK = st.from_regex(r"[a-z0-9][a-z0-9_]{0,20}", fullmatch=True)
NUMBER = st.none() | st.floats(allow_nan=False, allow_infinity=False)
DAYS = st.tuples(st.dates(), st.dates())

provenances = st.builds(
    Provenance,
    run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}", fullmatch=True) | st.just("None"),
    manifest_sha256=HASH,
    config_sha256=st.none() | HASH,
    adapter_sha256=st.none() | HASH,
    files=st.dictionaries(st.text(min_size=1), HASH, max_size=3),
    tasks=st.lists(TASK, max_size=4, unique=True).map(tuple),
    window=st.none() | DAYS,
    trained_until=st.none() | st.dates(),
    base=st.text(),
    base_fingerprint=st.none() | HASH,
    macro=NUMBER,
    metrics=st.dictionaries(TASK, NUMBER, max_size=4),
    parent=st.none() | st.integers(1, 10**6),
    git_commit=st.text(),
    mlflow_version=st.text(),
)
# As the registered versions of earlier releases carry them: the first one, and the last without a schema.
FIRST = {
    "run": "demo",
    "window": "",
    "manifest_sha256": "a" * 64,
    "base_fingerprint": "b" * 64,
    "git_commit": "c1",
    "macro": "None",
    "parent_version": "",
    "mlflow_version": "3.17.2",
}
LATER = {
    **FIRST,
    "run": "weekly-2026-01-11-0a1b2c3d",
    "window": "2026-01-05..2026-01-11",
    "macro": "0.8125",
    "parent_version": "4",
    "config_sha256": "d" * 64,
    "adapter_sha256": "e" * 64,
    "tasks": '["ad", "pick"]',
    "metrics": '{"ad": 0.9, "pick": null}',
    "trained_until": "2026-01-10",
}


@given(provenances)
def test_tags_and_back_is_the_identity(made: Provenance) -> None:
    tags = made.tags()
    assert all(isinstance(text, str) for text in tags.values())
    assert Provenance.from_tags(tags) == made
    assert Provenance.from_tags({**tags, "team": "ads", "mlflow.note": "by hand"}) == made


def test_tags_of_earlier_releases_are_read() -> None:
    first, later = Provenance.from_tags(FIRST), Provenance.from_tags(LATER)
    assert isinstance(first, Provenance)
    assert isinstance(later, Provenance)
    assert (first.run, first.tasks, first.metrics, first.macro, first.window) == ("demo", (), {}, None, None)
    assert (first.parent, first.trained_until, first.identity.adapter_sha256) == (None, None, None)
    assert later.window == (date(2026, 1, 5), date(2026, 1, 11))
    assert (later.parent, later.trained_until, later.macro) == (4, date(2026, 1, 10), 0.8125)
    assert (later.tasks, later.metrics) == (("ad", "pick"), {"ad": 0.9, "pick": None})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": None}, "tag 'run': field required"),
        ({"manifest_sha256": "aa"}, "tag 'manifest_sha256'"),
        ({"run": "../../etc"}, "tag 'run'"),
        ({"run": "/root/evil"}, "tag 'run'"),
        ({"run": ".."}, "tag 'run'"),
        ({"run": "a\n"}, "tag 'run'"),
        ({"tasks": "ad, pick"}, "tag 'tasks' must be JSON"),
        ({"tasks": '["Not a task"]'}, r"tag 'tasks\.0'"),
        ({"metrics": '{"ad": NaN}'}, r"tag 'metrics\.ad'"),
        ({"macro": "inf"}, "tag 'macro'"),
        ({"parent_version": "0"}, "tag 'parent_version'"),
        ({"trained_until": "yesterday"}, "tag 'trained_until'"),
        ({"window": "2026"}, r"tag 'window"),
        ({"schema": "2"}, "tag 'schema'"),
    ],
)
def test_tags_that_are_no_provenance_say_which_and_why(change: dict[str, str | None], words: str) -> None:
    tags = {name: text for name, text in {**LATER, **change}.items() if text is not None}
    found = Provenance.from_tags(tags)
    assert isinstance(found, Foreign)
    with pytest.raises(ForeignVersion, match=words):
        _ = Version(3, "run", "source", found, ()).provenance


def test_a_reader_is_shown_neither_schema_nor_files() -> None:
    later = Provenance.from_tags(LATER | {"files": json.dumps({"predictor.json": "f" * 64})})
    assert isinstance(later, Provenance)
    assert set(later.tags()) - set(later.shown()) == {"schema", "files"}


def test_a_window_that_is_not_of_days_is_refused() -> None:
    assert days(None) is None
    assert days(("2026-01-05", "2026-01-11")) == (date(2026, 1, 5), date(2026, 1, 11))
    with pytest.raises(InputError, match="two days as 2026-01-31"):
        days(("2026-W01", "2026-W02x"))
