"""Rows and embeddings as the columns of a parquet file.

Legend: I instructions, N rows, D numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pe.data.records import DataError, Record

Embeddings = npt.NDArray[Any]
Stored = Literal["float32", "float16", "int8"]
"""How an embedding stands in a column; int8 has a scale beside it, by which it is multiplied."""


def table_of(rows: Sequence[Record], where: str, schema: pa.Schema | None = None) -> pa.Table:
    """The rows as columns, those of `schema` or all that any row has; what a row lacks is null.

    Raises:
        DataError: a column holds values of two types, or such as Arrow does not know; `where` says of which rows.
    """
    try:
        return pa.Table.from_struct_array(pa.array(rows, type=None if schema is None else pa.struct(list(schema))))
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise DataError(f"{where}: a column up to here cannot be written as parquet: {error}") from error


def column_names(instructions: Sequence[str]) -> list[str]:
    """`embedding`, or `embedding_0`, `embedding_1`, ... for several instructions."""
    return ["embedding"] if len(instructions) == 1 else [f"embedding_{place}" for place in range(len(instructions))]


def stored_fields(names: Sequence[str], precision: Stored, size: int) -> list[pa.Field]:
    """What `stored` makes of embeddings of these names and this size: each a column, of int8 with its scales behind."""
    found = []
    for name in names:
        found.append(pa.field(name, pa.list_(pa.from_numpy_dtype(np.dtype(precision)), size)))
        if precision == "int8":
            found.append(pa.field(f"{name}_scale", pa.float32()))
    return found


def shortened(embeddings: Embeddings, dimensions: int | None) -> Embeddings:
    """`[..., D]` cut to their first numbers, of length one again."""
    if dimensions is None:
        return embeddings
    cut = embeddings[..., :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def vectors(rows: Embeddings) -> pa.FixedSizeListArray:
    """`[N, D]` as a column of lists of D numbers."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).reshape(-1)), rows.shape[-1])


def stored(rows: Embeddings, precision: Stored) -> list[pa.Array]:
    """The columns of `[N, D]` float32; of int8 its own scale for each row, so that no row depends on another."""
    if precision != "int8":
        return [vectors(rows.astype(precision))]
    scale = np.maximum(np.abs(rows).max(axis=-1), np.finfo(np.float32).tiny) / 127
    return [vectors(np.rint(rows / scale[:, None]).astype(np.int8)), pa.array(scale.astype(np.float32))]
