"""One training run in a process of its own, measured: ours, or Hugging Face Trainer with PEFT LoRA.

``python -m tests.benchmarks.training_worker MODE SETTINGS.json`` prints one JSON document last. Every mode takes the
same rows from the same shards; which ones make a batch is the mode's own affair, so a sample of an epoch's batches is
timed that has every length in its share.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.contracts import ShardManifest
from pipeline.modeling.adapter import AdapterConfig, build_adapter
from pipeline.modeling.answering import sample_encoder
from pipeline.modeling.base_model import (
    EMBEDDED,
    BaseModelConfig,
    load_base,
    load_tokenizer,
    resolve_base,
    resolve_dtype,
)
from pipeline.modeling.head_encoding import head_classes
from pipeline.modeling.packing import Example, HeadExample
from pipeline.modeling.target_names import ENCODER_TARGETS
from pipeline.stream import LengthGrouping, read_split
from pipeline.training.config import TrainingConfig
from pipeline.training.loop import Trainer, TrainingJob, job_stream
from pipeline.world import World

MAX_LENGTH = 256
SEED = 0


class Callbacks:
    """Surroundings that keep the history only."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def started(self, step: int, num_steps: int) -> None:
        pass

    def stops(self) -> bool:
        return False

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def trained_on(self, *_: Any) -> None:
        pass


def job_of(settings: dict[str, Any], **training: Any) -> TrainingJob:
    """Return our run of the settings."""
    manifest = Path(settings["manifest"])
    return TrainingJob(
        manifest_path=manifest,
        tasks=ShardManifest.read(manifest).tasks,
        base=BaseModelConfig(
            base=settings.get("base", EMBEDDED),
            dtype=settings.get("dtype", "float32"),
            max_length=MAX_LENGTH,
            num_layers=settings.get("num_layers"),
        ),
        adapter=AdapterConfig(lora_dropout=settings.get("dropout", 0.05)),
        training=TrainingConfig(**{"global_batch_size": settings["rows"], "num_workers": 1, **training}),
        seed=SEED,
        length_grouping=LengthGrouping(**settings.get("grouping", {"window_steps": 64})),
    )


def peak_mebibytes() -> float:
    """Return the most memory that this process has held."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def spread(totals: list[int], count: int) -> list[int]:
    """Return which batches to time: those at evenly spaced places in the order of their tokens, shuffled."""
    order = sorted(range(len(totals)), key=lambda i: totals[i])
    chosen = [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]
    return [chosen[i] for i in torch.randperm(count, generator=torch.Generator().manual_seed(SEED)).tolist()]


def ours(settings: dict[str, Any]) -> dict[str, Any]:
    """Time steps of our loop: reading, tokenising, forward, backward, step."""
    steps = settings["steps"]
    trainer = Trainer(job_of(settings), World(0, 1), Callbacks(), Path(settings["folder"]))
    trainer.adapter.train()
    lengths = [sum(trainer.stream.lengths(step)) for step in range(trainer.stream.steps_per_epoch)]
    tokens, seconds, cpu_s = 0, 0.0, 0.0
    for number, step in enumerate([lengths.index(min(lengths)), *spread(lengths, steps)]):
        start, cpu_start = time.perf_counter(), time.process_time()
        samples = trainer.stream.samples(step, World(0, 1))
        trainer._train_step(step, samples)
        if number:  # the first one warms up
            seconds += time.perf_counter() - start
            cpu_s += time.process_time() - cpu_start
            tokens += sum(example.num_tokens for example in trainer.encoder.encode(samples))
    return {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds, "cpu_s": cpu_s}


def hugging_face(settings: dict[str, Any], by_length: bool) -> dict[str, Any]:
    """Time steps of Hugging Face Trainer with PEFT LoRA, rows in its own order, padded to the batch's longest."""
    from transformers import Trainer as HuggingFaceTrainer
    from transformers import TrainerCallback, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    job, rows, steps = job_of(settings), settings["rows"], settings["steps"]
    examples: Any = sample_encoder(job.base, job.tasks).encode(list(read_split(job.manifest_path, "train")))
    lengths = [len(example.prompt if isinstance(example, Example) else example.rows[0]) for example in examples]
    generator = torch.Generator().manual_seed(SEED)
    if by_length:
        order = list(LengthGroupedSampler(rows, lengths=lengths, generator=generator))
    else:
        order = torch.randperm(len(examples), generator=generator).tolist()
    batches = [order[first : first + rows] for first in range(0, len(order) - rows + 1, rows)]
    padded = [rows * max(lengths[i] for i in batch) for batch in batches]
    chosen = [batches[i] for i in (padded.index(min(padded)), *spread(padded, steps))]
    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    model, row_of, collator = _language_model(job) if isinstance(examples[0], Example) else _classifier(job)
    arguments = TrainingArguments(
        output_dir=settings["folder"],
        per_device_train_batch_size=rows,
        max_steps=steps + 1,
        learning_rate=1e-3,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    HuggingFaceTrainer(
        model=model,
        args=arguments,
        train_dataset=[row_of(examples[i]) for batch in chosen for i in batch],  # type: ignore[arg-type]
        data_collator=collator,
        callbacks=[Clock()],
    ).train()
    tokens = sum(examples[i].num_tokens for batch in chosen[1:] for i in batch)
    seconds, cpu_s = (end - start for start, end in zip(times[1], times[-1], strict=True))
    return {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds, "cpu_s": cpu_s}


def _language_model(job: TrainingJob) -> tuple[Any, Any, Any]:
    """Return a language model under PEFT's LoRA, how an example becomes a row, and what pads rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq

    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=list(job.adapter.target_modules))
    model = load_base(job.base.model_copy(update={"packed_rows": False}))
    collator = DataCollatorForSeq2Seq(load_tokenizer(job.base), label_pad_token_id=-100)
    return get_peft_model(model, lora), _row, collator


def _classifier(job: TrainingJob) -> tuple[Any, Any, Any]:
    """Return the same of an encoder: transformers' classifier, one for the classes of all tasks together."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    folder, labels = resolve_base(job.base), sum(head_classes(job.tasks))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels, dtype=resolve_dtype(job.base.dtype)
    )
    lora = LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=list(ENCODER_TARGETS[0])
    )
    return get_peft_model(model, lora), _row_of_head, DataCollatorWithPadding(load_tokenizer(job.base))


