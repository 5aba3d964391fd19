"""Registered versions as they are read from MLflow: what there is, what there is not, and what does not answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError, masked
from pipeline.promotion.provenance import Foreign, ForeignVersion, Provenance

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""Answers of a registry that is well: there is no such version or model, or no alias of that name."""


class RegistryUnavailable(RuntimeError):
    """The registry or its file store does not answer: no fault of what was asked for."""


@dataclass(frozen=True)
class Version:
    """One registered version.

    Args:
        number: as the registry counts.
        run_id: the MLflow run that made it.
        source: URI of its files.
        origin: what it was made from; foreign where its tags do not say.
        aliases: names that point at it now.
    """

    number: int
    run_id: str
    source: str
    origin: Provenance | Foreign
    aliases: tuple[str, ...]

    @property
    def provenance(self) -> Provenance:
        """What it was made from.

        Raises:
            ForeignVersion: its tags do not say.
        """
        if isinstance(self.origin, Foreign):
            raise ForeignVersion(
                f"a version must say what it was made from, version {self.number} does not: {self.origin.reason}; "
                "something else registered it: name another version, or delete it"
            )
        return self.origin

    @property
    def adapter_sha256(self) -> str | None:
        """Hash of its weights' file; None where its tags do not say."""
        return None if isinstance(self.origin, Foreign) else self.origin.adapter_sha256

    @property
    def files(self) -> dict[str, str]:
        """Hash of each file of its predictor by name; the weights' alone for an earlier release's, none for others'."""
        if isinstance(self.origin, Foreign):
            return {}
        from mtl_lora.files import WEIGHTS_FILE

        weights = {WEIGHTS_FILE: self.origin.adapter_sha256} if self.origin.adapter_sha256 else {}
        return self.origin.files or weights


def read_version(client: Any, name: str, reference: int | str) -> Version:
    """Return a version of a registered model by number or alias.

    Raises:
        InputError: there is none.
        RegistryUnavailable: the registry does not answer.
    """
    from mlflow.exceptions import MlflowException

    text = str(reference)
    try:
        found = (
            client.get_model_version(name, text) if text.isdigit() else client.get_model_version_by_alias(name, text)
        )
        # The version alone does not list all its aliases on every store: ask the model.
        aliases = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise unavailable(f"version {text!r} of model {name!r}", error) from error
        known: Any = [v.version for v in search_versions(client, name)] or "none"
        raise InputError(
            f"a version must be a number or alias of model {name!r}, got {text!r}: {known} are registered"
        ) from error
    names = tuple(sorted(a for a, v in aliases.items() if str(v) == str(found.version)))
    return Version(int(found.version), found.run_id, found.source, Provenance.from_tags(found.tags), names)


def search_versions(client: Any, name: str) -> list[Any]:
    """Return all versions of a registered model, every page; an unknown model has none.

    Raises:
        RegistryUnavailable: the registry does not answer.
    """
    from mlflow.exceptions import MlflowException

    versions: list[Any] = []
    token: str | None = None
    while True:
        try:
            page = client.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        except MlflowException as error:
            raise unavailable(f"the versions of model {name!r}", error) from error
        versions += page
        token = page.token
        if not token:
            return versions


def ensure_model(client: Any, name: str, description: str) -> None:
    """Make a registered model where it is missing; two makers at once are no fault."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def unavailable(what: str, error: Exception) -> RegistryUnavailable:
    """Return the outage in words."""
    first = next(iter(masked(str(error)).splitlines()), type(error).__name__)
    return RegistryUnavailable(f"{what} could not be read, the registry does not answer: {first}; try again later")
