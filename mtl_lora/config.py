"""What an MTL-LoRA adapter is made of; checked where it is made, saved with every adapter."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mtl_lora.errors import ConfigError

__all__ = ["CONFIG_VERSION", "MTLLoRAConfig"]

CONFIG_VERSION = 1
"""Version of the saved form; a reader refuses a version that it does not know."""


def _as_names(value: str | Sequence[str], field: str) -> tuple[str, ...]:
    """Return a sequence of names as a tuple, refusing a bare string where a list is meant."""
    if isinstance(value, str):
        raise ConfigError(f"{field} must be a list of names, got the string {value!r}; write [{value!r}]")
    return tuple(str(name) for name in value)


@dataclasses.dataclass(frozen=True)
class MTLLoRAConfig:
    """Shape and hyper-parameters of an MTL-LoRA adapter (arXiv 2410.09437, section 3).

    Defaults are those of the authors' LLaMA2-7B script, except the temperature, which their code defaults to 0.

    Args:
        task_names: one name a task; a task's id is its position here.
        r: rank R of the shared down-projection A (R, I).
        lora_alpha: the numerator of the scaling ``lora_alpha / r``.
        lora_dropout: probability of dropping an input feature of the low-rank path while training, in [0, 1).
        num_up_projections: number N of shared up-projections B (N, O, R).
        temperature: τ of the softmax over a task's N mixing logits; small values pick one up-projection.
        transform: ``"full"`` for Λ (T, R, R), ``"diagonal"`` for its diagonal only (T, R).
        target_modules: as PEFT takes them: names (the last parts of a module's path), one regular expression on the
            full path, or ``"all-linear"`` for every linear layer but the output head.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732).
        modules_to_save: names of modules that train in full and are saved with the adapter.
        bias: which biases train: ``"none"``, ``"lora_only"`` (of adapted layers) or ``"all"``.
        train_layer_norms: whether every normalisation layer trains, as in the authors' image-text runs.

    Raises:
        ConfigError: a value is out of range; the message gives the rule, the value and a remedy.
    """

    task_names: Sequence[str]
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    num_up_projections: int = 3
    temperature: float = 0.1
    transform: Literal["full", "diagonal"] = "full"
    target_modules: str | Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    use_rslora: bool = False
    modules_to_save: Sequence[str] = ()
    bias: Literal["none", "lora_only", "all"] = "none"
    train_layer_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_names", _as_names(self.task_names, "task_names"))
        object.__setattr__(self, "modules_to_save", _as_names(self.modules_to_save, "modules_to_save"))
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _as_names(self.target_modules, "target_modules"))
        self._check_tasks()
        for field in ("r", "num_up_projections"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} must be an integer >= 1, got {value!r}; the paper's scripts use 8 and 3")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be > 0, got {self.temperature}; the paper's scripts use 0.1")
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise ConfigError(f"lora_alpha must be > 0, got {self.lora_alpha}; 2 * r is usual")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}; the paper's scripts use 0.05")
        if self.transform not in ("full", "diagonal"):
            raise ConfigError(f"transform must be 'full' or 'diagonal', got {self.transform!r}; the paper uses 'full'")
        if self.bias not in ("none", "lora_only", "all"):
            raise ConfigError(f"bias must be 'none', 'lora_only' or 'all', got {self.bias!r}; 'none' is usual")
        if not self.target_modules:
            raise ConfigError("target_modules must name a module, got none; 'all-linear' takes every linear layer")
        if isinstance(self.target_modules, str):
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ConfigError(
                    "target_modules as text must be 'all-linear' or a regular expression, got "
                    f"{self.target_modules!r}: {error}; names stand in a list"
                ) from error

    def _check_tasks(self) -> None:
        if not self.task_names:
            raise ConfigError("task_names must hold at least one name, got none; name the tasks in the order of ids")
        doubles = sorted({name for name in self.task_names if self.task_names.count(name) > 1})
        if doubles:
            raise ConfigError(f"task_names must be unique, got {doubles} twice; rename one of each")
        if any(not name or "/" in name or name in (".", "..") for name in self.task_names):
            raise ConfigError(
                f"a task name must be usable as a folder's name, got {list(self.task_names)}; "
                "avoid empty names, '.', '..' and '/'"
            )

    @property
    def num_tasks(self) -> int:
        """Number T of tasks."""
        return len(self.task_names)

    @property
    def scaling(self) -> float:
        """The factor of the low-rank path: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` when rank-stabilised."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def replace(self, **changes: Any) -> "MTLLoRAConfig":
        """Return a checked copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "MTLLoRAConfig":
        """Build from :meth:`to_dict`'s result; an unknown field is an error.

        Raises:
            ConfigError: a field is unknown or missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(f"every field must be known, got {unknown}; the fields are {sorted(known)}")
        if "task_names" not in fields:
            raise ConfigError("task_names must be given, got no such field; name the tasks in the order of ids")
        return cls(**fields)
