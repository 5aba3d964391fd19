"""One rank's training: sampled batches in, checkpoints and a history out. Knows nothing of Ray or MLflow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from mtl_lora import AdapterModel
from mtl_lora.analysis import gradient_cosine
from mtl_lora.tasks import freeze_shared
from pipeline.contracts import Sample, TaskSpec
from pipeline.heap import returned_when_freed
from pipeline.modeling.adapter import AdapterConfig, build_adapter, warm_adapter
from pipeline.modeling.answering import class_scorer, classes_of_heads, sample_encoder
from pipeline.modeling.base_model import BaseModelConfig, load_base, resolve_dtype
from pipeline.modeling.layer_cut import checkpoint_layers
from pipeline.modeling.packing import Batch, micro_batches
from pipeline.stream import CacheConfig, LengthGrouping, MixedStream
from pipeline.training.checkpoint import Checkpoints, adapter_sha256, read_checkpoint
from pipeline.training.config import TrainingConfig
from pipeline.training.engine import (
    Engine,
    device,
    from_rank_zero,
    gathered_layer_by_layer,
    join_process_group,
    largest,
    partitioned_loading,
    reduce_sum,
)
from pipeline.training.finite import FiniteGuard
from pipeline.training.frozen import frozen_part, kept_features
from pipeline.training.mixture_losses import MixtureLosses
from pipeline.training.objective import Objective
from pipeline.training.run_store import RunStore, StoredCheckpoints
from pipeline.training.token_weights import TokenWeights
from pipeline.world import World

if TYPE_CHECKING:
    from pipeline.training.validation import Validation


@dataclass(frozen=True)
class TrainingJob:
    """All that a rank needs to know; plain values, so that it travels to any machine."""

    manifest_path: Path | str
    tasks: tuple[TaskSpec, ...]
    base: BaseModelConfig
    adapter: AdapterConfig
    training: TrainingConfig
    seed: int
    mixture: Any = "proportional"
    length_grouping: LengthGrouping | None = None
    cache: CacheConfig | None = None

    @cached_property
    def adapter_sha256(self) -> str:
        """Digest of adapter, tasks and base; asked for once, it travels with the job."""
        return adapter_sha256(self.adapter, self.base, self.tasks)


class Callbacks(Protocol):
    """What a rank tells and asks while it trains; see :class:`pipeline.training.callbacks.RunCallbacks`."""

    def started(self, step: int, num_steps: int) -> None:
        """Hear at which step training begins; called by every rank."""

    def stops(self) -> bool:
        """Whether this rank is told to stop; asked after each step."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row of the history; called by rank 0."""

    def trained_on(self, step: int, rank: int, samples: Sequence[Sample]) -> None:
        """Take the samples of one step; called by every rank when the ledger is on."""


def job_stream(job: TrainingJob) -> MixedStream:
    """Return the stream that a job's ranks will read."""
    return MixedStream(
        job.manifest_path,
        job.seed,
        job.training.global_batch_size,
        job.mixture,
        length_grouping=job.length_grouping,
        cache=job.cache,
    )


def start_adapter(job: TrainingJob, base: nn.Module) -> AdapterModel:
    """Return the adapter that training begins with: fresh, or a trained one fitted to the job's tasks."""
    names, classes = [task.name for task in job.tasks], classes_of_heads(base, job.tasks)
    if job.training.warm_start is None:
        adapter = build_adapter(job.adapter, base, names, classes)
    else:
        adapter = warm_adapter(job.adapter, base, job.training.warm_start, names, classes)
    if job.training.only_tasks:
        freeze_shared(adapter, *job.training.only_tasks)
    return adapter


