"""What an import says about a recording's rows as a whole: what is missing, odd or unknown."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moeroute.importers.findings import Findings
from moeroute.importers.order import begins, token_of
from moeroute.importers.recording import Columns
from moeroute.schema import PROMPT, TraceMeta
from moeroute.sizes import unknown_sizes

_RESIDENCY_CODES = 3
_SUM_TOLERANCE = 0.01  # float16 weights


def tell_phases(keys: Columns, findings: Findings) -> None:
    """What is odd about which tokens are prompt."""
    prompt, sequence = keys["phase"] == PROMPT, keys["sequence"]
    if not prompt.any() and "phase" not in findings:
        findings.note("phase", "no prompt is recorded: every token is decode")
    elif prompt.all():
        findings.note("phase", "no decode step is recorded: every token is prompt")
    same = sequence[1:] == sequence[:-1]
    token = same & (keys["position"][1:] == keys["position"][:-1])
    split = token & (prompt[1:] != prompt[:-1])
    findings.count("phase", int(split.sum()), "tokens change phase between layers")
    resumed = np.unique(sequence[1:][same & ~token & prompt[1:] & ~prompt[:-1]])
    findings.count(
        "phase",
        len(resumed),
        "sequences have prompt tokens after decode (a second turn, or a prompt in parts)",
        of=len(begins(sequence)),
    )


def tell_positions(keys: Columns, findings: Findings) -> None:
    """Where tokens are missing between others, or before the first."""
    sequence, position = keys["sequence"], keys["position"].astype(np.int64)
    same = sequence[1:] == sequence[:-1]
    gaps = same & (np.diff(position) > 1)
    holed = len(np.unique(sequence[1:][gaps]))
    first = position[begins(sequence)]
    if holed:
        findings.note(
            "positions",
            f"gaps between tokens: {gaps.sum()}, in {holed} of {len(first)} sequences",
        )
    findings.count(
        "positions", int((first > 0).sum()), "sequences do not begin at 0", of=len(first)
    )


def tell_incomplete(keys: Columns, n_layers: int, findings: Findings) -> int:
    """Count the (token, layer) rows that are not there, and the layers that never are."""
    heads = begins(token_of(keys))
    layers = np.diff(np.append(heads, len(keys["layer"])))
    missing = n_layers * len(layers) - len(keys["layer"])
    findings.count(
        "incomplete",
        int((layers < n_layers).sum()),
        f"tokens lack layers: {missing} (token, layer) rows are missing",
        of=len(layers),
    )
    idle = sorted(set(range(n_layers)) - set(np.unique(keys["layer"]).tolist()))
    named = ", ".join(map(str, idle[:8])) + (", ..." if len(idle) > 8 else "")
    findings.count("layers", len(idle), f"layers never have a row: {named}", of=n_layers)
    return max(0, missing)


def tell_unknown(meta: TraceMeta, names: set[str], findings: Findings) -> None:
    """What of the trace's columns and the model's sizes the file does not have."""
    unknown = unknown_sizes(meta)
    if unknown:
        findings.note("sizes", f"unknown: {', '.join(unknown)} (--like gives them)")
    optional = {
        "weights": "weights",
        "token_id": "token ids",
        "router_logits": "router logits",
        "predicted_logits_1": "predictions of later gates",
    }
    absent = [words for name, words in optional.items() if name not in names]
    if absent:
        findings.note("absent", ", ".join(absent))


class WideTotals:
    """What batches of rows add up to that are too wide to be in memory together."""

    def __init__(self) -> None:
        self.rows = 0
        self.rising = 0
        self.off = 0
        self.odd_codes: set[int] = set()
        self.n_odd = 0

    def weights(self, rising: int, weights: NDArray[np.float32]) -> None:
        """Count a batch's weights, `rising` rows of which were put in another order."""
        self.rising += rising
        finite = np.isfinite(weights).all(axis=1)
        self.off += int((finite & (np.abs(weights.sum(axis=1) - 1) > _SUM_TOLERANCE)).sum())

    def residency(self, codes: NDArray[np.uint8]) -> None:
        """Count a batch's codes that have no meaning."""
        odd = codes >= _RESIDENCY_CODES
        self.n_odd += int(odd.sum())
        self.odd_codes |= set(np.unique(codes[odd]).tolist())

    def tell(self, findings: Findings, scale: float | None) -> None:
        """Say what was counted."""
        findings.count(
            "weights",
            self.rising,
            "rows had experts in another order: put in descending order of weight",
            of=self.rows,
        )
        scaled = "" if scale in (None, 1.0) else f" (the weight rule scales by {scale:g})"
        findings.count(
            "weights",
            self.off,
            f"rows do not sum to 1: kept as recorded, not renormalised{scaled}",
            of=self.rows,
        )
        named = ", ".join(map(str, sorted(self.odd_codes)[:8]))
        findings.count("residency", self.n_odd, f"codes of unknown meaning: {named}")
