"""Routing traces of mixture-of-experts models: the format, reading and writing, statistics.

    trace = moeroute.open_trace("mixtral-like")       # a sample, a file or a URL
    experts = trace.array("experts")                  # uint16[n, K], by weight descending
    for one in moeroute.summarize(trace): print(one.name, one.parameter, one.value)

A trace has n rows, one for each (sequence, position, layer), with K experts of a layer's E. Column
``phase`` is PROMPT (0) or DECODE (1) in each row. Every function raises TraceError for a trace that
cannot be used; the message names file, row and column.

Importing the package is cheap: polars loads with the first trace read or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeroute.schema import DECODE as DECODE
    from moeroute.schema import PROMPT as PROMPT
    from moeroute.schema import Rows as Rows
    from moeroute.schema import TraceError as TraceError
    from moeroute.schema import TraceMeta as TraceMeta
    from moeroute.schema import TraceUsageError as TraceUsageError
    from moeroute.schema import prediction_column as prediction_column
    from moeroute.summary import Statistic as Statistic
    from moeroute.summary import summarize as summarize
    from moeroute.trace import Trace as Trace
    from moeroute.trace import open_trace as open_trace
    from moeroute.trace import sample_names as sample_names
    from moeroute.writer import TraceWriter as TraceWriter

# Where the names lie. Each is imported when it is first asked for, so that programs start at once.
_LAZY = {
    "DECODE": "moeroute.schema",
    "PROMPT": "moeroute.schema",
    "Rows": "moeroute.schema",
    "Statistic": "moeroute.summary",
    "Trace": "moeroute.trace",
    "TraceError": "moeroute.schema",
    "TraceMeta": "moeroute.schema",
    "TraceUsageError": "moeroute.schema",
    "TraceWriter": "moeroute.writer",
    "open_trace": "moeroute.trace",
    "prediction_column": "moeroute.schema",
    "sample_names": "moeroute.trace",
    "summarize": "moeroute.summary",
}

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


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
