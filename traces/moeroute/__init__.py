"""Routing traces of mixture-of-experts models: the format, reading and writing, statistics.

    trace = moeroute.open_trace("mixtral-like")       # a sample, a file or a URL
    experts = trace.array("experts")                  # uint16[n, K], by weight descending
    for one in moeroute.summarize(trace): print(one.name, one.parameter, one.value)

A trace has n rows, one for each (sequence, position, layer), with K experts of a layer's E. Column
``phase`` is PROMPT (0) or DECODE (1) in each row. Every function raises TraceError for a trace that
cannot be used; the message names file, row and column.

Importing the package is cheap: polars loads with the first trace read or written.
"""

from moeroute.schema import (
    DECODE,
    PROMPT,
    Rows,
    TraceError,
    TraceMeta,
    TraceUsageError,
    prediction_column,
)
from moeroute.summary import Statistic, summarize
from moeroute.trace import Trace, open_trace, sample_names
from moeroute.writer import TraceWriter

__all__ = [
    "DECODE",
    "PROMPT",
    "Rows",
    "Statistic",
    "Trace",
    "TraceError",
    "TraceMeta",
    "TraceUsageError",
    "TraceWriter",
    "open_trace",
    "prediction_column",
    "sample_names",
    "summarize",
]
