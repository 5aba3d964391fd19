"""An image-text base for a configuration's tasks: parts that packages carry, a projector trained on the train part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.config import RunConfig
from pipeline.errors import InputError
from pipeline.progress import Track, say

_BATCH = 64


def image_base(
    config: RunConfig,
    output: Path,
    steps: int = 300,
    learning_rate: float = 1e-3,
    num_layers: int | None = None,
    image_size: int = 128,
) -> dict[str, Any]:
    """Make the base in a folder, or train the projector of one that is there further.

    What is trained here is the projector alone, on the train part of the tasks that have images; the convolutional
    network keeps its ImageNet weights and the language model its own.

    Args:
        config: whose tasks and data; its shards are written where they are not there.
        output: the folder.
        steps: of 64 samples.
        learning_rate: peak of the projector's.
        num_layers: of SmolLM2 that are kept; None for all.
        image_size: side in pixels to which images are resized.

    Raises:
        InputError: no task has images.
    """
    from jobs.run import Run
    from jobs.stages.prepare import prepare
    from pipeline.modeling.answering import sample_encoder
    from pipeline.modeling.base_model import BaseModelConfig, load_base, resolve_base
    from pipeline.modeling.image_text_base import make_image_text_base, replace_projector
    from pipeline.stream import MixedStream
    from pipeline.training.projector import projector_of, train_projector

    if not any(task.image_field for task in config.tasks):
        raise InputError("an image base is made for tasks with image_field, got none; name one, or take a text base")
    if not output.exists():
        say(f"Making {output} of EfficientNet-Lite0 and SmolLM2 …")
        make_image_text_base(BaseModelConfig(num_layers=num_layers, dtype="bfloat16"), output, image_size, config.seed)
    settings = config.model.model_copy(update={"base": str(output), "num_layers": None})
    config = config.model_copy(update={"model": settings})
    prepare(Run(config))
    model: Any = load_base(settings)
    stream = MixedStream(config.manifest_path, config.seed, _BATCH)
    losses: list[float] = []
    with Track("train the projector", steps, "steps") as track:

        def told(step: int, loss: float) -> None:
            losses.append(loss)
            track.advance()

        train_projector(
            model,
            sample_encoder(settings, config.tasks),
            config.tasks,
            stream,
            steps,
            learning_rate,
            config.training.micro_batch_tokens,
            told,
        )
    replace_projector(resolve_base(settings), projector_of(model))
    last = sum(losses[-20:]) / max(1, len(losses[-20:]))
    say(f"{output}: projector trained for {steps} steps, loss {losses[0] if losses else 0:.3f} → {last:.3f}")
    return {"folder": str(output), "steps": steps, "first_loss": losses[0] if losses else None, "last_loss": last}
