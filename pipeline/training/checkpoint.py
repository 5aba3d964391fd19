"""Checkpoints that any number of ranks and any ZeRO stage can go on from.

``step-00000050/`` holds ``adapter/``, ``optimizer.safetensors`` (fp32 weights and AdamW's moments, whole, by parameter
name), ``state.json`` (plain values) and ``manifest.json`` (:class:`CheckpointManifest`), written last. The folder gets
its name when it is whole. Nothing in it is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.contracts import CheckpointManifest, TaskSpec, write_atomic
from pipeline.errors import InputError
from pipeline.json_text import parse_json
from pipeline.progress import say
from pipeline.storage import join

if TYPE_CHECKING:
    from pipeline.modeling.adapter import AdapterConfig
    from pipeline.modeling.base_model import BaseModelConfig

ADAPTER, OPTIMIZER, STATE, MANIFEST = "adapter", "optimizer.safetensors", "state.json", "manifest.json"
_PREFIX, _BEST = "step-", "best"
_NAME = re.compile(rf"{_PREFIX}\d{{8,19}}", re.ASCII)


def adapter_sha256(adapter: AdapterConfig, base: BaseModelConfig, tasks: Sequence[TaskSpec]) -> str:
    """Return the digest of what a checkpoint's tensors belong to: the adapter, its tasks and the base's weights."""
    from pipeline.modeling.base_model import fingerprint  # loads transformers, which Ray Train's controller needs not

    parts = {
        "adapter": adapter.identity(),
        "base": fingerprint(base),
        "tasks": [task.model_dump(mode="json") for task in tasks],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run, kept by one process at a time.

    Args:
        root: their folder; it may not exist yet.
        adapter_sha256: of the run, see :func:`adapter_sha256`.
        keep: so many of the newest stay, and the best one.
    """

    def __init__(self, root: Path, adapter_sha256: str, keep: int = 2) -> None:
        self.root, self.adapter_sha256, self.keep = root, adapter_sha256, keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        save_adapter: Callable[[Path], object],
        *,
        num_ranks: int,
        zero_stage: int,
        best: bool = False,
    ) -> Path:
        """Write a whole checkpoint or nothing, then delete those that are no longer kept.

        Args:
            step: optimizer steps done.
            tensors: on CPU.
            state: what else training goes on from, as JSON.
            save_adapter: fills a folder with the adapter.
            num_ranks: of the run at present, for the record.
            zero_stage: likewise.
            best: whether this is the best one so far: it is kept until another is.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        folder = self.folder(step)
        staged = self.root / f".{folder.name}"
        shutil.rmtree(staged, ignore_errors=True)
        save_adapter(staged / ADAPTER)
        save_file(dict(tensors), staged / OPTIMIZER)
        (staged / STATE).write_text(json.dumps(state))
        files = sorted(path for path in staged.rglob("*") if path.is_file())
        manifest = CheckpointManifest(
            step=step,
            num_ranks=num_ranks,
            zero_stage=zero_stage,
            adapter_sha256=self.adapter_sha256,
            files={str(path.relative_to(staged)): _synced_sha256(path) for path in files},
        )
        manifest.write(staged / MANIFEST)
        shutil.rmtree(folder, ignore_errors=True)
        staged.rename(folder)
        _sync(self.root)
        if best:
            self.mark_best(step)
        self._prune()
        return folder

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint; a damaged one is put aside with a message. None where there is none.

        Raises:
            InputError: it belongs to another adapter, other tasks or another base.
        """
        for folder in reversed(self._folders()):
            try:
                self._check(folder)
            except _DamageError as damage:
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                say(f"WARNING: checkpoint {folder} is damaged ({damage}): put aside as {aside.name}, not used")
                continue
            return folder
        return None

    def refuse_foreign(self) -> None:
        """Check, by the newest manifest alone, that the checkpoints are this run's.

        Raises:
            InputError: they belong to another adapter, other tasks or another base.
        """
        for folder in reversed(self._folders()):
            try:
                self._manifest(folder)
            except _DamageError:
                continue
            return

    def mark_best(self, step: int) -> None:
        """Note that a step's checkpoint is the best so far; it is kept until another is."""
        write_atomic(self.root / _BEST, self.folder(step).name + "\n")

    def best(self) -> Path | None:
        """Return the checkpoint that was saved as the best, None where none was, or where it is damaged, which is said.

        Raises:
            InputError: it belongs to another adapter, other tasks or another base.
        """
        folder = self._marked()
        if folder is not None:
            try:
                self._check(folder)
            except _DamageError as damage:
                say(f"WARNING: the best checkpoint, {folder}, is damaged ({damage}): the newest one is used")
                return None
        return folder

    def _marked(self) -> Path | None:
        mark = self.root / _BEST
        if not mark.is_file():
            return None
        name = mark.read_bytes().decode("ascii", "replace").strip()
        if _NAME.fullmatch(name) is None:  # a name of ours: no other place is ever looked at
            say(f"WARNING: {mark} must name a checkpoint beside it, got {name[:80]!r}: not used")
            return None
        return self.root / name

    def folder(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, there or not."""
        return self.root / f"{_PREFIX}{step:08d}"

    def fetch(self, step: int) -> Path:
        """Return the folder of a step's checkpoint, which is there."""
        return self.folder(step)

    def settle(self) -> None:
        """Wait until the last checkpoint is safe, which it is when it is saved."""

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.root.glob(f"{_PREFIX}*") if path.is_dir())

    def _manifest(self, folder: Path) -> CheckpointManifest:
        try:
            manifest = CheckpointManifest.read(folder / MANIFEST)
        except InputError as error:
            raise _DamageError(str(error)) from error
        if manifest.adapter_sha256 != self.adapter_sha256:
            raise InputError(
                f"a checkpoint must be of this adapter, its tasks and its base model, {folder} is of another: "
                f"{manifest.adapter_sha256[:12]}, this run is {self.adapter_sha256[:12]}; restore model, adapter and "
                "tasks, or choose another name=…"
            )
        return manifest

    def _check(self, folder: Path) -> None:
        for name, expected in self._manifest(folder).files.items():
            try:
                path = Path(join(folder, name))
            except InputError as error:
                raise _DamageError(str(error)) from error
            if not path.is_file():
                raise _DamageError(f"{name} is missing")
            if _sha256(path) != expected:
                raise _DamageError(f"{name} has another sha256 than its manifest says")

    def _prune(self) -> None:
        best = self._marked()
        for folder in self._folders()[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on CPU, and the plain state of a checkpoint.

    Raises:
        InputError: a file cannot be read, though it has the hash of its manifest.
    """
    try:
        return load_file(folder / OPTIMIZER), dict(parse_json((folder / STATE).read_bytes()))
    except (OSError, ValueError, TypeError, SafetensorError, KeyError) as error:
        raise InputError(
            f"a checkpoint must hold tensors and a state as they were saved, {folder} does not: {error}; delete it, "
            "the run goes on from an earlier one"
        ) from error


class _DamageError(Exception):
    """What is wrong with a checkpoint."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced_sha256(path: Path) -> str:
    _sync(path)
    return _sha256(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
