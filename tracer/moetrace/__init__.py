"""Recording routing traces from live models.

    with moetrace.recording(model, "t.parquet"):      # any Mixtral-like model of transformers
        model.generate(...)

    moetrace.write_requests(                          # what vLLM returned
        "t.parquet", moetrace.vllm_requests(llm.generate(prompts)), model="Qwen/Qwen3-30B-A3B"
    )

Importing the package is cheap: torch loads with the first recording.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeroute.importers.requests import RoutedRequest as RoutedRequest
    from moeroute.importers.requests import vllm_requests as vllm_requests
    from moeroute.importers.requests import write_requests as write_requests

    from moetrace.live import LiveRecorder

__version__ = "0.1.0"
__all__ = ["RoutedRequest", "recording", "vllm_requests", "write_requests"]


def recording(
    model: Any,
    out: str | Path,
    *,
    horizon: int = 3,
    prediction: str | None = None,
    name: str | None = None,
) -> LiveRecorder:
    """A context manager that records every forward pass of a transformers model into a trace.

    `horizon` is how many layers ahead gates are applied (0: no predictions), `prediction` to what
    (see `moetrace record --help`), `name` what the trace calls the model. `LiveRecorder` says what
    becomes a sequence and what a prompt. Raises RunError where the model is no mixture of experts.
    """
    from moetrace.live import LiveRecorder

    return LiveRecorder(model, out, horizon=horizon, prediction=prediction, name=name)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moeroute.importers import requests

    return getattr(requests, name)
