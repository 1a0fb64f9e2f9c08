"""What was tried for foresight's start and for foresight-ahead, on development stretches alone.

    python benchmarks/research_tries.py wikitext=wiki.parquet code=code.parquet \
        gpt-oss-20b=gpt-oss-20b.parquet qwen3-30b=qwen3-30b.parquet --out tries.md

Any of the traces may be left out. Two tables: hit ratios of eviction alone, in points beyond
foresight without recency, and simulated tokens/s of fetching, in % beyond foresight-bypass without
recency. Nothing is drawn: a second run gives the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from moepolicy import PolicySpec, find_policy
from moepolicy.library.learned.foresight_ahead import ForesightAhead
from moepolicy.library.learned.foresight_fetch import BUSY, among_first
from moeroute import open_trace
from moesim import Workload, load_workload
from numpy.typing import NDArray
from research import MIXTRAL, STRETCHES, run

# Sequences, tokens (a prompt's among them) and slots of each development stretch.
PARTS: dict[str, tuple[slice, int, tuple[int, ...]]] = {
    "qwen3-30b": (slice(None), 128, (32, 64, 96)),
    "gpt-oss-20b": (slice(0, 3), 700, (8, 16, 24)),
    "code": (slice(0, 2), 512, (4, 6)),
    "wikitext": (slice(0, 2), 512, (4,)),
}
TRIED_ON = ("t4", "cpu-disk")


class InBuffers(ForesightAhead):
    """Guesses wait in buffers alone."""

    fills_slots = False


class OneLayerOn(ForesightAhead):
    """Guesses of the next layer alone."""

    def chance(self, ahead: int, layer: int, at: int) -> float:
        """None of a layer further on."""
        if ahead > 0:
            return 0.0
        pooled = self.all_right[ahead, at] / self.all_guesses[ahead, at]
        right = self.right[ahead, layer, at] + 8.0 * pooled
        return float(right / (self.guesses[ahead, layer, at] + 8.0))


class ByValues(ForesightAhead):
    """Ranks by the layer's values, which its last step gave, and not by what follows."""

    def add_shares(self, layer: int, ahead: int) -> None:
        """The values, from 0 to 1."""
        for e in range(self.n_experts):
            value = self.value[layer * self.n_experts + e]
            self.share[e] = 0.5 * min(max(value, 0.0), 1.0)


class AlwaysAtRisk(ForesightAhead):
    """A copy that soon ends costs a share of its time, too."""

    def best(self, layer: int, begins: float, taken: NDArray[np.int32]) -> int:
        """The guess that is expected to save most beyond its cost; -1 where none does."""
        risk = self.overlaps(layer, begins) + BUSY * self.copy
        found, most = -1, 0.0
        for ahead in range(min(self.ahead, self.n_layers - 1 - layer)):
            later = layer + 1 + ahead
            for i in range(self.n_open[ahead, later]):
                key = int(self.open[ahead, later, i])
                chance = self.chance(ahead, later, self.bin[ahead, later, i])
                gain = chance * self.idle[ahead + 1] - (1.0 - chance) * risk
                if gain > most and not among_first(taken, key):
                    found, most = key, gain
        self.expected[0] = most
        return found


EVICTING = {
    "lru": "lru",
    "nothing learned": "foresight:rate=0,recent=0",
    **{f"recent {weight}": f"foresight:recent={weight}" for weight in (0.02, 0.05, 0.1, 0.2)},
}
FETCHING: dict[str, str | type[ForesightAhead]] = {
    "foresight-bypass": "foresight-bypass",
    "edgemoe": "edgemoe",
    "foresight-ahead": "foresight-ahead",
    "1 use added": "foresight-ahead:unseen=1.0",
    "10 uses added": "foresight-ahead:unseen=10.0",
    "8 buffers": "foresight-ahead:staging=8",
    "the next layer alone": OneLayerOn,
    "buffers alone": InBuffers,
    "ranked by values": ByValues,
    "a soon ended copy costs, too": AlwaysAtRisk,
}


def main() -> None:
    """Make both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="+", help="NAME=FILE of " + ", ".join(PARTS))
    parser.add_argument("--out", type=Path, required=True, help="a Markdown file to write")
    asked = parser.parse_args()
    given = dict(each.split("=", 1) for each in asked.traces)
    if unknown := given.keys() - PARTS.keys():
        parser.error(f"no development stretches are known of {', '.join(sorted(unknown))}")
    cells = [
        (name, development(name, path), slots)
        for name, path in given.items()
        for slots in PARTS[name][2]
    ]
    evicting = [
        [f"{name} {slots}", *beyond(name, part, slots, EVICTING, "foresight:recent=0", "t4")]
        for name, part, slots in cells
    ]
    base = "foresight-bypass:recent=0"
    fetching = [
        [f"{name} {slots} {machine}", *beyond(name, part, slots, FETCHING, base, machine)]
        for name, part, slots in cells
        for machine in TRIED_ON
    ]
    text = table("hit points", evicting, list(EVICTING))
    text += "\n" + table("%", fetching, list(FETCHING))
    asked.out.write_text(text, encoding="utf-8")


def development(name: str, path: str) -> Workload:
    """The development stretch of a trace, without predictions."""
    sequences, tokens, _ = PARTS[name]
    whole = load_workload(open_trace(path))
    part = whole.only(range(len(whole.starts))[sequences])
    part = part.head(min(tokens, part.n_decoded))
    return part if STRETCHES[name].own_sizes else part.sized(MIXTRAL.on(part.meta))


def beyond(
    name: str, part: Workload, slots: int, tried: dict[str, Any], base: str, machine: str
) -> list[str]:
    """What each try is worth: hit points of those that evict alone, else % of tokens/s."""
    worth: Callable[[Any, Any], float] = faster if tried is FETCHING else better
    least = run(name, part, find_policy(base), slots, machine)
    found = []
    for label, policy in tried.items():
        spec = find_policy(policy) if isinstance(policy, str) else PolicySpec(label, policy)
        found.append(f"{worth(run(name, part, spec, slots, machine), least):+.2f}")
    return found


def better(found: Any, base: Any) -> float:
    """Hit points beyond another result."""
    return 100 * float(found.hits - base.hits) / float(base.requests)


def faster(found: Any, base: Any) -> float:
    """% of tokens/s beyond another result's."""
    return 100 * float(found.tokens_per_s / base.tokens_per_s - 1)


def table(of: str, rows: list[list[str]], columns: list[str]) -> str:
    """A Markdown table."""
    lines = [[of, *columns], ["---"] * (len(columns) + 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
