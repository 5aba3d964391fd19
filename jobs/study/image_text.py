"""The data of suite ``image_text``: questions about images, captions made of what their answers say, and a text task.

Of an easy-VQA image the questions with their answers tell colour and shape: "is there not a red shape?", "no" says that
the shape is red. Where both are told, the image has a caption, "a red circle". Images of test stay those of test.

    python -m jobs.study.image_text DATA OUT
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.contracts import write_atomic
from pipeline.json_text import parse_json
from pipeline.progress import say

SPLITS = ("train", "test")
AS_THEY_ARE = ("vision/easy_vqa", "vision/nlvr", "ads/question_type")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
_ASKED = "what is in the image?"
Record = dict[str, Any]


def captions(questions: Iterable[Record]) -> Iterator[Record]:
    """Yield a record of each image whose colour and shape are told: ``id``, ``image``, ``question``, ``answer``.

    Args:
        questions: records of easy_vqa with ``image``, ``question`` and ``answer``.
    """
    told: dict[str, dict[str, str]] = {}
    for record in questions:
        facts = told.setdefault(record["image"], {})
        for word in facts_of(record["question"], record["answer"]):
            facts["colour" if word in COLOURS else "shape"] = word
    for image, facts in told.items():
        if len(facts) == 2:
            name = image.rpartition(".")[0]
            answer = f"a {facts['colour']} {facts['shape']}"
            yield {"id": f"caption-{name}", "image": image, "question": _ASKED, "answer": answer}


def facts_of(question: str, answer: str) -> list[str]:
    """Return the colours and shapes that a question and its answer say of the one shape in the image."""
    words = question.rstrip("?").split()
    named = [word for word in words if word in COLOURS + SHAPES]
    if answer in COLOURS + SHAPES:
        return [*named, answer]
    is_asked_for = not {"no", "not"} & set(words)
    return named if (answer == "yes") == is_asked_for else []


def write(data: Path, out: Path) -> None:
    """Write the suite's tasks.

    Args:
        data: folder of ``vision/`` and ``ads/``.
        out: folder; tasks that are there already are written anew.
    """
    for task in AS_THEY_ARE:
        shutil.copytree(data / task, out / task.rpartition("/")[2], dirs_exist_ok=True)
    folder = out / "easy_captions"
    folder.mkdir(parents=True, exist_ok=True)
    named: set[str] = set()
    for split in SPLITS:
        with gzip.open(data / "vision" / "easy_vqa" / f"{split}.jsonl.gz", "rt") as lines:
            found = list(captions(map(parse_json, lines)))
        named |= {record["image"] for record in found}
        text = "".join(json.dumps(record) + "\n" for record in found)
        write_atomic(folder / f"{split}.jsonl.gz", gzip.compress(text.encode(), mtime=0))
        say(f"easy_captions: {len(found)} {split} records")
    with (
        zipfile.ZipFile(data / "vision" / "easy_vqa" / "images.zip") as given,
        zipfile.ZipFile(folder / "images.zip", "w") as images,
    ):
        for name in sorted(named):
            images.writestr(zipfile.ZipInfo(name), given.read(name))


def main() -> None:
    """Read the arguments and write the suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with vision/ and ads/")
    parser.add_argument("out", type=Path, help="folder to write the tasks into")
    arguments = parser.parse_args()
    write(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
