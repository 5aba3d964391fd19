"""The model that is put in front of traffic: which one is meant, fixed once, and loaded on any machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from platformdirs import user_cache_path

from pipeline.errors import InputError
from pipeline.promotion.registry import Registry

if TYPE_CHECKING:
    from pipeline.modeling.predictor import Predictor

FORMS = "models:/NAME@champion, models:/NAME/NUMBER, or the folder of a trained adapter"
_REGISTERED = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


@dataclass(frozen=True)
class ServedModel:
    """One model whose weights do not change: a registered version, or a folder.

    Args:
        place: folder of the predictor, or the registered model's name.
        number: of the version; None for a folder.
        uri: of the registry; empty for a folder.
    """

    place: str
    number: int | None = None
    uri: str = ""

    @property
    def words(self) -> str:
        """Its name for a reader: ``models:/NAME/NUMBER``, or the folder."""
        return self.place if self.number is None else f"models:/{self.place}/{self.number}"

    def folder(self) -> Path:
        """Return the folder of its predictor on this machine, fetched once and checked each time.

        Raises:
            InputError: its files are gone, damaged or others than were registered.
            RegistryUnavailable: the registry or the files' store does not answer.
        """
        if self.number is None:
            return Path(self.place)
        registry = Registry(self.place, self.uri)
        version = registry.version(self.number)
        kept = _cache() / registry.place / str(self.number)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):
            if kept.is_dir():
                try:
                    registry.check_files(version, kept)
                    return kept
                except InputError:  # damaged here: what the registry holds decides
                    shutil.rmtree(kept)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as scratch:
                registry.download(self.number, Path(scratch) / "fetched").rename(kept)
        return kept

    def load(self, batch_tokens: int = 2048) -> Predictor:
        """Return the predictor, on CUDA where there is it.

        Raises:
            InputError: see :meth:`folder`; or the files do not load.
        """
        from pipeline.modeling.predictor import Predictor

        return Predictor.load(self.folder(), batch_tokens=batch_tokens)


def resolve(reference: str, uri: str) -> ServedModel:
    """Return the model that a reference names now; an alias that moves later does not change it.

    Args:
        reference: one of :data:`FORMS`.
        uri: of the registry.

    Raises:
        InputError: there is none.
        RegistryUnavailable: the registry does not answer.
    """
    found = _REGISTERED.fullmatch(reference)
    if found is not None:
        version = Registry(found[1], uri).version(found[2] or found[3])
        return ServedModel(found[1], version.number, uri)
    folder = Path(reference).expanduser().resolve()
    if reference.startswith("models:") or not (folder / "predictor.json").is_file():
        raise InputError(f"a model must be named as {FORMS}, got {reference!r}, which is none of them")
    return ServedModel(str(folder))


def _cache() -> Path:
    return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora")) / "models"
