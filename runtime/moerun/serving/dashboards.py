"""The same counts under the names that dashboards made for vLLM read.

https://docs.vllm.ai/en/latest/usage/metrics.html: names, labels and buckets (of seconds).
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from moerun.serving.worker import Ended

LABELS = ("model_name", "engine")
FIRST_TOKEN_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640)
TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)


class DashboardMetrics:
    """vLLM's metrics of one server, as far as they have a meaning here."""

    def __init__(self, model: str, registry: CollectorRegistry) -> None:
        def made(kind: Any, name: str, help: str, **more: Any) -> Any:
            metric = kind(f"vllm:{name}", help, LABELS, registry=registry, **more)
            return metric.labels(model, "0")

        self._running = made(Gauge, "num_requests_running", "Answers in progress.")
        self._waiting = made(Gauge, "num_requests_waiting", "Requests that wait for their turn.")
        self._prompt = made(Counter, "prompt_tokens", "Tokens of prompts.")
        self._generated = made(Counter, "generation_tokens", "Tokens generated.")
        self._queries = made(Counter, "prefix_cache_queries", "Tokens looked for in a kept cache.")
        self._hits = made(Counter, "prefix_cache_hits", "Tokens found in a kept cache.")
        self._first_s = made(
            Histogram,
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=FIRST_TOKEN_S,
        )
        self._between_s = made(
            Histogram,
            "inter_token_latency_seconds",
            "From a token to the next.",
            buckets=TOKEN_S,
        )
        self._request_s = made(
            Histogram,
            "e2e_request_latency_seconds",
            "From a request's arrival to its last token.",
            buckets=REQUEST_S,
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers ended, by how.",
            (*LABELS, "finished_reason"),
            registry=registry,
        )
        self._model = model
        for reason in ("stop", "length", "abort"):
            self._success.labels(model, "0", reason)

    def set_requests(self, running: int, waiting: int) -> None:
        """The present numbers of answers in progress and of requests that wait."""
        self._running.set(running)
        self._waiting.set(waiting)

    def generated(self, ended: Ended) -> None:
        """Count a generation that has ended."""
        work, token_s = ended.work, ended.token_s
        self._prompt.inc(work.prompt_tokens)
        self._generated.inc(work.new_tokens)
        self._queries.inc(work.prompt_tokens)
        self._hits.inc(work.cached_tokens)
        if token_s:
            self._first_s.observe(token_s[0] - ended.submitted_s)
            self._request_s.observe(time.perf_counter() - ended.submitted_s)
        for before, after in pairwise(token_s):
            self._between_s.observe(after - before)
        if ended.ending != "error":
            reason = "abort" if ended.ending == "cancelled" else ended.ending
            self._success.labels(self._model, "0", reason).inc()
