"""The one door to scoring: any model by its reference, on a run's samples, each model once.

A model's scores stand in the run's folder under its slot, and hold for as long as its weights and the samples are the
ones that were scored: the report names both.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.run import Run
from pipeline.contracts import EvaluationReport, TaskSpec
from pipeline.errors import InputError, did_you_mean
from pipeline.evaluation.features import write_features
from pipeline.evaluation.kept_answers import KeptAnswers
from pipeline.evaluation.predict import evenly_spaced, score_table
from pipeline.evaluation.score_table import read_scores, write_scores
from pipeline.evaluation.summary import summarize
from pipeline.mirror import SharedFolder, here
from pipeline.progress import Track
from pipeline.stream import load_manifest, read_split

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from jobs.config import RunConfig
    from pipeline.orchestration.scoring import ScoringPool
    from pipeline.promotion.registry import Registry, Version

FORMS = "base, run:NAME, models:/NAME@ALIAS, models:/NAME/NUMBER, an alias or number of the run's own model, or a "
FORMS += "folder export/TASK"
BASE, OWN = "base", ""
"""Slots of the untrained base and of the run's own adapter."""
UNTRAINED = "untrained"
"""Stands for the digest of the weights of a base without an adapter."""
_FEATURES_PER_TASK = 60
"""Samples of each task whose hidden states are kept for the report's planes."""
_LATENCY_ROWS = 32
"""Rows over all tasks that are answered one at a time where a gate limits the latency."""

Load = Callable[..., dict[str, Any]]
"""Returns, on a worker, scorers by name; told ``asking`` where the base is split over workers."""


@dataclass(frozen=True)
class Answering:
    """A model that workers can load.

    Args:
        load: what they call.
        scorer: name of the scorer that is asked.
        tasks: names of the tasks that it knows; None for all.
    """

    load: Load
    scorer: str
    tasks: frozenset[str] | None = None


@dataclass(frozen=True)
class Model:
    """A model that can be scored on a run's samples.

    Args:
        words: its name for a reader.
        slot: under which its scores stand in the run's folder.
        weights: digest of its weights, ``untrained`` for the base; other weights are scored anew.
        opened: makes it ready to be loaded within a ``with`` block: a registered version is fetched there.
        name: of the model in its report.
    """

    words: str
    slot: str
    weights: str
    opened: Callable[[], AbstractContextManager[Answering]]
    name: str = ""


@dataclass(frozen=True)
class Scored:
    """A model with its scores of the run's samples."""

    words: str
    report: EvaluationReport
    path: Path

    def scores(self) -> pd.DataFrame:
        """Return a row a sample."""
        return read_scores(self.path)


def score(run: Run, *models: Model) -> list[Scored]:
    """Return the models' scores of a run's samples, scoring only what does not stand.

    Neighbours that are loaded by the same call are loaded once.

    Raises:
        InputError: there is no sample of a task that a model knows, or a registered version's files are gone.
    """
    from pipeline.orchestration.cluster import cluster
    from pipeline.orchestration.scoring import scoring_pool

    missing = [model for model in models if standing(run, model) is None]
    with contextlib.ExitStack() as stack:
        if missing:
            stack.enter_context(cluster(run.config.ray))
        answering = [(model, stack.enter_context(model.opened())) for model in missing]
        for _, alike in itertools.groupby(answering, key=lambda found: id(found[1].load)):
            group = list(alike)
            workers = run.config.evaluation
            split = run.config.model.dtype if workers.split_base else None
            with scoring_pool(group[0][1].load, workers.num_workers, workers.gpus_per_worker, split) as pool:
                for model, found in group:
                    _score(run, model, found, pool)
    reports = [(model, standing(run, model)) for model in models]
    return [Scored(m.words, report, run.folder.scores(m.slot).scores) for m, report in reports if report is not None]


def standing(run: Run, model: Model) -> EvaluationReport | None:
    """Return the report of a model that was scored already, by the same weights on the same samples, else None."""
    files = run.folder.scores(model.slot)
    if not (files.report.is_file() and files.scores.is_file()):
        return None
    found = EvaluationReport.read(files.report)
    if _is_timed(run, model) and found.latency_ms is None:
        return None
    wanted = run.samples | {"weights": model.weights}
    return found if wanted.items() <= found.data.items() else None


