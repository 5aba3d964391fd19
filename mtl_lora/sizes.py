"""Which rank gives a method as many trainable parameters as another one has.

Parameters are counted by building the method's own layers, one of each size, on the meta device: no weight is
allocated, and no count is written a second time. What all methods share (heads, biases, modules to save) is left out.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from mtl_lora.baselines import METHODS
from mtl_lora.config import MTLLoRAConfig
from mtl_lora.errors import ConfigError
from mtl_lora.layer import linear_sizes
from mtl_lora.targets import find_targets

__all__ = ["Size", "TargetShapes", "count_parameters", "solve_size", "target_shapes"]

TargetShapes = Counter[tuple[int, int]]
"""How many targets a base has of each (in, out)."""
_MOST = 1 << 16
"""No rank is looked for above it."""


@dataclass(frozen=True)
class Size:
    """A method at the rank that comes nearest to a number of parameters.

    Args:
        method: a key of :data:`mtl_lora.baselines.METHODS`.
        r: its rank.
        parameters: of all its layers.
        ratio: of them to the number asked for.
    """

    method: str
    r: int
    parameters: int
    ratio: float


def target_shapes(base: nn.Module, config: MTLLoRAConfig) -> TargetShapes:
    """Return the sizes of the layers that a configuration adapts.

    Args:
        base: any model, on the meta device too.
        config: says which layers.

    Raises:
        TargetError: a target matches nothing, or what cannot be adapted.
    """
    return Counter(linear_sizes(base.get_submodule(path)) for path in find_targets(base, config))


def count_parameters(method: str, config: MTLLoRAConfig, shapes: TargetShapes) -> int:
    """Return how many parameters a method's adapter has; every target of the rank ``config.r``.

    Args:
        method: a key of :data:`mtl_lora.baselines.METHODS`.
        config: of the adapter; its targets and patterns are not read.
        shapes: from :func:`target_shapes`.

    Raises:
        ConfigError: the method is unknown, or cannot have this rank.
    """
    if method not in METHODS:
        raise ConfigError(f"method must be one of {sorted(METHODS)}, got {method!r}; 'mtl_lora' is this library's own")
    plain = MTLLoRAConfig(
        config.task_names,
        r=config.r,
        num_up_projections=config.num_up_projections,
        transform=config.transform,
        learn_temperature=config.learn_temperature,
        target_modules=("0",),
    )
    return sum(number * _count_of_one(method, plain, *shape) for shape, number in shapes.items())


def _count_of_one(method: str, config: MTLLoRAConfig, in_features: int, out_features: int) -> int:
    base = nn.Sequential(nn.Linear(in_features, out_features, bias=False, device="meta"))
    return METHODS[method](base, config).count_parameters()[0]


def solve_size(method: str, config: MTLLoRAConfig, shapes: TargetShapes, parameters: int) -> Size:
    """Return a method at the rank whose number of parameters is the nearest to one asked for.

    The number grows with the rank for every method, so the two ranks around it decide; of equals the smaller.

    Args:
        method: a key of :data:`mtl_lora.baselines.METHODS`.
        config: its other settings; the tasks count, ``r`` does not.
        shapes: from :func:`target_shapes`.
        parameters: asked for, at least 1.

    Raises:
        ConfigError: the method is unknown, or the rank would be above any use.
    """

    def count(r: int) -> int:
        return count_parameters(method, config.replace(r=r), shapes)

    low = high = least_rank(method, config)
    while count(high) < parameters:
        low, high = high, 2 * high
        if high > _MOST:
            raise ConfigError(f"a size must be reached at a rank of at most {_MOST}, got {parameters:,}; ask for less")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    best = min((low, high), key=lambda r: abs(count(r) - parameters))
    found = count(best)
    return Size(method, best, found, found / parameters)


def least_rank(method: str, config: MTLLoRAConfig) -> int:
    """Return the smallest rank that a method can have: MoELoRA's experts share theirs, each needs one."""
    return config.num_up_projections if method == "moelora" else 1
