"""Text out of Parquet files, by pyarrow, which is installed only where somebody needs it."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3_train.data.compression import Damaged
from dsv3_train.errors import UserError

_ROWS_AT_ONCE = 64


def values(path: str, column: str) -> Iterator[object]:
    """The values of a column, row by row: strings, None where a row has none.

    Raises:
        UserError: pyarrow is not installed.
        Damaged: the file is no sound Parquet, or has no such column of strings.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'dsv3-train[parquet]'") from None
    try:
        with arrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                raise Damaged(f"no column {column!r} (it has {', '.join(schema.names[:8])}; see --text-key)")
            kind = schema.field(column).type
            inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
            if not (arrow.types.is_string(inner) or arrow.types.is_large_string(inner)):
                raise Damaged(f"column {column!r} holds {kind}, not strings")
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise Damaged(f"damaged Parquet ({' '.join(str(error).split())})") from None