def _score(run: Run, model: Model, answering: Answering, pool: ScoringPool) -> None:
    config = run.config
    manifest, _, _ = load_manifest(config.manifest_path)
    specs = [task for task in config.tasks if answering.tasks is None or task.name in answering.tasks]
    split, name = config.evaluation.split, model.name or model.slot or config.name
    read = partial(read_split, config.manifest_path, split, cache=config.cache)
    samples = [sample for task in specs if manifest.samples_of(task.name, split) for sample in read(task=task.name)]
    if not samples:
        raise InputError(
            f"split {split!r} must have a sample of {[task.name for task in specs]}, it has none; bring some"
        )
    shown = evenly_spaced(samples, _FEATURES_PER_TASK)
    kept = _kept(run, model, specs) if any(task.is_written for task in specs) else None
    with Track(f"evaluate {name}", len(samples), "samples") as track:
        states_of = {(sample.task, sample.key) for sample in shown}
        found = pool.score(samples, model=answering.scorer, on_progress=track.advance, states_of=states_of, kept=kept)
    timed = evenly_spaced(samples, math.ceil(_LATENCY_ROWS / len(specs))) if _is_timed(run, model) else []
    files = run.folder.scores(model.slot)
    scores = score_table(samples, found.probabilities, found.texts)
    write_scores(files.scores, scores)
    write_features(files.features, found.states)
    data = run.samples | {"weights": model.weights}
    summary = summarize(
        scores, specs, model=name, data=data, best_attainable=manifest.best_attainable, seed=config.seed
    )
    summary = summary.model_copy(
        update={"latency_ms": pool.latency_ms(timed, model=answering.scorer) if timed else None}
    )
    summary.write(files.report)
    if kept is not None:
        kept.remove()


