"""A version's files, from the store they lie in to a folder here: gone, damaged and unreachable are told apart."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.promotion.integrity import check_files
from pipeline.promotion.packaging import BUNDLED_BASE, DIGESTS, PREDICTOR
from pipeline.promotion.versions import Version, unavailable

PREDICTOR_FILE = "predictor.json"
"""As :mod:`pipeline.modeling.predictor` names it, which imports torch."""


def fetch(version: Version, tracking_uri: str, whose: str, target: Path) -> Path:
    """Fetch a version's predictor folder as it lies in the store.

    Args:
        version: whose files are fetched.
        tracking_uri: of its registry.
        whose: the version in words.
        target: folder to fetch into, made where it is missing.

    Raises:
        InputError: its files are gone.
        RegistryUnavailable: their store does not answer.
    """
    import mlflow

    uri = f"{version.source}/artifacts/{PREDICTOR}"
    target.mkdir(parents=True, exist_ok=True)
    try:
        names = mlflow.artifacts.list_artifacts(artifact_uri=uri, tracking_uri=tracking_uri)
        found = any(Path(file.path).name == PREDICTOR_FILE for file in names)
        if found:
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target), tracking_uri=tracking_uri)
    except Exception as error:  # every store raises its own
        raise unavailable(f"the files of {whose} at {uri}", error) from error
    if not found:
        raise InputError(
            f"{whose} must have its files at {uri}, {PREDICTOR_FILE} is not there; restore them or name another version"
        )
    return next(target.rglob(PREDICTOR_FILE)).parent


def fetch_base(version: Version, tracking_uri: str, whose: str, target: Path) -> Path | None:
    """Fetch the base model that travels with a version; None where none does.

    Args:
        version: whose base is fetched.
        tracking_uri: of its registry.
        whose: the version in words.
        target: folder to fetch into, made where it is missing.

    Raises:
        InputError: its files are not those that were registered.
        RegistryUnavailable: their store does not answer.
    """
    import mlflow

    root = f"{version.source}/artifacts"
    target.mkdir(parents=True, exist_ok=True)
    try:
        names = mlflow.artifacts.list_artifacts(artifact_uri=root, tracking_uri=tracking_uri)
        if not any(Path(file.path).name == BUNDLED_BASE for file in names):
            return None
        for name in (BUNDLED_BASE, f"{DIGESTS}.json"):
            uri = f"{root}/{name}"
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(target), tracking_uri=tracking_uri)
    except Exception as error:  # every store raises its own
        raise unavailable(f"the base of {whose} at {root}", error) from error
    expected = parse_json((target / f"{DIGESTS}.json").read_text())[BUNDLED_BASE]
    check_files(target / BUNDLED_BASE, expected, f"the base of {whose}")
    return target / BUNDLED_BASE


def check_whole(folder: Path, whose: str) -> None:
    """Make sure that a predictor's folder can be read to its end, without loading it.

    Raises:
        InputError: it cannot.
    """
    from safetensors import SafetensorError, safe_open

    from mtl_lora.files import WEIGHTS_FILE
    from mtl_lora.hashes import check_hashes  # its error is a ValueError

    try:
        check_hashes(folder)
        parse_json((folder / PREDICTOR_FILE).read_text())
        with safe_open(folder / WEIGHTS_FILE, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                tensors.get_slice(key).get_shape()
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{whose} must load, its files do not: {error}; register it anew") from error
