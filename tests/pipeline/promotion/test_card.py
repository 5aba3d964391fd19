"""A model card is Markdown that other people's browsers show: what it is given stands in it as text."""

from __future__ import annotations

from pipeline.contracts import TaskSpec
from pipeline.promotion.card import model_card
from pipeline.promotion.provenance import Provenance

HOSTILE = "<script>alert(1)</script> | x"


def test_texts_of_tasks_and_of_the_base_are_no_markup_and_no_column() -> None:
    task = TaskSpec(name="t", kind="multiclass", template="{a}", label_words=(f" {HOSTILE}", " b\n# c"))
    made = Provenance(run="r", manifest_sha256="a" * 64, base=f"{HOSTILE}\n# base")
    card = model_card("m", [task], None, made)
    assert "<script" not in card
    row = next(line for line in card.splitlines() if line.startswith("| t |"))
    assert row.count("|") == 5
    assert "b # c" in row and "\n# base" not in card and "\n# c" not in card