def _row_of_head(example: HeadExample) -> dict[str, Any]:
    label = example.head_rows[max(range(len(example.target)), key=lambda c: example.target[c])]
    ids, types = list(example.rows[0]), list(example.token_types[0])
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids), "labels": label}


def _row(example: Example) -> dict[str, list[int]]:
    word = example.words[max(range(len(example.words)), key=lambda c: example.target[c])]
    labels = [-100] * len(example.prompt) + list(word)
    return {"input_ids": [*example.prompt, *word], "attention_mask": [1] * len(labels), "labels": labels}


def equal(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the losses of our loop and of a plain one on padded whole batches, step by step."""
    from transformers import get_scheduler

    from pipeline.modeling.scoring import LabelScorer
    from pipeline.training.objective import Objective

    steps = settings["steps"]
    job = job_of(settings, max_steps=steps, micro_batch_tokens=256)
    trainer = Trainer(job, World(0, 1), Callbacks(), Path(settings["folder"]))
    trainer.adapter.train()
    found = []
    for step in range(steps):
        trainer._train_step(step, trainer.stream.samples(step, World(0, 1)))
        total, count = trainer.window.sums_T2.sum(0).tolist()
        trainer.window.restart()
        found.append(total / count)

    torch.manual_seed(job.seed)
    names = [task.name for task in job.tasks]
    base = load_base(job.base.model_copy(update={"packed_rows": False}))
    objective = Objective(LabelScorer(build_adapter(job.adapter, base, names)), names, job.training).train()
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.training.learning_rate, weight_decay=0.0)
    warmup = round(job.training.warmup_share * steps)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    stream, expected = job_stream(job), []
    for step in range(steps):
        batch = trainer.encoder.collate(trainer.encoder.encode(stream.samples(step, World(0, 1))))
        loss, plain, _ = objective(batch)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        expected.append(float(plain.mean()))
    return {"ours": found, "plain": expected}


def rank(settings: dict[str, Any]) -> dict[str, Any]:
    """Run one rank of a whole job under torchrun; rank 0 tells the history."""
    import pipeline.orchestration.training  # noqa: F401 - so that a rank's memory is that of a rank under Ray

    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    callbacks = Callbacks()
    Trainer(job_of(settings, **settings["training"]), world, callbacks, Path(settings["folder"])).run()
    return {"rows": callbacks.rows, "rank": world.rank}


def main() -> None:
    """Run a mode and print what was measured."""
    mode, settings = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    torch.set_num_threads(1)
    if mode in ("ours", "ours_by_beginning", "equal"):  # Trainer would make a group of one rank out of these
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    modes = {
        "ours": ours,
        "ours_by_beginning": lambda s: ours({**s, "grouping": {"window_steps": 500, "by_beginning": True}}),
        "trainer": lambda s: hugging_face(s, by_length=False),
        "trainer_by_length": lambda s: hugging_face(s, by_length=True),
        "equal": equal,
        "rank": rank,
    }
    result = {**modes[mode](settings), "peak_mib": peak_mebibytes()}
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
