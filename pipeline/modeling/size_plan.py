"""What the methods' adapters count at a size asked for, as values; needs no torch."""

from __future__ import annotations

from pipeline.contracts import Contract
from pipeline.modeling.adapter_config import Method

TOLERANCE = 0.03
"""A size counts as met within it; ranks are whole numbers, so small adapters may miss it."""


class MethodSize(Contract):
    """One method at the size asked for, or as near as it comes."""

    method: Method
    r: int
    parameters: int
    """Of the adapter's layers; what all methods have in common, such as heads, is not counted."""
    share: float
    """Of the base's parameters."""
    ratio: float
    """Of the parameters to those asked for."""

    @property
    def is_met(self) -> bool:
        """Whether the size is that asked for, within :data:`TOLERANCE`."""
        return abs(self.ratio - 1) <= TOLERANCE


class AdapterSizes(Contract):
    """What ``adapter.size`` asks for, and what each method makes of it."""

    like: Method
    like_r: int
    parameters: int
    """Asked for."""
    tasks: int
    trained: MethodSize
    """The method that is trained."""
    is_kept: bool
    """Whether its rank is that of the adapter that training begins with."""
    methods: tuple[MethodSize, ...]
    """Every method at the rank that comes nearest, with the same other settings."""

    @property
    def remark(self) -> str:
        """What a person must know of the size that is trained; empty where it is the one asked for."""
        size = self.trained
        if self.is_kept:
            return (
                f"adapter.size: rank {size.r} is that of the adapter that training begins with, and stays; with "
                f"{self.tasks} tasks it has {size.ratio:.3f} of the parameters asked for"
            )
        if size.is_met:
            return ""
        return (
            f"WARNING: adapter.size asks for {self.parameters:,} parameters within {TOLERANCE:.0%}, the nearest that "
            f"{size.method} comes is rank {size.r} with {size.parameters:,}, {size.ratio:.3f} of it; ask for a larger "
            "size, or compare at this one"
        )
