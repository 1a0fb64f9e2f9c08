"""Routing traces of mixture-of-experts models: the format, reading and writing, statistics.

Importing the package is cheap: polars loads with the first trace read or written.
"""

from moeroute.schema import (
    DECODE,
    PROMPT,
    Rows,
    TraceError,
    TraceMeta,
    prediction_column,
)
from moeroute.trace import Trace, open_trace, sample_names
from moeroute.writer import TraceWriter

__all__ = [
    "DECODE",
    "PROMPT",
    "Rows",
    "Trace",
    "TraceError",
    "TraceMeta",
    "TraceWriter",
    "open_trace",
    "prediction_column",
    "sample_names",
]
