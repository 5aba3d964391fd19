"""Tasks that differ in their question alone: the same texts, template and label words with different answers.

Where each task has texts or words of its own, a model knows from the prompt what is asked, and one adapter without any
notion of tasks can serve all of them. Here the prompt does not tell: whoever does not know the task cannot be right on
all. Three suites are made from records that are there:

- ``offers``: of two offers of electronics, same product? same brand? is the first one dearer?
- ``review_questions``: of a review of a book or a film, is it positive? is it of a book?
- ``question_kinds``: of a question, does it ask for a thing? a person? a place? a number? Its texts are short.

    python -m jobs.study.interference DATA OUT
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.contracts import write_atomic
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.progress import say

SPLITS = ("train", "test")
Record = dict[str, Any]


def offer_questions(pairs: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """Yield task and record of the three questions on each pair whose brands and prices are both given and differ in
    price.

    Args:
        pairs: records with ``id``, ``text_a``, ``text_b`` (``name: value; …``) and ``label``, 1 for the same product.
    """
    for pair in pairs:
        a, b = (dict(re.findall(r"(\w+): ([^;]*)", pair[side])) for side in ("text_a", "text_b"))
        prices = [_number(offer.get("price", "")) for offer in (a, b)]
        if not (a.get("brand") and b.get("brand")) or None in prices or prices[0] == prices[1]:
            continue
        answers = {
            "same_product": pair["label"],
            "same_brand": int(a["brand"].strip() == b["brand"].strip()),
            "first_is_dearer": int(prices[0] > prices[1]),  # type: ignore[operator]
        }
        for task, label in answers.items():
            yield task, {"id": pair["id"], "text_a": pair["text_a"], "text_b": pair["text_b"], "label": label}


def review_questions(books: Iterable[Record], films: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """Yield task and record of the two questions on each review.

    Args:
        books: records with ``id``, ``text_a`` and ``label``, 1 for positive.
        films: the same of films.
    """
    for of_book, records in ((1, books), (0, films)):
        for record in records:
            for task, label in (("is_positive", record["label"]), ("is_of_a_book", of_book)):
                yield task, {"id": record["id"], "text_a": record["text_a"], "label": label}


KINDS = {"asks_for_a_thing": 1, "asks_for_a_person": 3, "asks_for_a_place": 4, "asks_for_a_number": 5}
"""Task of ``question_kinds`` → class of ``ads/question_type`` for which it says yes."""


def kind_questions(questions: Iterable[Record]) -> Iterator[tuple[str, Record]]:
    """Yield task and record of the four questions on each question.

    Args:
        questions: records with ``id``, ``text_a`` and ``label``, the class of what is asked for.
    """
    for question in questions:
        for task, kind in KINDS.items():
            label = int(question["label"] == kind)
            yield task, {"id": question["id"], "text_a": question["text_a"], "label": label}


def write_suites(data: Path, out: Path) -> dict[str, int]:
    """Write the suites as ``OUT/SUITE/TASK/SPLIT.jsonl.gz``, each file whole or not at all.

    Args:
        data: folder that holds ``ads/offer_match_electronics``, ``ads/question_type``, ``reviews/books`` and
            ``reviews/dvd``.
        out: folder to write to.

    Returns:
        ``SUITE/TASK/SPLIT`` → records.

    Raises:
        InputError: a file is missing.
    """
    counts: dict[str, int] = {}
    for split in SPLITS:
        offers = offer_questions(_records(data / "ads/offer_match_electronics", split))
        reviews = review_questions(_records(data / "reviews/books", split), _records(data / "reviews/dvd", split))
        kinds = kind_questions(_records(data / "ads/question_type", split))
        for suite, found in (("offers", offers), ("review_questions", reviews), ("question_kinds", kinds)):
            tasks: dict[str, list[Record]] = {}
            for task, record in found:
                tasks.setdefault(task, []).append(record)
            for task, records in tasks.items():
                _write(out / suite / task / f"{split}.jsonl.gz", records)
                counts[f"{suite}/{task}/{split}"] = len(records)
    return counts


def _records(folder: Path, split: str) -> Iterator[Record]:
    path = folder / f"{split}.jsonl.gz"
    if not path.is_file():
        raise InputError(f"the interference suites are made from {path}, which is not there; name the data's folder")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(parse_json, lines)


def _write(path: Path, records: Iterable[Record]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomic(path, gzip.compress(text.encode(), mtime=0))


def _number(text: str) -> float | None:
    try:
        return float(text.strip())
    except ValueError:
        return None


def main() -> None:
    """Write the suites that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with ads/ and reviews/")
    parser.add_argument("out", type=Path, help="folder to write to")
    arguments = parser.parse_args()
    for place, count in write_suites(arguments.data, arguments.out).items():
        say(f"{place}: {count} records")


if __name__ == "__main__":
    main()