def _kept(run: Run, model: Model, specs: Sequence[TaskSpec]) -> KeptAnswers:
    """Return where a model's answers are kept while it writes them, which takes long: one forward a token."""
    asked: list[Any] = [run.samples, model.weights, [spec.model_dump(mode="json") for spec in specs]]
    asked += [run.config.evaluation.batch_tokens, run.config.model.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return KeptAnswers(run.folder.path / f".answers_{model.slot}", digest[:32])


def _is_timed(run: Run, model: Model) -> bool:
    return run.config.promotion.gates.max_latency_ms is not None and model.slot != BASE


def own_models(run: Run, adapter: Path) -> tuple[Model, Model]:
    """Return the run's own adapter and the untrained base under it, both loaded at once."""
    load = _adapter_load(run, adapter)
    own = Model(f"run {run.config.name}", OWN, weights_sha256(adapter), lambda: nullcontext(Answering(load, "trained")))
    base = Model("untrained base", BASE, UNTRAINED, lambda: nullcontext(Answering(load, "base")))
    return own, base


def model_of(run: Run, reference: str) -> Model:
    """Return the model that a reference names, one of :data:`FORMS`.

    Raises:
        InputError: there is none, or the run has no shards.
    """
    load_manifest(run.config.manifest_path)
    if reference == "base":
        load = partial(load_untrained, run.config)
        return Model("untrained base", BASE, UNTRAINED, lambda: nullcontext(Answering(load, "base")))
    if reference.startswith("run:"):
        return _run_model(run, reference.removeprefix("run:"))
    for folder in (Path(reference), run.folder.path / reference):
        if (folder / "adapter_config.json").is_file():
            return _exported(run, folder.resolve())
    return _registered(run, reference)


def version_model(run: Run, registry: Registry, version: Version) -> Model:
    """Return a registered version; its files are fetched only if it must be scored."""
    slot = f"{registry.name}-{version.number}"
    weights = version.adapter_sha256 or f"{registry.place}/{version.number}"
    opened = partial(_fetched, run, registry, version.number, slot)
    return Model(f"version {version.number} of {registry.name}", slot, weights, opened)


def weights_sha256(folder: Path) -> str:
    """Return the digest of an adapter's weights.

    Raises:
        InputError: the folder holds none.
    """
    from mtl_lora.files import WEIGHTS_FILE

    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(f"an adapter must hold {WEIGHTS_FILE}, {folder} does not; train or export it anew")
    with (folder / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _registered(run: Run, reference: str) -> Model:
    from pipeline.promotion.registry import Registry

    found = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", reference)
    if found is None and not re.fullmatch(r"[A-Za-z0-9_-]+", reference):
        raise InputError(f"a model must be named as {FORMS}, got {reference!r}")
    name, wanted = (found[1], found[2] or found[3]) if found else (run.registry.name, reference)
    registry = Registry(name, run.config.tracking.uri)
    return version_model(run, registry, registry.version(wanted))


@contextlib.contextmanager
def _fetched(run: Run, registry: Registry, number: int, slot: str) -> Iterator[Answering]:
    folder = run.folder.path / f".{slot}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield _adapter(run, registry.download(number, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_model(run: Run, name: str) -> Model:
    from pipeline.modeling.predictor import PREDICTOR_FILE

    adapter = run.other(name).folder.adapter
    if not (adapter / PREDICTOR_FILE).is_file():
        root = run.config.run_root
        known = [path.parent.parent.name for path in root.glob(f"*/{adapter.name}/{PREDICTOR_FILE}")]
        raise InputError(f"run:NAME must be a trained run in {root}, got {name!r}{did_you_mean(name, known)}")
    slot = OWN if name == run.config.name else f"run-{name}"
    return Model(f"run {name}", slot, weights_sha256(adapter), lambda: nullcontext(_adapter(run, adapter)))


def _exported(run: Run, folder: Path) -> Model:
    if run.config.evaluation.split_base:
        raise InputError(
            f"an exported task is scored on a whole base, got {folder} with evaluation.split_base; set it to false for "
            "this comparison, or compare the run itself: run:NAME"
        )
    names = [task.name for task in run.config.tasks]
    if folder.name not in names:
        raise InputError(
            f"an exported folder must bear the name of a task, got {folder.name!r}{did_you_mean(folder.name, names)}"
        )
    slot = f"export-{folder.parent.parent.name}-{folder.name}"
    load = partial(_load_shared, partial(_load_export, run.config), run.shared(folder))
    answering = Answering(load, "trained", frozenset((folder.name,)))
    return Model(f"export {folder.name}", slot, weights_sha256(folder), lambda: nullcontext(answering))


def _adapter_load(run: Run, adapter: Path) -> Load:
    from pipeline.modeling.predictor import load_scorers

    load = partial(load_scorers, batch_tokens=run.config.evaluation.batch_tokens)
    return partial(_load_shared, load, run.shared(adapter))


def _adapter(run: Run, adapter: Path) -> Answering:
    from pipeline.modeling.predictor import PREDICTOR_FILE, PredictorSpec

    known = frozenset(task.name for task in PredictorSpec.read(adapter / PREDICTOR_FILE).tasks)
    return Answering(_adapter_load(run, adapter), "trained", known)


def load_untrained(
    config: RunConfig, asking: Callable[[nn.Module], AbstractContextManager[Any]] = nullcontext
) -> dict[str, Any]:
    """Return a scorer, ``base``, of the base model without any adapter."""
    from pipeline.modeling.answering import sample_encoder, untrained_scorer
    from pipeline.modeling.base_model import load_base
    from pipeline.modeling.predictor import default_device
    from pipeline.modeling.scoring import Scorer

    base = untrained_scorer(load_base(config.model, default_device(), asking), config.tasks)
    return {"base": Scorer(base, sample_encoder(config.model, config.tasks), config.evaluation.batch_tokens)}


def _load_shared(load: Callable[[Path], dict[str, Any]], folder: Path | SharedFolder) -> dict[str, Any]:
    return load(here(folder))


def _load_export(config: RunConfig, folder: Path) -> dict[str, Any]:
    from pipeline.evaluation.parity import exported_scorer
    from pipeline.modeling.predictor import PredictorSpec

    task = next(task for task in config.tasks if task.name == folder.name)
    spec = PredictorSpec(tasks=(task,), base=config.model)
    return {"trained": exported_scorer(folder, spec, config.evaluation.batch_tokens)}
