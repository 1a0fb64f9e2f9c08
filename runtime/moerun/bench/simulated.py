"""What `moesim` predicts for the runs of a bench."""

from __future__ import annotations

import tempfile
from pathlib import Path

from moerun.bench.run import Bench
from moerun.simulation import simulated_row


def simulated_tokens_per_s(bench: Bench, machine: str | Path) -> dict[str, float]:
    """What `moesim` predicts for the measured tokens, by policy: asked by its command.

    The simulator starts cold, too: a run of the warm-up alone is taken off. Raises RunError with
    its message where it fails.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="moerun-bench-") as folder:
        trace = Path(folder) / "forced.parquet"
        bench.routing.write_trace(trace, bench.generated.index)
        for policy in bench.schedule.policies:
            if policy.label in bench.results.refused:
                continue
            cold_s, all_s = (
                tokens / _simulate(bench, trace, policy.label, machine, tokens)
                for tokens in (1 + bench.schedule.warm_up, bench.schedule.forced_tokens)
            )
            found[policy.label] = bench.schedule.tokens / (all_s - cold_s)
    return found


def _simulate(bench: Bench, trace: Path, policy: str, machine: str | Path, tokens: int) -> float:
    """tokens/s of the first ``tokens``."""
    row = simulated_row(
        policy,
        trace,
        machine,
        slots=bench.slots,
        scope=bench.settings.scope,
        low_bytes=bench.low.record_bytes if bench.low else None,
        calibration=str(trace),  # as the bench counted them: over all forced tokens
        more=("--tokens", str(tokens), "--expert-bytes", str(bench.store.record_bytes)),
    )
    return float(row["tokens_per_s"])
