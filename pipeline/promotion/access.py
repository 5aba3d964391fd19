"""What this user may do with tracking and registry, tried: nothing that is written stays, and no alias is moved."""

from __future__ import annotations

import uuid
from typing import Any

from pipeline.errors import InputError
from pipeline.promotion.registry import CHAMPION, Registry
from pipeline.promotion.versions import unavailable


def experiment_state(uri: str, experiment: str) -> str:
    """Return in words whether an experiment is there.

    Raises:
        InputError: it was deleted, so that no run can be made in it.
        RegistryUnavailable: the server does not answer, or not this user.
    """
    found = _asked(uri, "experiments", lambda client: client.get_experiment_by_name(experiment))
    if found is None:
        return f"the first run makes experiment {experiment!r}"
    if found.lifecycle_stage != "active":
        raise InputError(
            f"experiment {experiment!r} must be active, it is {found.lifecycle_stage}; restore it, mlflow experiments "
            f"restore --experiment-id {found.experiment_id}, or name another tracking.experiment"
        )
    return f"experiment {experiment!r} is there"


def try_write(uri: str, name: str) -> str:
    """Set a tag of a registered model and take it away, or make a model and delete it where there is none.

    Returns:
        What was done, in words.

    Raises:
        RegistryUnavailable: the registry does not answer, or refuses it.
    """
    mark = f"doctor-{uuid.uuid4().hex[:12]}"

    def write(client: Any) -> str:
        if any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
            client.set_registered_model_tag(name, mark, "1")
            client.delete_registered_model_tag(name, mark)
            return f"model {name!r} can be written to"
        client.create_registered_model(f"{name}-{mark}")
        client.delete_registered_model(f"{name}-{mark}")
        return f"models can be registered, {name!r} is none yet"

    return str(_asked(uri, f"model {name!r}", write))


def champion_loads(uri: str, name: str) -> str:
    """Fetch the champion's files, hold them against their hashes and read them to the end.

    Returns:
        Which version it is, in words.

    Raises:
        InputError: the alias is not where the ledger says, or the files are gone, others or damaged.
        RegistryUnavailable: the registry or the files' store does not answer.
    """
    registry = Registry(name, uri)
    chain = _asked(uri, f"the ledger of {name!r}", lambda _: registry.ledger.chain())
    if not chain:
        return f"{name!r} has none yet"
    version, by_ledger = registry.version(CHAMPION), chain[-1].version
    if version.number != by_ledger:
        raise InputError(
            f"the alias {CHAMPION} must be where the ledger says, on version {by_ledger}, it is on {version.number}; "
            "the next promote or rollback sets it"
        )
    registry.check_loads(version.number)
    return f"version {version.number} of {name!r} has its files, and they are those that were registered"


def _asked(uri: str, what: str, question: Any) -> Any:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        return question(MlflowClient(uri, uri))
    except InputError:
        raise
    except (MlflowException, OSError) as error:
        raise unavailable(what, error) from error