class Trainer:
    """The state of one rank.

    Args:
        job: what to train; the number of ranks that counts is the world's.
        world: this rank among all.
        callbacks: told of the steps, asked whether to stop.
        checkpoint_root: folder of the run's checkpoints, shared by all ranks, or with ``store`` in its working copy.
        base: the job's base, loaded already and used up by this; None: it is loaded.
        store: where the run's folder lies on object storage.
    """

    def __init__(
        self,
        job: TrainingJob,
        world: World,
        callbacks: Callbacks,
        checkpoint_root: Path,
        base: nn.Module | None = None,
        store: RunStore | None = None,
    ) -> None:
        kept = (checkpoint_root, job.adapter_sha256, job.training.keep_checkpoints)
        self.checkpoints = Checkpoints(*kept) if store is None else StoredCheckpoints(*kept, store.mirror)
        self.store = store
        job = replace(job, training=job.training.model_copy(update={"num_workers": world.num_ranks}))
        self.job, self.world, self.callbacks = job, world, callbacks
        join_process_group()
        torch.manual_seed(job.seed)
        self.device = device()
        bfloat16 = resolve_dtype(job.base.dtype) is torch.bfloat16
        # Under ZeRO 3 large blocks come and go with every layer; on a device torch keeps them for itself.
        stays = job.training.zero_stage == 3 and self.device.type == "cpu"
        with returned_when_freed(stays), partitioned_loading(job.training, bfloat16):
            if base is None:
                base = load_base(job.base, self.device, asking=gathered_layer_by_layer)
            self.adapter = start_adapter(job, base).to(self.device)
        self.encoder = sample_encoder(job.base, job.tasks)
        self.stream = job_stream(job)
        self.num_samples = job.training.num_samples(self.stream.epoch_samples)
        self.num_steps = job.training.num_steps(self.stream.epoch_samples)
        scorer = class_scorer(self.adapter)
        with returned_when_freed(stays):  # it is proven on rows that are long for a proof's sake
            states, stage = job.training.kept_states, job.training.zero_stage
            if any(task.image_field for task in job.tasks):
                scorer.features, states = kept_features(self.adapter, job.base, states, stage), None
            self.frozen = scorer.frozen = frozen_part(self.adapter, job.base, states, stage)
        objective = Objective(scorer, [t.name for t in job.tasks], job.training)
        if job.training.activation_checkpointing:
            checkpoint_layers(base)
        self.objective = objective
        self.engine = Engine(objective, job.training, self.num_steps, bfloat16)
        self.guard = FiniteGuard(objective, self.device)
        self.log_interval = LogInterval(len(job.tasks), self.device)
        self.measured: dict[str, Any] = {}
        self.validation: Validation | None = None
        if (asked := job.training.validation) is not None:
            from pipeline.training.validation import Validation  # loads scipy, which a restart need not wait for

            self.validation = Validation(asked, job.manifest_path, job.tasks, self.encoder, world, job.cache)
        self.mixture_losses = MixtureLosses(self.stream, [t.name for t in job.tasks], self.device)
        self.token_weights = TokenWeights(job.tasks, self.device)

    def run(self) -> bool:
        """Train from the newest checkpoint, or from the start, to the last step or until a rank is told to stop.

        Returns:
            Whether the run is over: the last step is done, or validation has waited long enough. A checkpoint of the
            last step that was done stands either way.
        """
        start = self._load()
        if self.validation is not None and self.validation.is_over:
            return True  # cut off after its last step
        self._anneal(start)
        self.callbacks.started(start, self.num_steps)
        self.adapter.train()
        self.log_interval.restart()
        config = self.job.training
        batches = self.stream.batches(self.world, start, self.num_steps - start)
        for step in range(start, self.num_steps):
            waiting = time.monotonic()
            samples = next(batches)
            self.log_interval.data_wait_s += time.monotonic() - waiting
            self._train_step(step, samples)
            done = step + 1
            self._anneal(done)
            self.mixture_losses.end_step(done)
            has_news, is_best = self._measure(done, samples)
            is_over = done == self.num_steps or (self.validation is not None and self.validation.is_over)
            last = self._any_stops() or is_over
            if done % config.log_steps == 0 or has_news or last:
                self._log(done)
            if done % config.checkpoint_steps == 0 or is_best or last:
                self._save(done, best=is_best)
            if last:
                self.checkpoints.settle()
                self._await_all()  # who leaves first would end the one that still sends
                return is_over
        return True

    def _anneal(self, done: int) -> None:
        """Move what moves by plan to where it is after so many steps: a checkpoint holds it, a resumed run finds it."""
        for layer in self.adapter.adapted_layers().values():
            if layer.planned_parameter_names:
                layer.anneal(done / self.num_steps)

    def _train_step(self, step: int, samples: Sequence[Sample]) -> None:
        torch.manual_seed(_seed(self.job.seed, step, self.world.rank))
        config, world = self.job.training, self.world
        # The last step ends with the last sample; what fills its batch up counts nothing.
        in_step = min(config.global_batch_size, self.num_samples - step * config.global_batch_size)
        counted = max(0, min(len(samples), in_step - world.rank * len(samples)))
        examples = self.token_weights.weigh(self.encoder.encode(samples), counted)
        cut = partial(micro_batches, examples, config.micro_batch_tokens, config.micro_batch_size)
        parts = cut()
        if config.every_backward_reduces and (most := largest(len(parts))) > len(parts):
            parts = cut(at_least=most)  # every backward is one of all ranks
        # DeepSpeed takes the mean over the ranks: thus the sum of all is the mean over the global batch.
        share = world.num_ranks / in_step
        batches: Iterator[Batch] = (self.encoder.collate([examples[i] for i in part]).to(self.device) for part in parts)
        if self.frozen is not None:
            batches = self.frozen.read_ahead(batches)
        for number, (part, batch) in enumerate(zip(parts, batches, strict=True), 1):
            objective_E, losses_E, _ = self.engine(batch)
            counts_E = losses_E.new_tensor([i < counted for i in part])
            self.engine.backward((objective_E * counts_E).sum() * share, is_last=number == len(parts))
            self.guard.add(batch, losses_E)
            self.log_interval.add(batch, losses_E, counts_E)
            self.mixture_losses.add(batch, losses_E, counts_E)
        self.guard.agree(step)
        self.engine.step()
        if config.ledger:
            learnt = [s for s in samples[:counted] if not config.only_tasks or s.task in config.only_tasks]
            self.callbacks.trained_on(step, world.rank, learnt)

    def _measure(self, done: int, samples: Sequence[Sample]) -> tuple[bool, bool]:
        """Measure what is due, outside of the time that counts; return whether anything was, and whether the adapter
        is the best one so far."""
        config, start = self.job.training, time.monotonic()
        conflict_is_due = config.conflict_steps is not None and done % config.conflict_steps == 0
        validation_is_due = self.validation is not None and (self.validation.is_due(done) or done == self.num_steps)
        self.adapter.eval()
        if conflict_is_due and self.world.rank == 0:
            self.measured |= self._conflict(samples)
        if self.validation is not None and validation_is_due:
            values = self.validation.measure(done, self.engine, self.device, config.micro_batch_tokens)
            self.measured |= {"validation": values, "validation_macro": values["macro"]}
        self.adapter.train()
        self.log_interval.start += time.monotonic() - start
        is_best = validation_is_due and self.validation is not None and self.validation.best_step == done
        return conflict_is_due or validation_is_due, is_best

    def _conflict(self, samples: Sequence[Sample]) -> dict[str, Any]:
        by_task: dict[str, list[Sample]] = {}
        for sample in samples:
            by_task.setdefault(sample.task, []).append(sample)

        def loss(samples: list[Sample]) -> Iterator[Tensor]:
            examples, config = self.encoder.encode(samples), self.job.training
            for part in micro_batches(examples, config.micro_batch_tokens, config.micro_batch_size):
                batch = self.encoder.collate([examples[i] for i in part]).to(self.device)
                yield self.objective(batch)[0].sum() / len(examples)

        names, cosines_TT = gradient_cosine(self.adapter, {name: partial(loss, p) for name, p in by_task.items()})
        pairs = {
            f"{one}|{other}": float(cosines_TT[i, j])
            for i, one in enumerate(names)
            for j, other in enumerate(names[:i])
        }
        against = sum(cosine < 0 for cosine in pairs.values())
        return {"gradient_cosine": pairs, "gradient_conflict": against / len(pairs)} if pairs else {}

    def _log(self, step: int) -> None:
        sums_T2, tokens, seconds = self.log_interval.collect()
        if self.world.rank:
            return
        per_task = {
            task.name: float(total / count)
            for task, (total, count) in zip(self.job.tasks, sums_T2.tolist(), strict=True)
            if count
        }
        total, count = sums_T2.sum(0).tolist()
        self.callbacks.log(
            {
                "step": step,
                "num_steps": self.num_steps,
                "samples": min(step * self.job.training.global_batch_size, self.num_samples),
                "loss": total / count,
                "task_loss": per_task,
                "learning_rate": self.engine.learning_rate,
                "gradient_norm": self.engine.gradient_norm,
                "tokens_per_s": tokens / seconds,
                "data_wait_share": self.log_interval.last_wait_s / seconds,
                **self.measured,
            }
        )
        self.measured = {}

    def _any_stops(self) -> bool:
        # All ranks must leave at the same step, whichever of them was told to.
        return bool(reduce_sum(torch.tensor([float(self.callbacks.stops())], device=self.device)) > 0)

    def _await_all(self) -> None:
        """Wait for the other ranks' part on object storage."""
        if self.store is not None:
            reduce_sum(torch.zeros(1, device=self.device))

    def _save(self, step: int, best: bool = False) -> None:
        if self.store is not None:
            self.store.saving(step)
        self._await_all()
        tensors, values = self.engine.save()
        state = {"step": step, "engine": values, "mixture": self.mixture_losses.state_dict()}
        if self.validation is not None:
            state["validation"] = self.validation.state_dict()
        with self.engine.whole_parameters():
            if self.world.rank == 0:
                self.checkpoints.save(
                    step,
                    tensors,
                    state,
                    self.adapter.save_pretrained,
                    num_ranks=self.world.num_ranks,
                    zero_stage=self.job.training.zero_stage,
                    best=best,
                )

    def _load(self) -> int:
        found = self.checkpoints.newest() if self.world.rank == 0 else None
        step = from_rank_zero(int(found.name.rpartition("-")[2]) if found else 0)
        if step:
            tensors, state = read_checkpoint(self.checkpoints.fetch(step))
            self.engine.load(tensors, state["engine"], step)
            self.mixture_losses.load_state_dict(state["mixture"])
            if self.validation is not None and "validation" in state:
                self.validation.load_state_dict(state["validation"])
                if self.world.rank == 0 and self.validation.best_step == step:
                    self.checkpoints.mark_best(step)  # the run may have been cut off before it did
        return step


