"""Answers that a language model writes: batches of mixed tasks through its own ``generate``, each task by its settings.

The rows of a batch are of any tasks that write alike; each layer folds a task's up-projections once and keeps the
product for all batches. Prompts are padded on the left, so that all answers begin at one place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig as Decoding

from pipeline.contracts import Sample
from pipeline.generation import GenerationConfig
from pipeline.modeling.encoding import Encoder, Prompt
from pipeline.modeling.image_inputs import image_arguments

Generate = Callable[..., Tensor]
"""A model's ``generate``, with ``task_ids`` (B,) among its arguments."""


def written_tokens(
    generate: Generate,
    encoder: Encoder,
    samples: Sequence[Sample],
    batch_tokens: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[int, ...]]:
    """Return the tokens of each sample's answer, without the end token, in the order given.

    Args:
        generate: of the model.
        encoder: tokenises for it.
        samples: of tasks whose answers are written, mixed.
        batch_tokens: most tokens, of prompts, padding and answers, that go through the model at once.
        device: of the model.
        progress: called with the number of samples that were just answered.
    """
    prompts = encoder.prompts(samples)
    has_image = [prompt.image is not None for prompt in prompts]
    answers: list[tuple[int, ...]] = [()] * len(samples)
    end = encoder.tokenizer.eos_token_id
    for settings, rows in _batches(encoder, samples, [len(prompt.ids) for prompt in prompts], has_image, batch_tokens):
        longest = max(len(prompts[i].ids) for i in rows)
        found = generate(
            **_padded([prompts[i] for i in rows], longest, encoder.tokenizer.pad_token_id, device),
            task_ids=torch.tensor([encoder.task_index[samples[i].task] for i in rows], device=device),
            **_decoding(settings, encoder.tokenizer),
        )
        for i, row in zip(rows, found[:, longest:].tolist(), strict=True):
            answers[i] = tuple(row[: row.index(end)] if end in row else row)
        if progress is not None:
            progress(len(rows))
    return answers


def _padded(prompts: Sequence[Prompt], longest: int, pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return the arguments of ``generate`` for prompts padded on the left, with their images."""
    before = [longest - len(prompt.ids) for prompt in prompts]
    rows = [[pad] * n + list(prompt.ids) for n, prompt in zip(before, prompts, strict=True)]
    is_token = [[0] * n + [1] * len(prompt.ids) for n, prompt in zip(before, prompts, strict=True)]
    found = {"input_ids": rows, "attention_mask": is_token}
    images = [prompt.image for prompt in prompts if prompt.image is not None]
    if images and (name := images[0].kind_name) is not None:
        later = images[0].later_kind
        kinds = [list(p.image.kinds) if p.image else [later] * len(p.ids) for p in prompts]
        found[name] = [[0] * n + row for n, row in zip(before, kinds, strict=True)]
    arguments = {name: torch.tensor(value, device=device) for name, value in found.items()}
    return arguments | image_arguments(images, torch.device(device), None)


def text_of(tokens: Sequence[int], settings: GenerationConfig, tokenizer: Any) -> str:
    """Return the text of an answer's tokens, up to the first of the texts that stop it, without outer spaces."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    ends = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


def _batches(
    encoder: Encoder, samples: Sequence[Sample], lengths: Sequence[int], has_image: Sequence[bool], batch_tokens: int
) -> Iterator[tuple[GenerationConfig, list[int]]]:
    """Yield rows that write alike, all with an image or none, longest prompts first, as many as fit."""
    alike: dict[tuple[str, bool], tuple[GenerationConfig, list[int]]] = {}
    for i, sample in enumerate(samples):
        settings = encoder.specs[encoder.task_index[sample.task]].generation
        key = settings.model_dump_json(exclude={"loss"}), has_image[i]
        alike.setdefault(key, (settings, []))[1].append(i)
    for settings, rows in alike.values():
        rows.sort(key=lambda i: -lengths[i])
        while rows:
            width = (lengths[rows[0]] + settings.max_new_tokens) * settings.num_beams
            most = max(1, batch_tokens // width)
            yield settings, rows[:most]
            del rows[:most]


def _decoding(settings: GenerationConfig, tokenizer: Any) -> dict[str, Any]:
    """Return the arguments of ``generate``; what a base's own file says of sampling and penalties does not count."""
    config = Decoding(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        do_sample=False,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=list(settings.stop) or None,
        use_cache=True,
    )
    return {"generation_config": config} | ({"tokenizer": tokenizer} if settings.stop else {})
