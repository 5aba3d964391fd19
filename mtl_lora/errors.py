"""The errors of this library: each message states the rule, the value that broke it, and the remedy."""

__all__ = [
    "AdapterFileError",
    "BaseMismatchError",
    "ConfigError",
    "ExportMismatchError",
    "FrozenExpertsWarning",
    "MTLLoRAError",
    "RoutingError",
    "TargetError",
    "TaskError",
]


class MTLLoRAError(ValueError):
    """Base of every error that this library raises on purpose."""


class ConfigError(MTLLoRAError):
    """A configuration value is outside what the method allows."""


class TargetError(MTLLoRAError):
    """A target module matches nothing, or matches a module that cannot be adapted."""


class RoutingError(MTLLoRAError):
    """The task ids do not fit the tasks, or do not fit the rows that a layer sees."""


class TaskError(MTLLoRAError):
    """A task name is unknown, or already in use."""


class AdapterFileError(MTLLoRAError):
    """A saved adapter is incomplete, has surplus tensors, or has another format."""


class BaseMismatchError(AdapterFileError):
    """The adapter was trained on another base model than the one at hand."""


class ExportMismatchError(MTLLoRAError):
    """An exported adapter does not reproduce the model that it was exported from."""


class FrozenExpertsWarning(UserWarning):
    """A base holds experts as stacked parameters, which no adapter reaches: they stay as they are."""
