"""Records out of Parquet in bounded memory: the needed columns, a few megabytes at a time, a bad value costing its own
record only.

What a page unpacks to is not seen from outside: a text of 10 MiB that stands once in a dictionary comes back in every
row. So the longest entry of each row group's dictionaries is looked up first (reading texts *as* dictionaries, where
it stands once), and batches are cut so that their texts fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.ingestion.row_groups import check_chunks
from pipeline.record import column_of, fields_found

BATCH_BYTES = 32 << 20
"""Texts of one batch, about: what its rows are cut by."""
BATCH_ROWS = 1024
MAX_VALUES = 1 << 26
"""Most values of one list column in a row group: absent ones take no room in the file, but they do in memory."""
MAX_CHUNK_BYTES = 256 << 20
"""From which size on a column of a row group is refused whose texts are too long on average: its pages, which are
unpacked whole, may have gigabytes."""
_READ_BYTES = 1 << 20
_BAD_VALUE = (ValueError, OverflowError, TypeError, KeyError, pa.ArrowException)
"""What the conversion of one value raises: no UTF-8, a year past 9999, an unknown time zone, a field twice."""


class Row(NamedTuple):
    """One row; ``error`` where it could not be read."""

    record: dict[str, Any]
    error: str | None = None


def parquet_rows(
    raw: Any,
    columns: Collection[str] | None,
    max_row_bytes: int,
    name: str,
    row_groups: tuple[int, int | None] = (0, None),
) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        raw: the open file.
        columns: the ones to read, of those that are there; None for all.
        max_row_bytes: a row with more is yielded with an error, without its values.
        name: of the file, for errors.
        row_groups: (first, last + 1) of those to read; None for all that follow.

    Raises:
        InputError: a column is there twice, or none of the asked ones is.
        OSError: it is no whole Parquet file.
    """
    try:
        file = pq.ParquetFile(raw, buffer_size=_READ_BYTES)
        wanted = _wanted(file.schema_arrow.names, columns, name)
        check_chunks(file)
        leaves = _leaves(file.metadata, wanted)
        as_dictionary = [leaf.path for leaf in leaves if leaf.has_dictionary]
        options = {"metadata": file.metadata, "buffer_size": _READ_BYTES}
        dictionaries = pq.ParquetFile(raw, read_dictionary=as_dictionary, **options)
        for number in range(file.metadata.num_row_groups)[slice(*row_groups)]:
            group = _Group(file.metadata.row_group(number), leaves, name, max_row_bytes)
            longest = _longest(dictionaries, number, wanted, as_dictionary)
            reader = dictionaries if group.may_burst(longest) else file
            for batch in reader.iter_batches(group.batch_rows(longest), row_groups=[number], columns=wanted):
                yield from _rows(batch, wanted, max_row_bytes)
    except InputError:
        raise
    except _BAD_VALUE as error:
        raise OSError(f"not a whole Parquet file: {error}") from error


class _Leaf(NamedTuple):
    """One column as it is stored: lists and structs have theirs below them."""

    number: int
    path: str
    has_dictionary: bool
    """Whether its texts stand in dictionaries, in every row group."""
    is_nested: bool
    width: int
    """Bytes of a value, where all have the same."""


