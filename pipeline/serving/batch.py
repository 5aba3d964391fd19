"""Scores for any number of rows, by Ray Data: tasks read and check them, actors that hold the model score them.

Each row of the data set is a whole stretch of a file (see :mod:`pipeline.serving.batch_input`): Ray's back-pressure
bounds how many are in flight, whatever the input's size, a stretch that a lost worker held is done again, and what
stands is not done again by the next call.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import ray

from pipeline.answer import answer_columns
from pipeline.contracts import Sample, TaskSpec
from pipeline.errors import InputError
from pipeline.ingestion import DataConfig
from pipeline.progress import Track, say
from pipeline.serving.batch_input import AS_THEY_ARE, InputFile, Reader, Stretch, check_task, find_files
from pipeline.serving.batch_output import LIKELIHOODS, WORK, Output, ScoredFile, ScoreManifest, ScoringPlan

_READER_CPUS, _ACTOR_CPUS = 0.1, 0.9
"""Of one core both: readers wait for scorers, and neither may keep the other from starting."""
_MORE_READERS = 1
"""Than scorers: enough that none waits for rows, and each is a process that takes memory and time to start."""
_JUDGED_ROWS = 1000
"""From so many rows on the share of those that were put aside is judged while the work goes on."""


class Answering(Protocol):
    """What scores: :class:`pipeline.modeling.predictor.Predictor` is one, which explains as well."""

    def answer(self, samples: list[Sample]) -> Sequence[tuple[Any, ...]]:
        """Return the values of each sample's columns, as :func:`pipeline.modeling.predictor.answer_columns` names."""


@dataclass(frozen=True)
class ScoringJob:
    """What is scored by whom.

    Args:
        model: its name, which stands in the output.
        load: called on a worker, returns what scores.
        tasks: that the model answers.
        input: file, folder or glob, local or remote.
        output: folder.
        task: of rows that do not name one.
        keep: fields that are carried into the output.
        num_workers: actors that hold the model.
        max_rejected_share: largest share of rows that may be put aside before the work stops.
        explain: write each label word's log-likelihood, too; what ``load`` returns has ``explain`` then.
        data: how records are found in the input: dialects, encodings, columns.
    """

    model: str
    load: Callable[[], Answering]
    tasks: tuple[TaskSpec, ...]
    input: str
    output: str
    task: str | None = None
    keep: tuple[str, ...] = ()
    num_workers: int = 1
    max_rejected_share: float = 0.05
    explain: bool = False
    data: DataConfig = AS_THEY_ARE


def score_files(job: ScoringJob) -> ScoreManifest:
    """Score the rows of all input files; what an earlier call has finished stands.

    A cluster is there (see :func:`pipeline.orchestration.cluster.cluster`).

    Raises:
        InputError: there is no input, the output is another job's, a file cannot be read, or too many rows are bad.
    """
    check_task(job.task, job.tasks)
    files = find_files(job.input)
    answered = (*answer_columns(job.tasks), *([LIKELIHOODS] if job.explain else []))
    output = Output(job.output, job.keep, answered)
    plan = ScoringPlan(
        model=job.model,
        input=job.input,
        task=job.task,
        keep=job.keep,
        reading=job.data.reading(),
        files=tuple(files),
        explain=job.explain,
    )
    if (whole := output.begin(plan)) is not None:
        say(f"{job.output} is whole already: {whole.rows:,} rows by {whole.model}")
        return whole
    finished, parts = output.done(files)
    with Track("score", sum(file.size for file in files), "bytes") as track:
        for unit in finished:
            track.advance(files[unit].size, "scored before")
        for unit, scored in _Scoring(job, files, output, parts, track).run():
            finished[unit] = scored
    return output.finish(plan, [finished[unit] for unit in range(len(files))])


