"""What a version was made from: a typed value that becomes a registered version's tags and comes back from them here.

No other module knows a tag's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipeline.contracts import Contract, TaskName
from pipeline.errors import InputError
from pipeline.json_text import parse_json

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A run's name is joined to ``run_root``: no separator, and no dot in front."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]

_TAG = {"schema_version": "schema", "parent": "parent_version"}
"""Tags that are named otherwise than their fields."""
_JSON = ("tasks", "metrics", "files", "holdout")
_WINDOW = ".."
"""Between the first and the last day of a window."""


class ForeignVersion(InputError):
    """A registered version that says nothing, or nothing readable, of what it was made from."""


@dataclass(frozen=True)
class Foreign:
    """Tags that are no provenance: something else registered the version.

    Args:
        reason: which tag is missing or wrong.
    """

    reason: str


@dataclass(frozen=True)
class Identity:
    """What tells a trained run's version from every other: its name, settings, data and weights."""

    run: str
    config_sha256: str | None
    manifest_sha256: str
    adapter_sha256: str | None


class Provenance(Contract):
    """What a version was made from. What an earlier release did not record is empty or None."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    run: RunName
    """Name of the run, its folder under ``run_root``."""
    manifest_sha256: Sha256
    """Of the shards' manifest."""
    config_sha256: Sha256 | None = None
    """Of the settings that decide the adapter."""
    adapter_sha256: Sha256 | None = None
    """Of the weights' file."""
    files: dict[str, Sha256] = Field(default_factory=dict)
    """Hash of each file of the predictor's folder, by its path there; filled in by the registry."""
    tasks: tuple[TaskName, ...] = ()
    """Names of the tasks that it answers, in the adapter's order."""
    window: tuple[date, date] | None = None
    """First and last day of the shards' records, test split included."""
    trained_until: date | None = None
    """Last day of the records trained on; None where records bear no day."""
    base: str = ""
    """The frozen model under the adapter, in words."""
    base_fingerprint: Sha256 | None = None
    macro: Finite | None = None
    """Macro mean over the tasks at its own evaluation; None where it was undefined."""
    metrics: dict[TaskName, Finite | None] = Field(default_factory=dict)
    """Each task's own metric at that evaluation; None where it was undefined."""
    holdout: dict[TaskName, Sha256] = Field(default_factory=dict)
    """Digest of each task's samples that it was evaluated on, by which another look at them is known."""
    parent: Annotated[int, Field(ge=1)] | None = None
    """Version that was champion when it was registered."""
    git_commit: str = ""
    mlflow_version: str = ""

    @property
    def identity(self) -> Identity:
        """What tells this version from every other."""
        return Identity(self.run, self.config_sha256, self.manifest_sha256, self.adapter_sha256)

    def tags(self) -> dict[str, str]:
        """Return it as tags; what is empty has none."""
        found: dict[str, str] = {}
        for field, value in self:
            if value in (None, "", (), {}):
                continue
            found[_TAG.get(field, field)] = (
                json.dumps(value)
                if field in _JSON
                else _WINDOW.join(map(str, value))
                if field == "window"
                else f"{value}"
            )
        return found

    def shown(self) -> dict[str, str]:
        """Return it as names and words for a reader: its tags, but the schema and hashes of files and samples."""
        return {name: text for name, text in sorted(self.tags().items()) if name not in ("schema", "files", "holdout")}

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Provenance | Foreign:
        """Read the tags of a version, also those of earlier releases; other tags beside them are left alone."""
        values: dict[str, Any] = {}
        for field in cls.model_fields:
            text = tags.get(_TAG.get(field, field), "")
            if text == "" or (field, text) == ("macro", "None"):  # as earlier releases wrote what is undefined
                continue
            try:
                values[field] = parse_json(text) if field in _JSON else text
            except ValueError as error:
                return Foreign(f"tag {field!r} must be JSON, got {text[:80]!r}: {error}")
        values["schema_version"] = int(text) if (text := values.get("schema_version", "1")).isdigit() else text
        if "window" in values:
            values["window"] = values["window"].split(_WINDOW)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            return Foreign(f"tag {_TAG.get(place, place)!r}: {first['msg'].lower()}, got {str(first['input'])[:80]!r}")


def days(window: tuple[str, str] | None) -> tuple[date, date] | None:
    """Return a manifest's window as days.

    Raises:
        InputError: it holds something else than days.
    """
    try:
        return None if window is None else (date.fromisoformat(window[0]), date.fromisoformat(window[1]))
    except ValueError as error:
        raise InputError(f"a manifest's window must be two days as 2026-01-31, got {window}; prepare anew") from error
