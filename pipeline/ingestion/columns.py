"""Which columns of the records the tasks read, where those are not named as the tasks name their fields."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipeline.contracts import PROBABILITIES_FIELD, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.ingestion.config import DataConfig
from pipeline.validate import fields_asked


def with_columns(config: DataConfig, tasks: Sequence[TaskSpec]) -> tuple[TaskSpec, ...]:
    """Return the tasks with the columns of ``data.columns`` among their own, which come first; doing it twice is once.

    Raises:
        InputError: a field that is mapped is none that is read.
    """
    own = (config.task_field, config.id_field, config.time_field, PROBABILITIES_FIELD)
    of_any = {field for task in tasks for field in fields_asked(task)}
    _check(config.columns, {*own, *of_any}, "data.columns")
    result = []
    for task in tasks:
        fields = {*own, *fields_asked(task)}
        _check(task.columns, fields, f"task {task.name!r}: columns")
        columns = {**{f: path for f, path in config.columns.items() if f in fields}, **task.columns}
        result.append(task.model_copy(update={"columns": columns}) if columns != task.columns else task)
    return tuple(result)


def _check(columns: Iterable[str], known: set[str], place: str) -> None:
    for field in columns:
        if field not in known:
            raise InputError(
                f"{place} must map fields that are read, each to the column of the records that holds it, got the "
                f"field {field!r}{did_you_mean(field, known)}"
            )


def columns_asked(config: DataConfig, tasks: Sequence[TaskSpec]) -> set[str]:
    """Return the columns, or dotted paths into them, that are read of the records of these tasks."""
    own = (config.task_field, config.id_field, config.time_field, PROBABILITIES_FIELD)
    found = {config.columns.get(field, field) for field in own}
    for task in tasks:
        found |= {task.columns.get(field, field) for field in (*own, *fields_asked(task))}
    return found
