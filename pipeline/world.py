"""The one owner of rank and worker arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Where one reader stands: data-parallel rank and loader worker.

    Raises:
        ValueError: an index that is not within its count.
    """

    rank: int
    num_ranks: int
    worker: int = 0
    num_workers: int = 1

    def __post_init__(self) -> None:
        for index, count, what in (
            (self.rank, self.num_ranks, "rank"),
            (self.worker, self.num_workers, "worker"),
        ):
            if not 0 <= index < count:
                raise ValueError(f"{what} must be in [0, {count}), got {index}; count {what}s from zero")

    def slice_of(self, global_batch_size: int) -> slice:
        """Return this rank's contiguous part of a global batch.

        Raises:
            ValueError: the ranks do not divide the batch.
        """
        if global_batch_size % self.num_ranks:
            raise ValueError(
                f"global_batch_size must be a multiple of the number of ranks, got {global_batch_size} samples "
                f"for {self.num_ranks} ranks; choose a multiple of {self.num_ranks}"
            )
        rows = global_batch_size // self.num_ranks
        return slice(self.rank * rows, (self.rank + 1) * rows)
