"""What the server counts, in the text format that Prometheus reads."""

from __future__ import annotations

from moepolicy.counts import MASSES
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from moerun.serving.dashboards import DashboardMetrics
from moerun.serving.worker import Ended, GenerationWorker

CONTENT_TYPE = CONTENT_TYPE_LATEST
WAITS_S = (0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """One server's metrics; ``model`` and ``policy`` label the one that says what runs."""

    def __init__(self, model: str, policy: str) -> None:
        # Their samples double the page and nobody asks for them.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"moerun_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"moerun_{name}", help, labels, registry=registry)

        gauge("info", "What runs.", "model", "policy").labels(model, policy).set(1)
        self._requests = counter("requests", "HTTP requests answered.", "endpoint", "status")
        self._generations = counter("generations", "Generations ended, by how.", "ending")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter(
            "cached_prompt_tokens", "Of these, tokens not read: their keys and values were kept."
        )
        self._new_tokens = counter("generated_tokens", "Tokens generated.")
        self._decoded_tokens = counter(
            "decoded_tokens", "Tokens generated after the first of each answer."
        )
        self._decode_s = counter("decode_seconds", "Time that the decoded tokens took.")
        self._first_s = Histogram(
            "moerun_first_token_seconds",
            "From the start of a generation to its first token.",
            buckets=WAITS_S,
            registry=registry,
        )
        self._rate = gauge("tokens_per_second", "Decoding speed of the last answer.")
        self._passes = gauge("decode_passes", "Passes that decoded, with --max-batch.")
        self._rows = gauge("decode_rows", "Tokens that those passes took.")
        self._running = gauge("running", "Answers in progress.")
        self._queue = gauge("queue_length", "Requests that wait for their turn.")
        self._queue_limit = gauge("queue_limit", "How many may wait.")
        self._busy = gauge("busy", "1 while a generation is in progress.")
        self._experts = counter(
            "expert_requests", "Experts wanted, by where they were: hit, late, miss.", "outcome"
        )
        self._loads = counter("expert_loads", "Experts copied, by why: demand, prefetch.", "reason")
        self._useless = counter("useless_prefetches", "Experts prefetched and evicted unused.")
        self._bytes = counter("loaded_bytes", "Bytes of the experts copied.")
        self._stall_s = counter("stall_seconds", "Time that compute waited for experts.")
        self._decide_s = counter(
            "decide_seconds", "Time of the policy, with the state machine that asks it."
        )
        self._failed = gauge("policy_failed", "1 where the policy failed and LRU went on.")
        self._gate_mass = counter(
            "gate_weight",
            "The gates' weight of the experts wanted, where a policy may change it.",
        )
        self._changed_mass = counter(
            "changed_gate_weight",
            "Of that, what a lossy policy changed, by how: skipped, substituted, low, rerouted.",
            "how",
        )
        self._dashboards = DashboardMetrics(model, registry)
        self._show_zeros()

    def _show_zeros(self) -> None:
        """Every sample is there from the start, or its rate is unknown until the second one."""
        for outcome in ("hit", "late", "miss"):
            self._experts.labels(outcome)
        for reason in ("demand", "prefetch"):
            self._loads.labels(reason)
        for ending in ("stop", "length", "cancelled", "error"):
            self._generations.labels(ending)
        for name in MASSES:
            self._changed_mass.labels(name.removesuffix("_mass"))

    def answered(self, endpoint: str, status: int) -> None:
        """Count an answer to a request, by endpoint and HTTP status."""
        self._requests.labels(endpoint, str(status)).inc()

    def generated(self, ended: Ended) -> None:
        """Count a generation: its ending, tokens, times and the counters of its experts."""
        work = ended.work
        self._dashboards.generated(ended)
        self._generations.labels(ended.ending).inc()
        self._prompt_tokens.inc(work.prompt_tokens)
        self._cached_tokens.inc(work.cached_tokens)
        self._new_tokens.inc(work.new_tokens)
        self._decoded_tokens.inc(work.decoded_tokens)
        self._decode_s.inc(work.decode_s)
        if work.answers:
            self._first_s.observe(work.prompt_s)
        if work.decoded_tokens:
            self._rate.set(work.tokens_per_s)
        totals = work.totals
        self._experts.labels("hit").inc(totals.hits)
        self._experts.labels("late").inc(totals.late)
        self._experts.labels("miss").inc(totals.misses)
        self._loads.labels("demand").inc(totals.loads - totals.prefetches)
        self._loads.labels("prefetch").inc(totals.prefetches)
        self._useless.inc(totals.useless_prefetches)
        self._bytes.inc(totals.bytes_loaded)
        self._stall_s.inc(totals.stall_s)
        self._decide_s.inc(totals.decide_s)
        self._gate_mass.inc(totals.gate_mass)
        for name in MASSES:
            self._changed_mass.labels(name.removesuffix("_mass")).inc(getattr(totals, name))

    def render(self, worker: GenerationWorker) -> bytes:
        """The present values, in the text format of Prometheus."""
        self._queue.set(worker.waiting)
        self._queue_limit.set(worker.waiting_limit)
        self._busy.set(worker.busy)
        self._running.set(worker.running)
        self._passes.set(worker.passes)
        self._rows.set(worker.rows)
        self._failed.set(worker.policy_failed)
        self._dashboards.set_requests(worker.running, worker.waiting)
        text: bytes = generate_latest(self._registry)
        return text
