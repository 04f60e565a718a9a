"""The formats that a data set can come in, and which reader takes each."""

from collections.abc import Mapping
from enum import StrEnum


class Format(StrEnum):
    """A file format."""

    CSV = "csv"
    """Comma-separated text with a header line."""
    JSON_LINES = "json_lines"
    """One JSON object a line."""
    PARQUET = "parquet"
    ARROW = "arrow"
    """Arrow's IPC stream."""
    NPZ = "npz"
    """A zip of NumPy arrays."""


CONTENT_TYPES: Mapping[str, Format] = {
    "text/csv": Format.CSV,
    "application/x-ndjson": Format.JSON_LINES,
    "application/jsonl": Format.JSON_LINES,
    "application/vnd.apache.parquet": Format.PARQUET,
    "application/x-parquet": Format.PARQUET,
    "application/vnd.apache.arrow.stream": Format.ARROW,
    "application/x-npz": Format.NPZ,
    "application/zip": Format.NPZ,
}
"""What `Content-Type` says → the format. Two names where both are in use."""
