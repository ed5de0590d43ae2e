"""Tables in Parquet files, by DuckDB, which is optional (extra [build])."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_booth.files import replacing


def read_parquet(file: Path) -> list[dict[str, Any]]:
    """Return a table's rows. ValueError: it is no Parquet file, or DuckDB is not installed."""
    duckdb = import_duckdb(file)
    try:
        table = duckdb.read_parquet(str(file))
        return [dict(zip(table.columns, values, strict=True)) for values in table.fetchall()]
    except duckdb.Error as error:
        raise ValueError(f"{file}: not a readable Parquet file ({error}); write it anew") from error


def write_parquet(lines: Path, file: Path, columns: dict[str, str]) -> None:
    """Write a file of JSON lines as a table; `columns`: DuckDB's type of each.

    ValueError: DuckDB is not installed. OSError: the file cannot be written, as on a full disk.
    """
    duckdb = import_duckdb(file)
    try:
        with replacing(file) as partial:
            table = duckdb.read_json(str(lines), format="newline_delimited", columns=columns)
            table.write_parquet(str(partial))
    except duckdb.Error as error:
        raise OSError(f"{file} cannot be written: {error}") from error


def import_duckdb(file: Path) -> Any:
    """Return the module. ValueError, naming the file that needs it: it is not installed."""
    try:
        import duckdb
    except ImportError as error:
        raise ValueError(
            f"duckdb is not installed, which reads and writes {file.name}; pip install dit-booth[build]"
        ) from error
    return duckdb
