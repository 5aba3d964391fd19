"""The adapter's shape as a run's configuration has it; needs no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from pipeline.settings import Settings

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The four projections of attention, by the names that most language models give them."""
Method = Literal["mtl_lora", "lora", "lora_per_task", "dora", "multilora", "moelora"]
Part = Literal["language", "connector", "vision"]
"""A part of an image-text model: what reads and writes text, what sees images, and what connects the two."""
_SIZED = frozenset({"r", "lora_alpha"})
"""What ``size`` decides where it is not told."""
_LATER = (
    "size",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "temperature_start",
    "learn_temperature",
    "mixing_spread",
    "bias",
    "train_layer_norms",
    "parts",
)
"""Keys that came after runs had been trained without them: at their defaults they change no digest."""


class AdapterSize(Settings):
    """A number of trainable parameters, named by the adapter that has it."""

    like: Method = "lora"
    """Method of that adapter; it stands on the same targets and has the same tasks and the same other settings."""
    r: int = Field(ge=1)
    """Its rank."""


class AdapterConfig(Settings):
    """The adapter's shape; names as in PEFT and the paper (arXiv 2410.09437)."""

    method: Method = "mtl_lora"
    """MTL-LoRA, or one of the rivals that the paper compares it with."""
    r: int = Field(default=8, ge=1)
    """Rank; not to be given beside ``size``."""
    lora_alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by ``lora_alpha / r``. Beside ``size``, 2 r where it is not given."""
    size: AdapterSize | None = None
    """Instead of ``r``: the rank that gives as many trainable parameters as another method's adapter has, such as
    ``{like: lora, r: 16}``; the nearest one, which ``plan`` says with the counts of all methods. An adapter that a run
    begins with (``training.warm_start``) keeps its rank, whatever tasks have come or gone."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Probability that an input of the adapter is dropped in training."""
    num_up_projections: int = Field(default=3, ge=1)
    """Shared up-projections (mtl_lora), parallel adapters (multilora) or experts (moelora)."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over a task's mixing logits."""
    temperature_start: float | None = Field(default=None, gt=0)
    """The temperature moves from here to ``temperature`` over the training, by equal factors; null: it is constant. Not
    with ZeRO 3."""
    learn_temperature: bool = False
    """Learn a factor on the temperature, one a layer."""
    mixing_spread: float | None = Field(default=None, gt=0)
    """The mixing logits over the temperature start uniform within ± this: 1 is soft, 0.1 nearly even. Null: the
    authors' start, ± 5.8 at temperature 0.1 with 3 up-projections, which is nearly one-hot at random."""
    transform: Literal["full", "diagonal"] = "full"
    """Form of a task's Λ."""
    target_modules: tuple[str, ...] | str = DEFAULT_TARGETS
    """As PEFT takes them: names (the last parts of a module's path), a regular expression on its full path, or
    ``all-linear`` for every linear layer but the output head; also ``ffn`` for all of the blocks that do not stand in
    attention. The default stands for attention's projections on encoders too, whatever these call them."""
    parts: tuple[Part, ...] = Field(default=("language",), min_length=1)
    """Parts of an image-text model that are adapted, of ``language``, ``connector`` (projector) and ``vision``; also
    those that ``bias: all`` and ``train_layer_norms`` reach. Names in ``target_modules`` are those of ``language``; of
    the other two every linear layer is adapted. An expression, or ``all-linear``, must find layers in just these."""
    use_rslora: bool = False
    """Scale by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732)."""
    layers_to_transform: tuple[int, ...] | int = ()
    """Numbers of the layers that are adapted, the first is 0; empty for all. Needs ``target_modules`` as names, as in
    PEFT."""
    layers_pattern: tuple[str, ...] | str = ()
    """What the list of layers is called in a path (``layers``, ``h``); empty for whatever is numbered first."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks than ``r``, by a module's name or a regular expression on the end of its path; the first key that
    matches counts, as in PEFT."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other values than ``lora_alpha``, likewise."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases of the base that train too, shared by all tasks: none, those of adapted layers, or all (of ``parts``)."""
    train_layer_norms: bool = False
    """Train the base's normalisation layers (of ``parts``) too, shared by all tasks."""

    @model_validator(mode="after")
    def _check_size(self) -> AdapterConfig:
        if self.size is None:
            return self
        if "r" in self.model_fields_set:
            raise ValueError(
                f"adapter.r and adapter.size exclude each other, got r {self.r} and size like {self.size.like} of r "
                f"{self.size.r}; leave one out"
            )
        if self.rank_pattern:
            raise ValueError(
                f"adapter.size solves for one rank, got rank_pattern {self.rank_pattern} beside it; leave one out"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_size_decides(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        left_out = _SIZED - self.model_fields_set if self.size is not None else ()
        return {key: value for key, value in values.items() if key not in left_out}

    def options(self) -> dict[str, Any]:
        """Return what :class:`mtl_lora.MTLLoRAConfig` takes beside the tasks, ``r`` as it stands."""
        names = set(type(self).model_fields) - {"method", "size", "parts"}
        return {name: getattr(self, name) for name in names}

    def identity(self) -> dict[str, Any]:
        """Return as values what decides the trained adapter; settings that came later count where they are used."""
        values = self.model_dump(mode="json")
        unused = {
            key
            for key in _LATER
            if getattr(self, key) == type(self).model_fields[key].get_default(call_default_factory=True)
        }
        return {key: value for key, value in values.items() if key not in unused}

    def sized(self, r: int, lora_alpha: float | None = None) -> AdapterConfig:
        """Return this with the rank that was solved for its ``size``.

        Args:
            r: the rank.
            lora_alpha: where this one was not told; None for 2 r.
        """
        told = self.lora_alpha if "lora_alpha" in self.model_fields_set else lora_alpha or 2.0 * r
        return self.model_copy(update={"size": None, "r": r, "lora_alpha": told})
