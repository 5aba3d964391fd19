"""The model that is put in front of traffic: which one is meant, fixed once, and loaded on any machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock
from platformdirs import user_cache_path

from pipeline.errors import InputError
from pipeline.progress import say
from pipeline.promotion.registry import Registry

if TYPE_CHECKING:
    from pipeline.modeling.predictor import Predictor

FORMS = "models:/NAME@champion, models:/NAME/NUMBER, or the folder of a trained adapter"
KEPT = 4
"""Versions of one model that a machine keeps: champion, challenger, the one before, and one that comes."""
_IN_USE_S = 3600.0
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
        """Return the folder of its predictor on this machine, fetched once and checked each time; of one model the
        :data:`KEPT` versions that were asked for last are kept.

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
                    kept.touch()
                    return kept
                except InputError:  # damaged here: what the registry holds decides
                    shutil.rmtree(kept)
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as scratch:
                registry.download(self.number, Path(scratch) / "fetched").rename(kept)
        kept.touch()
        _drop_old(kept.parent)
        return kept

    def base(self) -> Path | None:
        """Return the folder of the base that travels with a version, fetched once; None where none does.

        Raises:
            InputError: its files are others than were registered.
            RegistryUnavailable: the registry or the files' store does not answer.
        """
        if self.number is None:
            return None
        kept = self.folder() / "bundled-base"
        with FileLock(f"{kept.parent}.lock"):
            if kept.is_dir():
                return kept
            with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as scratch:
                found = Registry(self.place, self.uri).download_base(self.number, Path(scratch))
                return None if found is None else found.rename(kept)

    def load(self, batch_tokens: int = 2048) -> Predictor:
        """Return the predictor, on CUDA where there is it.

        Raises:
            InputError: see :meth:`folder`; or the files do not load.
        """
        from pipeline.modeling.base_model import resolve_base
        from pipeline.modeling.predictor import PREDICTOR_FILE, Predictor, PredictorSpec

        folder, base = self.folder(), None
        try:
            resolve_base(PredictorSpec.read(folder / PREDICTOR_FILE).base)
        except InputError as error:  # not on this machine: the one that was registered with it is the same
            if (base := self.base()) is None:
                raise
            say(f"{self.words} is answered on the base that was registered with it: {error}")
        return Predictor.load(folder, batch_tokens=batch_tokens, base=base)


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


def _drop_old(folder: Path) -> None:
    """Remove the versions of a model that were asked for longest ago, but for :data:`KEPT` and those of this hour."""
    found = sorted((p for p in folder.iterdir() if p.name.isdecimal()), key=lambda p: -p.stat().st_mtime)
    for old in found[KEPT:]:
        if time.time() - old.stat().st_mtime < _IN_USE_S:  # another process may be about to load it
            continue
        with FileLock(f"{old}.lock"):
            shutil.rmtree(old, ignore_errors=True)


def _cache() -> Path:
    return Path(os.environ.get("MTL_LORA_CACHE") or user_cache_path("mtl-lora")) / "models"
