"""What an MTL-LoRA adapter is made of; checked where it is made, saved with every adapter."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mtl_lora.errors import ConfigError
from mtl_lora.patterns import matching_key

__all__ = ["CONFIG_VERSION", "MTLLoRAConfig"]

CONFIG_VERSION = 1
"""Version of the saved form; a reader refuses a version that it does not know."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_expression(text: str, rule: str, remedy: str) -> None:
    try:
        re.compile(text)
    except re.error as error:
        raise ConfigError(f"{rule}, got {text!r}: {error}; {remedy}") from error


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
            full path, or ``"all-linear"`` for every linear layer but the output head. Also ``"ffn"``: every linear
            layer of the numbered blocks that does not stand in their attention.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead (arXiv 2312.03732).
        layers_to_transform: numbers of the layers (blocks) whose targets are adapted; empty for all. Only with names,
            as in PEFT.
        layers_pattern: what the list of layers is called (``layers``, ``h``); empty for whatever is numbered first.
        rank_pattern: other ranks than ``r``, by name or regular expression on the last parts of a path; the first key
            that matches counts, as in PEFT.
        alpha_pattern: other numerators than ``lora_alpha``, likewise.
        mixing_spread: half the width of the uniform distribution that the logits w / τ start from; None for the
            authors' Kaiming-uniform w, which is a spread of 5.8 at τ = 0.1 and N = 3. Small values start near an even
            mixture; 0 would keep the up-projections alike for ever.
        learn_temperature: learn a factor on τ, one a layer, for all tasks.
        temperature_start: τ falls (or rises) from here to ``temperature`` in the course of the training, by equal
            factors; None for a constant one.
        modules_to_save: names of modules that train in full and are saved with the adapter.
        bias: which biases train: ``"none"``, ``"lora_only"`` (of adapted layers) or ``"all"``.
        train_layer_norms: whether every normalisation layer trains, as in the authors' image-text runs.
        extras_within: paths of the modules inside of which ``bias: all`` and ``train_layer_norms`` reach; none for the
            whole base.
        head_classes: for a base that answers by states: rows of each task's classification head
            (:class:`mtl_lora.heads.TaskHeads`), in the order of the tasks; none for no heads.

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
    layers_to_transform: Sequence[int] | int = ()
    layers_pattern: Sequence[str] | str = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    mixing_spread: float | None = None
    learn_temperature: bool = False
    temperature_start: float | None = None
    modules_to_save: Sequence[str] = ()
    bias: Literal["none", "lora_only", "all"] = "none"
    train_layer_norms: bool = False
    extras_within: Sequence[str] = ()
    head_classes: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_names", _as_names(self.task_names, "task_names"))
        object.__setattr__(self, "modules_to_save", _as_names(self.modules_to_save, "modules_to_save"))
        object.__setattr__(self, "extras_within", _as_names(self.extras_within, "extras_within"))
        object.__setattr__(self, "head_classes", tuple(self.head_classes))
        if self.head_classes and (len(self.head_classes) != len(self.task_names) or min(self.head_classes) < 1):
            raise ConfigError(
                f"head_classes must give each of {len(self.task_names)} tasks at least 1 row, got "
                f"{list(self.head_classes)}; leave it out where tasks have no heads"
            )
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _as_names(self.target_modules, "target_modules"))
        self._check_tasks()
        self._check_patterns()
        for field in ("use_rslora", "learn_temperature", "train_layer_norms"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field} must be true or false, got {getattr(self, field)!r}; false is usual")
        for field in ("r", "num_up_projections"):
            value = getattr(self, field)
            if not _is_count(value):
                raise ConfigError(f"{field} must be an integer >= 1, got {value!r}; the paper's scripts use 8 and 3")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"temperature must be > 0, got {self.temperature}; the paper's scripts use 0.1")
        self._check_start()
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
            _check_expression(
                self.target_modules,
                "target_modules as text must be 'all-linear', 'ffn' or a regular expression",
                "names stand in a list",
            )

    def _check_start(self) -> None:
        for field in ("mixing_spread", "temperature_start"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{field} must be > 0 or None, got {value}; at 0 nothing tells up-projections apart")
        if self.learn_temperature and self.temperature_start is not None:
            raise ConfigError(
                f"a temperature is learned or moved by plan, got learn_temperature with temperature_start "
                f"{self.temperature_start}; choose one"
            )

    def _check_patterns(self) -> None:
        numbers = self.layers_to_transform
        numbers = (numbers,) if isinstance(numbers, int) else tuple(numbers)
        if any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in numbers):
            raise ConfigError(f"layers_to_transform must hold integers >= 0, got {list(numbers)}; the first layer is 0")
        patterns = self.layers_pattern
        patterns = (patterns,) if isinstance(patterns, str) and patterns else tuple(patterns)
        object.__setattr__(self, "layers_to_transform", numbers)
        object.__setattr__(self, "layers_pattern", patterns)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))
        if numbers and isinstance(self.target_modules, str):
            raise ConfigError(
                "layers_to_transform needs target_modules as a list of names, as in PEFT, got "
                f"{self.target_modules!r}; list the names, or let the expression say the layers"
            )
        if patterns and not numbers:
            raise ConfigError(f"layers_pattern needs layers_to_transform, got {list(patterns)} alone; say which layers")
        for field in ("layers_pattern", "rank_pattern", "alpha_pattern"):
            for key in getattr(self, field):
                _check_expression(key, f"{field} must hold names or regular expressions", "write a name")
        for key, value in self.rank_pattern.items():
            if not _is_count(value):
                raise ConfigError(
                    f"rank_pattern must hold integers >= 1, got {value!r} for {key!r}; leave it out for r"
                )
        for key, alpha in self.alpha_pattern.items():
            if isinstance(alpha, bool) or not (math.isfinite(alpha) and alpha > 0):
                raise ConfigError(
                    f"alpha_pattern must hold numbers > 0, got {alpha!r} for {key!r}; leave it out for lora_alpha"
                )

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

    def for_layer(self, path: str) -> "MTLLoRAConfig":
        """Return the configuration of one layer: its rank and alpha by the patterns, none left.

        Args:
            path: of the layer in the base.
        """
        rank, alpha = matching_key(self.rank_pattern, path), matching_key(self.alpha_pattern, path)
        return self.replace(
            r=self.r if rank is None else self.rank_pattern[rank],
            lora_alpha=self.lora_alpha if alpha is None else self.alpha_pattern[alpha],
            rank_pattern={},
            alpha_pattern={},
        )

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
            ConfigError: a field is unknown or missing, or holds a value of another kind.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(f"every field must be known, got {unknown}; the fields are {sorted(known)}")
        if "task_names" not in fields:
            raise ConfigError("task_names must be given, got no such field; name the tasks in the order of ids")
        try:
            return cls(**fields)
        except ConfigError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as error:  # as a value of another kind ends
            raise ConfigError(f"every field must hold a value of its kind: {error}; see {cls.__name__}") from error