class _Group:
    """What the metadata of a row group says about the memory that it takes.

    Raises:
        InputError: it takes more than any record may have.
    """

    def __init__(self, group: Any, leaves: Sequence[_Leaf], name: str, max_row_bytes: int) -> None:
        self._columns = [(leaf, group.column(leaf.number)) for leaf in leaves]
        self._rows = max(group.num_rows, 1)
        for leaf, chunk in self._columns:
            if leaf.is_nested and chunk.num_values > MAX_VALUES:
                raise InputError(
                    f"a row group may have {MAX_VALUES} values in the lists of {leaf.path!r}, {name} has "
                    f"{chunk.num_values}; write smaller row groups"
                )
            if chunk.total_uncompressed_size > max(self._rows * max_row_bytes, MAX_CHUNK_BYTES):
                raise InputError(
                    f"a record may have {max_row_bytes} bytes, those of {name} have "
                    f"{chunk.total_uncompressed_size // self._rows} on average in {leaf.path!r} alone; cut its texts"
                )

    def may_burst(self, longest: dict[str, int]) -> bool:
        """Whether lists of texts may unpack to much more than a batch: how many a row has is not known before."""
        return any(
            leaf.is_nested and longest.get(leaf.path, 0) * chunk.num_values > 4 * BATCH_BYTES
            for leaf, chunk in self._columns
        )

    def batch_rows(self, longest: dict[str, int]) -> int:
        """Return how many rows to read at a time so that they have some ``BATCH_BYTES``."""
        row_bytes = 1.0
        for leaf, chunk in self._columns:
            row_bytes += leaf.width + chunk.total_uncompressed_size / self._rows
            if not leaf.is_nested:
                row_bytes += longest.get(leaf.path, 0)
            if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a text may repeat all that came before it
                row_bytes += chunk.total_uncompressed_size
        return int(min(max(BATCH_BYTES // row_bytes, 1), BATCH_ROWS))


def _wanted(names: Sequence[str], columns: Collection[str] | None, name: str) -> list[str]:
    if double := sorted(column for column, count in Counter(names).items() if count > 1):
        raise InputError(f"a Parquet file must have each column once, {name} has {double} more than once; rename one")
    roots = None if columns is None else {column_of(path, names) for path in columns}
    wanted = [column for column in names if roots is None or column in roots]
    if columns is not None and not wanted:
        raise InputError(
            f"{name} must have a field that the task asks for ({sorted(columns)}), {fields_found(names, ())}; rename "
            "them in the file, or name its fields in the task"
        )
    return wanted


def _leaves(metadata: Any, wanted: Sequence[str]) -> list[_Leaf]:
    leaves = []
    for number in range(metadata.num_columns):
        column = metadata.schema.column(number)
        if any(column.path == name or column.path.startswith(f"{name}.") for name in wanted):
            chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
            dictionary = column.physical_type == "BYTE_ARRAY" and all(
                any("DICTIONARY" in encoding for encoding in chunk.encodings)
                and not any("DELTA" in encoding for encoding in chunk.encodings)
                for chunk in chunks
            )
            width = max(int(column.length or 0), 8)
            leaves.append(_Leaf(number, column.path, dictionary, column.path not in wanted, width))
    return leaves


def _longest(reader: Any, group: int, wanted: Sequence[str], paths: Sequence[str]) -> dict[str, int]:
    """Return the longest dictionary entry of each text column in a row group, in bytes: with the first row comes its
    whole dictionary."""
    columns = [name for name in wanted if any(path == name or path.startswith(f"{name}.") for path in paths)]
    if not columns:
        return {}
    batch = next(reader.iter_batches(batch_size=1, row_groups=[group], columns=columns), None)
    if batch is None:
        return {}
    found = dict[str, int]()
    for name in columns:
        longest = max((int(_sizes(words).max(initial=0)) for words in _dictionaries(batch.column(name))), default=0)
        found |= {path: longest for path in paths if path == name or path.startswith(f"{name}.")}
    return found


def _dictionaries(array: Any) -> Iterator[Any]:
    """Yield the dictionaries in an array, at any depth."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield array.dictionary
    elif pa.types.is_struct(kind):
        for child in array.flatten():
            yield from _dictionaries(child)
    elif pa.types.is_map(kind):
        yield from _dictionaries(array.keys)
        yield from _dictionaries(array.items)
    elif pa.types.is_nested(kind):
        yield from _dictionaries(array.values)


def _rows(batch: Any, wanted: Sequence[str], max_row_bytes: int) -> Iterator[Row]:
    columns = {name: batch.column(name) for name in wanted}
    sizes = sum((_sizes(column) for column in columns.values()), np.zeros(batch.num_rows, dtype=np.int64))
    for start, stop in _stretches(sizes, max_row_bytes):
        if stop == start + 1 and sizes[start] > max_row_bytes:
            yield Row({}, f"record is longer than {max_row_bytes} bytes")
            continue
        values, bad = {}, dict[int, str]()
        for name, column in columns.items():
            values[name] = _values(column.slice(start, stop - start), name, bad)
        for at, row in enumerate(zip(*values.values(), strict=True)):
            yield Row(dict(zip(values, row, strict=True)), bad.get(at))


def _stretches(sizes: np.ndarray, max_row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the rows to convert together: rows that are too long stand alone."""
    if int(sizes.sum()) <= max_row_bytes:
        yield 0, len(sizes)
        return
    start = held = 0
    for at, size in enumerate(sizes.tolist()):
        if at > start and (held + size > max_row_bytes):
            yield start, at
            start, held = at, 0
        held += size
    if start < len(sizes):
        yield start, len(sizes)


def _values(column: Any, name: str, bad: dict[int, str]) -> list[Any]:
    """Return a column's values; those that cannot be converted are None, and ``bad`` tells why, by row."""
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except _BAD_VALUE:
        values: list[Any] = []
        for at in range(len(column)):
            try:
                values.append(column[at].as_py(maps_as_pydicts="strict"))
            except _BAD_VALUE as error:
                values.append(None)
                what = "valid UTF-8" if isinstance(error, UnicodeDecodeError) else f"a valid {column.type}"
                bad.setdefault(at, f"field {name!r} is not {what}")
        return values


def _sizes(array: Any) -> np.ndarray:
    """Return how many bytes each row's value has as plain Python, about."""
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return _sizes(array.storage)
    if pa.types.is_dictionary(kind):
        places = array.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        known = _sizes(array.dictionary)
        return known[places] if len(known) else np.zeros(len(array), dtype=np.int64)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return _sizes(array.cast(pa.large_binary()))
    if any(
        test(kind)
        for test in (pa.types.is_string, pa.types.is_binary, pa.types.is_large_string, pa.types.is_large_binary)
    ):
        return np.asarray(pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        children = [array.keys, array.items] if pa.types.is_map(kind) else [array.values]
        sizes = sum((_sizes(child) for child in children), np.zeros(len(children[0]), dtype=np.int64)) + 1
        ends = np.concatenate([[0], np.cumsum(sizes)])
        offsets = array.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
        return np.asarray(ends[offsets[1:]] - ends[offsets[:-1]])
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        ends = np.concatenate([[0], np.cumsum(_sizes(array.values) + 1)])
        starts, counts = (part.to_numpy(zero_copy_only=False).astype(np.int64) for part in (array.offsets, array.sizes))
        return np.asarray(ends[starts + counts] - ends[starts])
    if pa.types.is_fixed_size_list(kind):
        flat = _sizes(array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size))
        return np.asarray(flat.reshape(len(array), kind.list_size).sum(axis=1) + kind.list_size)
    if pa.types.is_struct(kind):
        return np.asarray(sum((_sizes(child) for child in array.flatten()), np.full(len(array), kind.num_fields)))
    return np.full(len(array), max(kind.bit_width // 8, 8) if _has_width(kind) else 16, dtype=np.int64)


def _has_width(kind: Any) -> bool:
    try:
        return bool(kind.bit_width)
    except ValueError:
        return False
