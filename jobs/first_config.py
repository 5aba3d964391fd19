"""A first configuration from a look at the data: ``mtl-lora init DATA``.

Look at the first records of each file, guess what they ask, and write a commented YAML that a person then fixes.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.first_tars import LOOKED_AT, columns_of, pattern_of, told_by
from pipeline.errors import InputError
from pipeline.ingestion.config import CsvDialect, DataConfig
from pipeline.ingestion.csv_records import found_dialect
from pipeline.ingestion.diagnosis import cause, head_of
from pipeline.ingestion.records import read_unit, split_units
from pipeline.ingestion.sources import SUFFIXES, SourceFile

_LOOKED_AT = 20_000
"""Records of a file that are looked at."""
_LABELS = (
    *("label", "cls", "answer", "target", "class", "clicked", "click", "relevance", "rating", "stars", "score", "y"),
)
"""Names of label fields, the likeliest first."""
_ANSWERS = ("answer", "answers", "response", "output", "completion", "target", "summary", "caption", "reply")
"""Names of fields whose texts a model may learn to write, the likeliest first."""
_CHARACTERS_A_TOKEN, _LONGEST_ANSWER = 3, 128
"""By which the longest answer in tokens is guessed, and the most that is proposed."""
_MOST_CLASSES = 200
_IDS = re.compile(r"(^|_)(id|key|uuid|guid|url|time|date|timestamp)$", re.IGNORECASE)
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_SPLIT = re.compile(r"(?P<task>.*?)[._-]?(?P<split>train|test|validation|valid|val|dev|eval)[._-]?\d*$", re.IGNORECASE)
_EVALUATION = {"valid": "validation", "val": "validation", "eval": "test"}
_DEV = "dev"
"""Split for choosing where there is a test split, else for testing."""


@dataclass(frozen=True)
class Seen:
    """What the first records of a task hold.

    Args:
        records: how many were looked at.
        columns: field → its values, in order of first sight.
        images: members of a tar that every sample has.
    """

    records: int
    columns: Mapping[str, list[Any]]
    images: Sequence[str] = ()


@dataclass(frozen=True)
class Guess:
    """A task as it is proposed.

    Args:
        keys: of the task in YAML.
        notes: what a person should know of the guess.
    """

    keys: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def first_config(data: Path, name: str = "") -> str:
    """Return a commented configuration for a record file or a tar of samples, or for a folder of them.

    Args:
        data: a file, a folder of files named by task and split, or a folder ``TASK/train.*``, ``TASK/test.*``; of tars,
            where there is no record file, any number a task and split.
        name: of the run; the data's by default.

    Raises:
        InputError: there is no record file and no tar, or none of its fields can be a label.
    """
    files = _find(data)
    paths = [path for splits in files.values() for several in splits.values() for path in several]
    is_tar = all(path.suffix == ".tar" for path in paths)
    seen = {task: _look(splits) for task, splits in files.items()}
    guesses = {task: _guess(task, found) for task, found in seen.items()}
    for task, found in seen.items():
        if found.images:
            guesses[task].keys["image_field"] = found.images[0]
    looked_at = LOOKED_AT if is_tar else _LOOKED_AT
    lines = [
        f"# Proposed from {data.name}: up to {looked_at:,} records of each file were looked at. Fix what was",
        "# guessed wrong, then: mtl-lora plan --config THIS_FILE",
        f"name: {_name(name or data.name.partition('.')[0])}",
        "data:",
        f"  source: {'webdataset  # tars that stay where they are' if is_tar else 'records'}",
        f"  root: {json.dumps(str(data if data.is_dir() else data.parent))}",
        *(["  csv: auto  # the delimiter is found file by file"] if any(map(_is_another_dialect, paths)) else []),
        "  files:  # task, split, file (or glob) under root",
    ]
    for task, splits in files.items():
        root = data if data.is_dir() else data.parent
        shown = {split: pattern_of(paths, root) for split, paths in splits.items()}
        lines.append(f"    {task}: {json.dumps(shown)}")
        if "test" not in splits:
            lines.append("    # evaluation needs a split of its own: add test: FILE with records that are not in train")
    lines.append("tasks:")
    for task, guess in guesses.items():
        lines += [f"  {task}:", *(f"    # {note}" for note in guess.notes)]
        lines += [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in guess.keys.items()]
    lines += [
        "# model: {num_layers: 6}                # a cut of the base for a quick first run; leave it out for the whole",
        "# training: {epochs: 1.0, num_workers: 2}",
        "# promotion: {model_name: my-model}     # in the registry",
    ]
    return "\n".join(lines) + "\n"


def _find(data: Path) -> dict[str, dict[str, list[Path]]]:
    """Return task → split → file, of tars all."""
    if data.is_file():
        paths = [data]
    elif data.is_dir():
        files = sorted(path for path in data.rglob("*") if path.is_file())
        tars = [path for path in files if path.suffix == ".tar"]
        paths = [path for path in files if path.name.endswith(SUFFIXES)] or tars
    else:
        paths = []
    found: dict[str, dict[str, list[Path]]] = {}
    for path in paths:
        task, split = _task_and_split(path, data)
        of_split = found.setdefault(task, {}).setdefault(split, [])
        if not of_split or path.suffix == ".tar":
            of_split.append(path)
    for splits in found.values():
        if _DEV in splits:
            splits.setdefault("validation" if "test" in splits else "test", splits.pop(_DEV))
    if not found:
        raise InputError(
            f"DATA must be a record file or hold some, named {', '.join(SUFFIXES)}, or tars of samples, found none at "
            f"{data}; fix the path"
        )
    return found


def _task_and_split(path: Path, data: Path) -> tuple[str, str]:
    stem = path.name.partition(".")[0]
    if path.suffix == ".tar":
        path, stem = told_by(path, data, _SPLIT)
    match = _SPLIT.fullmatch(stem)
    split = match["split"].lower() if match else "train"
    task = (match["task"] if match else stem) or (path.parent.name if path.parent != data else data.name)
    return _task_name(task), _EVALUATION.get(split, split)


def _task_name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:64] or "task"


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "run"


def _look(splits: Mapping[str, list[Path]]) -> Seen:
    paths = splits.get("train") or next(iter(splits.values()))
    path = paths[0]
    if path.suffix == ".tar":
        seen = Seen(*columns_of(paths))
        if not seen.records:
            raise InputError(f"{path.parent} must hold tars with readable samples, found none; bring some")
        return seen
    columns: dict[str, list[Any]] = {}
    count = 0
    for record in islice(_records(path), _LOOKED_AT):
        count += 1
        for key, value in record.items():
            columns.setdefault(key, []).append(value)
    if not count:
        raise InputError(f"{path} must hold a readable record, found none{cause(_source(path))}; bring some")
    return Seen(count, columns)


def _is_another_dialect(path: Path) -> bool:
    return _dialect(path).delimiter != CsvDialect().delimiter


def _source(path: Path) -> SourceFile:
    return SourceFile(task="*", split="train", location=str(path.resolve()), name=path.name, size=path.stat().st_size)


def _dialect(path: Path) -> CsvDialect:
    """Return the dialect that a CSV file is found to be in; the usual one where none is found."""
    if ".csv" not in path.name:
        return CsvDialect()
    try:
        return found_dialect(head_of(str(path)), CsvDialect(delimiter="auto"), path.name)
    except InputError:  # one column, or two signs that fit: a look at the records says what is wrong
        return CsvDialect()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    config = DataConfig(root=str(path.parent), csv=_dialect(path))
    for unit in split_units([_source(path)]):
        for line in read_unit(unit, config):
            if line.error is None:
                yield line.record


def _guess(task: str, seen: Seen) -> Guess:
    columns = seen.columns
    choices = next((name for name, values in columns.items() if _are_lists(values)), None)
    texts = [name for name, values in columns.items() if _is_text(name, values, seen)]
    label = _label(columns, texts)
    if label is None and (answer := next((name for name in _ANSWERS if _are_answers(columns.get(name))), None)):
        return _written(columns, [name for name in texts if name != answer], answer, seen.records)
    if label is None:
        raise InputError(
            f"task {task!r}: one of the fields must be a label, none of {list(columns)} has 2 to "
            f"{_MOST_CLASSES} values that come again; name it {_LABELS[0]!r}, or write the configuration by hand"
        )
    texts = [name for name in texts if name != label and not _names(columns, name, label)] or texts[:1]
    keys: dict[str, Any] = {"template": "\n".join(f"{_title(name)}: {{{name}}}" for name in texts) + "\nAnswer:"}
    if label != ("answer" if choices else "label"):
        keys["label_field"] = label
    notes = [f"fields seen: {', '.join(columns)}; {seen.records} records"]
    if choices:
        keys |= {"kind": "choice"} | ({"choices_field": choices} if choices != "choices" else {})
        return Guess(keys, [*notes, "kind: each record brings its own choices"])
    return Guess(keys | _classes(columns, label, notes), notes)


def _are_answers(values: Sequence[Any] | None) -> bool:
    return bool(values) and all(isinstance(text, str) and text.strip() for text in map(_first, values or ()))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


def _written(columns: Mapping[str, list[Any]], texts: Sequence[str], answer: str, records: int) -> Guess:
    """Return a task whose answers the model writes."""
    longest = max(len(_first(value)) for value in columns[answer]) // _CHARACTERS_A_TOKEN + 2
    tokens = min(1 << (longest - 1).bit_length(), _LONGEST_ANSWER)
    template = "".join(f"{_title(name)}: {{{name}}}\n" for name in texts) + "Answer:"
    keys: dict[str, Any] = {"kind": "generation", "template": template}
    if answer != "answer":
        keys["label_field"] = answer
    notes = [
        f"fields seen: {', '.join(columns)}; {records} records",
        f"each {answer} is a text of its own: the model learns to write it, in at most {tokens} tokens",
        "metric: exact_match, rouge_l, bleu, chrf or cider instead of token_f1",
    ]
    return Guess(keys | {"generation": {"max_new_tokens": tokens}}, notes)


def _classes(columns: Mapping[str, list[Any]], label: str, notes: list[str]) -> dict[str, Any]:
    """Return kind and label words of a task by its labels."""
    counts = Counter(value for value in columns[label] if value is not None)
    numbers = [_number(value) for value in counts]
    notes.append("labels seen: " + ", ".join(f"{value!r} {n} times" for value, n in counts.most_common(8)))
    if any(number is None for number in numbers):  # words
        words = sorted(f" {str(value).strip()}" for value in counts)
        return {"kind": "binary" if len(words) == 2 else "multiclass", "label_words": words}
    values = sorted({number for number in numbers if number is not None})
    if any(value != int(value) for value in values):
        low, high = int(values[0]), int(values[-1] + 0.999)
        grid = [float(value) for value in range(low, high + 1)]
        notes.append("numbers between whole ones: ordinal, the prediction is the expected value")
        return {"kind": "ordinal", "label_words": [f" {value:g}" for value in grid], "label_values": grid}
    if values == [0, 1]:
        notes.append("class 0 is ' no' and class 1 is ' yes': say it in the words of the task")
        return {"label_words": [" no", " yes"]}
    names = _names_of(columns, label, int(values[-1]) + 1)
    if values[0] != 0 and names == [f" {i}" for i in range(len(names))]:
        notes.append("numbers from another one than 0: ordinal, the prediction is the expected value")
        grid = [float(value) for value in range(int(values[0]), int(values[-1]) + 1)]
        return {"kind": "ordinal", "label_words": [f" {value:g}" for value in grid], "label_values": grid}
    notes.append("label words in the order of the classes; words that say what a class means learn faster")
    return {"kind": "multiclass", "label_words": names}


def _names_of(columns: Mapping[str, list[Any]], label: str, count: int) -> list[str]:
    """Return a word a class: from a field that names the classes one to one, else their numbers."""
    for name in columns:
        if _names(columns, name, label):
            known = {
                _number(value): str(word).strip() for value, word in zip(columns[label], columns[name], strict=False)
            }
            words = [f" {known.get(float(i), f'class {i}')}" for i in range(count)]
            if len(set(words)) == count:
                return words
    return [f" {i}" for i in range(count)]


def _names(columns: Mapping[str, list[Any]], name: str, label: str) -> bool:
    """Whether a field says in words, one to one, what the label says."""
    pairs = set(zip(map(str, columns[name]), map(str, columns[label]), strict=False))
    words, labels = ({pair[i] for pair in pairs} for i in (0, 1))
    is_text = all(isinstance(value, str) for value in columns[name])
    return name != label and is_text and len(pairs) == len(words) == len(labels) > 1


def _label(columns: Mapping[str, list[Any]], texts: Sequence[str]) -> str | None:
    usable = [name for name, values in columns.items() if _may_be_label(values)]
    for wanted in _LABELS:
        for name in usable:
            if name.lower() == wanted:
                return name
    others = [name for name in usable if not _IDS.search(name) and name not in texts]
    return others[-1] if others else None


def _may_be_label(values: Sequence[Any]) -> bool:
    plain = [value for value in values if isinstance(value, bool | int | float | str)]
    distinct = len(set(plain))
    numbers = all(_number(value) is not None for value in plain)
    return len(plain) > 0 and distinct >= 2 and (distinct <= _MOST_CLASSES or numbers)


def _is_text(name: str, values: Sequence[Any], seen: Seen) -> bool:
    words = [value for value in values if isinstance(value, str)]
    if any(value.lower().endswith(_IMAGES) for value in words[:20]):
        return False
    if len(words) < len(values) / 2 or _IDS.search(name) or all(_number(value) is not None for value in words):
        return False
    return len(set(words)) > min(_MOST_CLASSES, seen.records / 2) or name.lower().startswith(
        ("text", "txt", "question")
    )


def _are_lists(values: Sequence[Any]) -> bool:
    return all(isinstance(value, list) and len(value) > 1 for value in values)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _title(name: str) -> str:
    return name.replace("_", " ").strip().capitalize()