class LogInterval:
    """Sums since the last log row: per-task loss and count, tokens, waiting time."""

    def __init__(self, num_tasks: int, where: torch.device) -> None:
        self.sums_T2 = torch.zeros(num_tasks, 2, device=where, dtype=torch.float64)
        self.tokens = torch.zeros(1, device=where, dtype=torch.float64)
        self.data_wait_s = self.last_wait_s = 0.0
        self.start = time.monotonic()

    def restart(self) -> None:
        """Begin anew."""
        self.sums_T2.zero_()
        self.tokens.zero_()
        self.last_wait_s, self.data_wait_s = self.data_wait_s, 0.0
        self.start = time.monotonic()

    def add(self, batch: Batch, losses_E: Tensor, counts_E: Tensor) -> None:
        """Take the losses of one micro-batch, and which of them count; the host does not wait for them."""
        values = torch.stack([losses_E * counts_E, counts_E], 1).to(self.sums_T2.dtype)
        self.sums_T2.index_add_(0, batch.example_task, values)
        self.tokens += batch.num_tokens

    def collect(self) -> tuple[Tensor, float, float]:
        """Return sums and tokens over all ranks with the seconds they took, and begin anew."""
        both = reduce_sum(torch.cat([self.sums_T2.flatten(), self.tokens])).cpu()
        seconds = max(time.monotonic() - self.start, 1e-9)
        self.restart()
        return both[:-1].view_as(self.sums_T2), float(both[-1]), seconds


def _seed(seed: int, step: int, rank: int) -> int:
    # Dropout depends on the step and the rank, not on what ran before: a resumed run draws the same masks.
    return (seed * 1_000_003 + step) * 1_009 + rank
