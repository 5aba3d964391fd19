"""Missing is not a word; what a prompt shows of every other value."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline.contracts import TaskSpec
from pipeline.record import Rejected, choices_of, fields_found, plain, text_of, texts_of

MISSING = [
    *(None, float("nan"), float("inf"), -float("inf"), np.float32("nan"), np.float64("inf"), np.float16("nan")),
    *(pd.NA, pd.NaT, np.datetime64("NaT"), Decimal("NaN"), Decimal("-Infinity"), np.array(float("nan"))),
]


@pytest.mark.parametrize("value", MISSING, ids=repr)
def test_missing_is_not_a_word(value: Any) -> None:
    assert plain(value) is None
    with pytest.raises(Rejected, match="field 'a' is missing"):
        text_of({"a": value}, "a")
    with pytest.raises(Rejected, match="field 'choices' is missing"):
        choices_of({"choices": value}, TaskSpec(name="t", kind="choice", template="{a}:"))
    with pytest.raises(Rejected, match="holds a blank choice or one that is not text"):
        choices_of({"choices": ["a", value]}, TaskSpec(name="t", kind="choice", template="{a}:"))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(("nan", "nan"), (1, "1"), (1.5, "1.5"), (True, "true"), (False, "false"), (np.int8(3), "3")),
        (b"caf\xc3\xa9", "café"),
        *((np.bool_(True), "true"), (np.str_("a"), "a"), (Decimal("1.50"), "1.50"), (Decimal("1E+2"), "100")),
        *((dt.date(2026, 1, 5), "2026-01-05"), (dt.datetime(2026, 1, 5, 1, 2), "2026-01-05T01:02:00")),
        *((pd.Timestamp("2026-01-05"), "2026-01-05T00:00:00"), (dt.time(1, 2), "01:02:00")),
    ],
    ids=repr,
)  # fmt: skip
def test_a_prompt_shows_numbers_dates_truth_values_and_binary_text(value: Any, text: str) -> None:
    assert text_of({"a": value}, "a") == text


@pytest.mark.parametrize(
    "value", [["a"], {"a": 1}, dt.timedelta(1), np.timedelta64(1, "s"), object(), 10**5000], ids=type
)
def test_what_has_no_one_text_is_rejected(value: Any) -> None:
    with pytest.raises(Rejected, match="field 'a' is not text"):
        text_of({"a": value}, "a")


@pytest.mark.parametrize("value", ["\ud83d", b"\xff", "a\udcff"])
def test_what_cannot_be_stored_is_rejected(value: Any) -> None:
    with pytest.raises(Rejected, match="is not valid U"):
        text_of({"a": value}, "a")
    with pytest.raises(Rejected, match="is not valid U"):
        choices_of({"choices": ["a", value]}, TaskSpec(name="t", kind="choice", template="{a}:"))


@pytest.mark.parametrize(
    "value", [["a", "b"], ("a", "b"), np.array(["a", "b"], object), '["a", "b"]', [b"a", np.str_("b")]]
)
def test_choices_are_a_list_an_array_or_a_list_in_json_text(value: Any) -> None:
    assert choices_of({"choices": value}, TaskSpec(name="t", kind="choice", template="{a}:")) == ("a", "b")


@pytest.mark.parametrize(
    "value", ["ab", "[" * 5000, '["a"]', ["a"], [], 3, '{"a": 1}', '["a", 1]', np.array(["a", ""])]
)
def test_what_is_no_list_of_texts_gives_no_choices(value: Any) -> None:
    with pytest.raises(Rejected, match="field 'choices'"):
        choices_of({"choices": value}, TaskSpec(name="t", kind="choice", template="{a}:"))


def test_blank_texts_are_no_prompt() -> None:
    with pytest.raises(Rejected, match="every text field is blank"):
        texts_of({"a": " ", "b": ""}, ("a", "b"))


def test_the_nearest_field_is_named_with_its_spaces() -> None:
    assert "for 'text' did you mean 'texts'?" in fields_found(["id", "texts"], ["text"])
    assert "did you mean ' Text'? (names are taken as they stand" in fields_found(["id", " Text"], ["text"])
    assert len(fields_found([f"f{n}" * 100 for n in range(10_000)], ["text"])) < 2000
