"""The row groups of a Parquet file, by its footer alone: what one worker reads of a large file."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def row_group_stretches(raw: Any, least_bytes: int) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the row groups to read together, so that each stretch has so many compressed bytes.

    Raises:
        OSError: it is no whole Parquet file.
    """
    try:
        file = pq.ParquetFile(raw)
        check_chunks(file)
    except pa.ArrowException as error:
        raise OSError(f"not a whole Parquet file: {error}") from error
    metadata = file.metadata
    found, start, held = [], 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        held += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if held >= least_bytes or number == metadata.num_row_groups - 1:
            found.append((start, number + 1))
            start, held = number + 1, 0
    return found


def rows_before(raw: Any, row_group: int) -> int:
    """Return how many rows stand before a row group.

    Raises:
        OSError: it is no whole Parquet file.
    """
    if not row_group:
        return 0
    metadata = _metadata(raw)
    return sum(metadata.row_group(number).num_rows for number in range(row_group))


def check_chunks(file: pq.ParquetFile) -> None:
    """Refuse what no chunk of a column can say of itself, before its metadata is asked for: that ends the process.

    Opening every chunk, and reading none, raises what it finds. ``iter_batches`` of the file itself takes no 0. A
    ``ColumnChunkMetaData`` that raised instead would replace this.
    """
    for number in range(file.metadata.num_row_groups):
        next(file.reader.iter_batches(0, [number], column_indices=None, use_threads=False), None)


def _metadata(raw: Any) -> Any:
    try:
        return pq.read_metadata(raw)
    except pa.ArrowException as error:
        raise OSError(f"not a whole Parquet file: {error}") from error
