"""The only door to MLflow's model registry: versions, aliases, and the ledger that decides between them.

The ledger is written first and the aliases follow it, so a process killed at any point leaves ``champion`` on a version
that loads, and the next call brings the aliases up to the ledger.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.contracts import PromotionDecision
from pipeline.errors import HeldBack, InputError
from pipeline.json_text import parse_json
from pipeline.progress import say
from pipeline.promotion.anchor import anchor_of, looks_before
from pipeline.promotion.entries import Action, Entry, champions
from pipeline.promotion.fetch import PREDICTOR_FILE, check_whole, fetch, fetch_base
from pipeline.promotion.integrity import check_files, digests
from pipeline.promotion.lease import Lease
from pipeline.promotion.ledger import Ledger
from pipeline.promotion.logged_model import MODEL_ID, link, log_model
from pipeline.promotion.packaging import PREDICTOR, package
from pipeline.promotion.provenance import Identity, Provenance
from pipeline.promotion.versions import (
    Version,
    ensure_model,
    read_version,
    search_versions,
)

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"


class Registry:
    """The registered versions of one model.

    Args:
        name: registered model.
        uri: MLflow tracking URI; sqlite, PostgreSQL or a server.
    """

    def __init__(self, name: str, uri: str) -> None:
        self.name, self.uri = name, uri

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.uri, self.uri)

    @property
    def place(self) -> str:
        """A short name of this registry and model, which tells it from every other and holds no password."""
        return hashlib.sha256(f"{self.uri} {self.name}".encode()).hexdigest()[:16]

    @cached_property
    def ledger(self) -> Ledger:
        """The model's ledger."""
        return Ledger(self._client, self.name)

    def lease(self, ttl_s: float) -> Lease:
        """Return the lease that lets one process at a time retrain this model; take it with ``with``."""
        return Lease(self._client, self.name, ttl_s, taken_over=self.ledger.fence)

    def register(
        self,
        folder: Path,
        *,
        run_id: str,
        provenance: Provenance,
        card: str = "",
        bundle_base: bool | None = None,
    ) -> Version:
        """Store a predictor's folder as a LoggedModel and register it as the next version, alias ``challenger``.

        Args:
            folder: adapter, its configuration and ``predictor.json``.
            run_id: MLflow run that made it; its parameters, data sets and test metrics are shown with the model.
            provenance: what it was made from; ``parent`` is the present champion where none is given.
            card: model card in Markdown; it becomes the version's description and ``MODEL_CARD.md`` beside it.
            bundle_base: see :func:`pipeline.promotion.packaging.package`.

        Raises:
            InputError: the folder is no predictor's, or its weights are not those of the provenance.
        """
        import mlflow

        from mtl_lora.files import WEIGHTS_FILE

        if self.name.endswith(_KEPT):
            raise InputError(
                f"a model's name must not end in {' or '.join(_KEPT)}, which its ledger and lease bear, got "
                f"{self.name!r}; choose another promotion.model_name"
            )
        champion = self.champion()
        with package(folder, card, bundle_base) as model:
            files = digests(model / "artifacts" / PREDICTOR)
            if (weights := provenance.adapter_sha256 or files[WEIGHTS_FILE]) != files[WEIGHTS_FILE]:
                raise InputError(
                    f"the weights to register must be those that were evaluated, {folder / WEIGHTS_FILE} has sha256 "
                    f"{files[WEIGHTS_FILE][:12]}…, evaluated was {weights[:12]}…; evaluate again"
                )
            logged = log_model(self._client, run_id, self.name, model, provenance.manifest_sha256)
        ensure_model(self._client, self.name, "Multi-task adapter of a frozen language model; mixed tasks in one call.")
        parent = provenance.parent or (champion.number if champion else None)
        known = {"parent": parent, "mlflow_version": mlflow.__version__, "adapter_sha256": weights, "files": files}
        whole = provenance.model_copy(update=known)
        # Its files' own place and not models:/ID, which sqlite looks up in whatever store the process is set to.
        made = self._client.create_model_version(
            self.name,
            logged.artifact_location,
            run_id,
            tags=whole.tags() | {MODEL_ID: logged.model_id},
            description=card[:_DESCRIPTION],
            model_id=logged.model_id,
        )
        self.challenge(int(made.version))
        return self.version(int(made.version))

    def challenge(self, number: int) -> None:
        """Point the alias ``challenger`` at a version that is not champion; its LoggedModel shows it."""
        if model_id := self._client.get_model_version(self.name, str(number)).tags.get(MODEL_ID):
            link(self._client, model_id, self.name, number)
        chain = self.ledger.chain()
        if not chain or chain[-1].version != number:
            self._client.set_registered_model_alias(self.name, CHALLENGER, str(number))

    def deposed(self, number: int) -> Entry | None:
        """Return the entry that ended a version's last time as champion, None where it never was or still is."""
        chain = self.ledger.chain()
        ends = [after for entry, after in pairwise(chain) if entry.version == number]
        return ends[-1] if ends and chain[-1].version != number else None

    def version(self, reference: int | str) -> Version:
        """Return a version by number or alias.

        Raises:
            InputError: there is none.
            RegistryUnavailable: the registry does not answer.
        """
        return read_version(self._client, self.name, reference)

    def find(self, identity: Identity) -> Version | None:
        """Return the newest version of a trained run, None where there is none."""
        found = [number for number, origin in self.versions() if origin.identity == identity]
        return self.version(max(found)) if found else None

    def versions(self) -> list[tuple[int, Provenance]]:
        """Return the number of every version with what it was made from; foreign ones are left out."""
        found = [(int(v.version), Provenance.from_tags(v.tags)) for v in search_versions(self._client, self.name)]
        return [(number, origin) for number, origin in found if isinstance(origin, Provenance)]

    def anchor(self, wanted: Collection[str], named: int | None = None) -> Version | None:
        """Return the best earlier champion that answers the wanted tasks, as far as the champion does.

        Args:
            wanted: tasks that are judged.
            named: a version to take instead.

        Returns:
            The champion itself where there is no better; None where there is no champion yet.
        """
        number = named or anchor_of(self.ledger.chain(), lambda n: self.tasks_of(self.version(n)), wanted)
        return None if number is None else self.version(number)

    def looks(self, number: int) -> int:
        """Return how many other versions were judged on a version's holdout before it."""
        return looks_before(number, self.versions())

    def tasks_of(self, version: Version) -> tuple[str, ...]:
        """Return the tasks that a version answers: by its provenance, or by its files where that does not say.

        Raises:
            InputError: it does not, and the files are gone.
        """
        if isinstance(version.origin, Provenance) and version.origin.tasks:
            return version.origin.tasks
        with tempfile.TemporaryDirectory() as folder:
            spec = parse_json((self.download(version.number, Path(folder)) / PREDICTOR_FILE).read_text())
        return tuple(task["name"] for task in spec["tasks"])

    def champion(self) -> Version | None:
        """Return the champion by the ledger, None where there was none yet; aliases are brought up to it."""
        self._settle()
        chain = self.ledger.chain()
        return self.version(chain[-1].version) if chain else None

    def champion_since(self) -> float | None:
        """Return when the champion became champion by the ledger, in seconds since 1970; None where there is none."""
        chain = self.ledger.chain()
        return chain[-1].time.timestamp() if chain else None

    def promote(
        self, reference: int | str, decision: PromotionDecision, before: Callable[[], int | None] = lambda: None
    ) -> Entry:
        """Make a version champion.

        Args:
            reference: number or alias.
            decision: the verdict it rests on; it names this version, and the champion it was compared with, as text.
            before: called right before the ledger's entry, when all else is checked; what it raises keeps the champion.
                It returns the number of the lease that is held, None without one.

        Raises:
            HeldBack: the verdict is not PROMOTE or on another version, the champion changed since, or another
                promotion came first.
            LeaseLost: another process took the lease over.
            InputError: there is no such version, it does not load, or its files are not those that were evaluated.
        """
        if decision.verdict != "PROMOTE":
            raise HeldBack(f"only a PROMOTE verdict moves the champion, got {decision.verdict}: {decision.reasons[0]}")
        standing = self.ledger.standing()
        chain = champions(standing)
        current = str(chain[-1].version) if chain else None
        if decision.champion != current:
            raise HeldBack(
                f"the verdict must rest on a comparison with the champion, it was compared with version "
                f"{decision.champion or 'none'} and version {current or 'none'} is champion now; promote again"
            )
        target = self.version(reference)
        if decision.candidate != str(target.number):
            raise HeldBack(
                f"the verdict must be on the version that is promoted, it is on {decision.candidate} and not on "
                f"{target.number}; promote again"
            )
        if target.adapter_sha256 is None:
            raise InputError(
                f"a version to promote must say which weights were evaluated, version {target.number} of "
                f"{self.name!r} does not; register it anew"
            )
        return self._change("promote", target, decision.reasons, standing, before, decision)

    def rollback(self, to: int | str | None = None, why: str = "asked for") -> Entry:
        """Make the previous champion, or any version, champion again.

        Raises:
            HeldBack: another change came first.
            InputError: there is no such version, none before this one, it does not load, or its files are not those
                that were registered.
        """
        standing = self.ledger.standing()
        chain = champions(standing)
        if to is None:
            if not chain or chain[-1].previous is None:
                raise InputError(
                    f"a rollback goes to the champion before this one, model {self.name!r} has had "
                    f"{'one only' if chain else 'none'}; name a version: to=NUMBER"
                )
            to = chain[-1].previous
        return self._change("rollback", self.version(to), [why], standing)

    def _change(
        self,
        action: Action,
        target: Version,
        why: Iterable[str],
        standing: Sequence[Entry],
        before: Callable[[], int | None] = lambda: None,
        decision: PromotionDecision | None = None,
    ) -> Entry:
        chain = champions(standing)
        current = chain[-1].version if chain else None
        if current == target.number:
            raise HeldBack(f"version {current} is champion already; nothing to do")
        self.check_loads(target.number)
        found = self._client.get_model_version(self.name, str(target.number))
        last = standing[-1].number if standing else 0
        entry = self.ledger.append(action, found, current, why, last, before, decision)
        self._settle()
        return entry

    def _settle(self) -> None:
        """Point the aliases where the ledger says, again if it grew meanwhile."""
        from mlflow.exceptions import MlflowException

        chain = self.ledger.chain()
        while chain:
            last = chain[-1]
            aliases = self._client.get_registered_model(self.name).aliases
            if last.previous is not None and str(aliases.get(PREVIOUS)) != str(last.previous):
                try:
                    self._client.set_registered_model_alias(self.name, PREVIOUS, str(last.previous))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # that version may have been deleted
                        raise
            if str(aliases.get(CHAMPION)) != str(last.version):
                self._client.set_registered_model_alias(self.name, CHAMPION, str(last.version))
            if str(aliases.get(CHALLENGER)) == str(last.version):
                self._client.delete_registered_model_alias(self.name, CHALLENGER)
            chain = self.ledger.chain()
            if chain[-1].number == last.number:
                return

    def download(self, reference: int | str, target: Path) -> Path:
        """Fetch a version's predictor folder; its files are those that were registered.

        Raises:
            InputError: there is no such version, or its files are gone or others.
            RegistryUnavailable: the registry or the files' store does not answer.
        """
        version = self.version(reference)
        folder = fetch(version, self.uri, self._words(version), target)
        self.check_files(version, folder)
        return folder

    def download_base(self, reference: int | str, target: Path) -> Path | None:
        """Fetch the base model that travels with a version; None where none does. Errors are those of
        :meth:`download`."""
        version = self.version(reference)
        return fetch_base(version, self.uri, self._words(version), target)

    def check_files(self, version: Version, folder: Path) -> None:
        """Make sure that a version's predictor folder, fetched now or earlier, holds what was registered.

        Raises:
            InputError: a file is gone or another one; it is named.
        """
        if not version.files:
            say(f"{self._words(version)} was registered without hashes: its files are not compared")
        check_files(folder, version.files, f"{self._words(version)} in {folder}")

    def check_loads(self, reference: int | str) -> None:
        """Make sure that a version's files are there, are those that were registered, and are whole.

        Raises:
            InputError: they are not.
            RegistryUnavailable: the registry or the files' store does not answer.
        """
        with tempfile.TemporaryDirectory() as folder:
            check_whole(self.download(reference, Path(folder)), f"version {reference} of {self.name!r}")

    def _words(self, version: Version) -> str:
        return f"version {version.number} of {self.name!r}"


_DESCRIPTION = 5000
_KEPT = ("-ledger", "-lease")