class _Scoring:
    """One run over the units that are left."""

    def __init__(
        self, job: ScoringJob, files: list[InputFile], output: Output, parts: dict[int, frozenset[int]], track: Track
    ) -> None:
        self.job, self.files, self.output, self.parts, self.track = job, files, output, parts, track
        self._seen: dict[int, set[int]] = {unit: set(done) for unit, done in parts.items()}
        self._ends: dict[int, int] = {}
        self._bytes = dict.fromkeys(parts, 0)
        self._rows = self._rejected = 0
        self._begun = time.monotonic()

    def run(self) -> Iterator[tuple[int, ScoredFile]]:
        """Yield each unit as it is finished."""
        joining: dict[Any, int] = {}
        join = ray.remote(num_cpus=0)(_join)
        for row in self._answers():
            if (stretches := self._noted(row)) is None:
                continue
            unit = int(row["unit"])
            joining[join.remote(self.output, unit, self.files[unit], stretches)] = unit
            for ready in ray.wait(list(joining), timeout=0)[0]:
                yield joining.pop(ready), ray.get(ready)
        for reference, unit in joining.items():
            yield unit, ray.get(reference)

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Yield a row a stretch: unit, number, is_last, rows, rejected, place, as it is finished."""
        if not self.parts:
            return
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        for name in ("ray.data", "ray.data._internal.progress"):  # it says that it shows no progress: we do
            logging.getLogger(name).setLevel(logging.ERROR)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= self.job.num_workers else 0
        units = [{"unit": unit} for unit in sorted(self.parts)]
        reader = Reader(self.job.tasks, self.job.task, self.job.keep, self.job.data)
        read = partial(_read, reader, dict(enumerate(self.files)), self.parts)
        stretches = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            read,
            batch_size=1,
            num_cpus=_READER_CPUS,
            compute=ray.data.TaskPoolStrategy(size=min(self.job.num_workers + _MORE_READERS, len(units))),
        )
        answers = stretches.map_batches(
            _Scorer,
            fn_constructor_args=(self.job.load, self.output, self.job.explain),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self.job.num_workers),
            num_cpus=_ACTOR_CPUS,
            num_gpus=gpus,
        )
        try:
            yield from answers.iter_rows()
        except ray.exceptions.RayError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, InputError):
                cause = getattr(cause, "cause", None) or cause.__cause__
            raise cause or error from error

    def _noted(self, row: dict[str, Any]) -> int | None:
        """Count a finished stretch; return the number of its unit's stretches where it was the last one missing."""
        unit, number = int(row["unit"]), int(row["number"])
        self._rows += int(row["rows"])
        self._rejected += int(row["rejected"])
        total = self._rows + self._rejected
        self._seen[unit].add(number)
        if row["is_last"]:
            self._ends[unit] = number + 1
        is_whole = len(self._seen[unit]) == self._ends.get(unit)
        place = self.files[unit].size if is_whole else min(int(row["place"]), self.files[unit].size)
        speed = total / max(time.monotonic() - self._begun, 1e-9)
        self.track.advance(max(place - self._bytes[unit], 0), f"{total:,} rows, {speed:,.0f} a second")
        self._bytes[unit] = max(place, self._bytes[unit])
        if (total >= _JUDGED_ROWS or is_whole) and self._rejected > self.job.max_rejected_share * total:
            raise InputError(
                f"at most {self.job.max_rejected_share:.0%} of the rows may be bad, {self._rejected} of {total} are, "
                f"the last of them for: {row['reason']}; see {self.job.output}/{WORK}, mend the input, or allow more "
                "by --max-rejected-share"
            )
        return self._ends[unit] if is_whole else None


def _read(
    reader: Reader, files: dict[int, InputFile], parts: dict[int, frozenset[int]], batch: dict[str, np.ndarray]
) -> Iterator[dict[str, list[bytes]]]:
    for unit in map(int, batch["unit"]):
        for stretch in reader.stretches(unit, files[unit], parts[unit]):
            yield {"stretch": [stretch.dump()]}


class _Scorer:
    """Scores stretches and writes them; holds the model."""

    def __init__(self, load: Callable[[], Any], output: Output, explain: bool) -> None:
        model = load()
        self._answer = model.explain if explain else model.answer
        self._output = output

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        found = [self._scored(Stretch.load(data)) for data in batch["stretch"]]
        return {name: [row[name] for row in found] for name in found[0]}

    def _scored(self, stretch: Stretch) -> dict[str, Any]:
        try:
            answers = self._answer(stretch.samples)
        except InputError:  # of one row at least, which goes aside
            stretch = self._sifted(stretch)
            answers = self._answer(stretch.samples)
        names = self._output.answered
        columns = list(zip(*answers, strict=True)) or [()] * len(names)
        self._output.write_stretch(stretch, dict(zip(names, columns, strict=True)))
        return {
            "unit": stretch.unit,
            "number": stretch.number,
            "is_last": stretch.is_last,
            "place": stretch.place,
            "rows": len(stretch.rows),
            "rejected": len(stretch.rejected),
            "reason": stretch.rejected[-1][1] if stretch.rejected else "",
        }

    def _sifted(self, stretch: Stretch) -> Stretch:
        rows, samples, rejected = [], [], list(stretch.rejected)
        for row, sample in zip(stretch.rows, stretch.samples, strict=True):
            try:
                self._answer([sample])
            except InputError as error:
                rejected.append((row[0], str(error), {**sample.fields}))
                continue
            rows.append(row)
            samples.append(sample)
        rejected.sort(key=lambda each: each[0])
        return Stretch(stretch.unit, stretch.number, stretch.is_last, stretch.place, rows, samples, rejected)


def _join(output: Output, unit: int, file: InputFile, stretches: int) -> ScoredFile:
    return output.join(unit, file, stretches)
