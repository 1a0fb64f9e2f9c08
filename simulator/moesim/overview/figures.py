"""The figures of a report: rows, the chart that shows them, and what there is to see in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moepolicy.amounts import counted
from moeroute.schema import TraceMeta

from moesim.overview.simulated import SHOWN_TOKENS, WARM_TOKENS, Row
from moesim.pictures.colours import PolicyMarks
from moesim.pictures.lines import (
    BANDWIDTH,
    HIT_RATIO,
    MEMORY,
    SLOTS,
    SMALL_MEMORY,
    SPEED,
    policy_lines,
    with_limits,
)
from moesim.pictures.page import Figure
from moesim.pictures.routing import heat_map, locality_chart, recall_chart
from moesim.pictures.times import time_parts, timeline


@dataclass(frozen=True)
class Topic:
    """What the figures of a report are of, for their titles."""

    meta: TraceMeta
    title: str  # of the trace
    machine: str
    constants: str  # where the machine's are from
    slots: int
    tokens: int

    @property
    def routing(self) -> str:
        """How the trace came about: never silent about a synthetic one."""
        return f"{self.meta.source} routing"

    @property
    def simulated(self) -> str:
        """What the numbers of simulations are."""
        return f"simulated, {self.routing}"

    @property
    def on(self) -> str:
        """The machine and its constants."""
        return f"{self.machine} ({self.constants} constants)"


def hit_ratios(rows: Sequence[Row], marks: PolicyMarks, topic: Topic) -> Figure:
    """The hit ratio by cache size."""
    chart = policy_lines(
        rows,
        SLOTS,
        HIT_RATIO,
        marks,
        title="Hit ratio by cache size",
        subtitle=f"{topic.simulated}; dotted: the same tokens in random order",
    )
    caption = (
        "Every policy on demand loads only what it misses. The limit is the most that a policy "
        "could hit without prefetching, if it knew the future. Where a line lies above its dotted "
        "copy, the order of the tokens helps the cache; the rest is that some experts are used "
        "more than others."
    )
    return Figure("hit-ratio", "Hit ratio by cache size", topic.simulated, caption, chart, rows)


def speed_by_memory(rows: Sequence[Row], marks: PolicyMarks, topic: Topic) -> Figure:
    """tokens/s by the memory of all slots, and the limit."""
    small = max(row["memory_bytes"] for row in rows) < 1e9
    axis, unit = (SMALL_MEMORY, 1e6) if small else (MEMORY, 1e9)
    drawn = with_limits(
        [row | {axis.name: row["memory_bytes"] / unit} for row in rows],
        axis.name,
        "tokens_per_s",
        "limit_tokens_per_s",
    )
    chart = policy_lines(
        drawn,
        axis,
        SPEED,
        marks,
        title="Speed by memory",
        subtitle=f"{topic.simulated}; {topic.on}",
    )
    caption = (
        "Tokens/s with more and more experts kept next to compute. No policy with so many slots "
        "can be above the limit, even if it knows the future."
    )
    return Figure("speed-by-memory", "Speed by memory", topic.simulated, caption, chart, drawn)


def speed_by_link(rows: Sequence[Row], marks: PolicyMarks, topic: Topic) -> Figure:
    """tokens/s by the bandwidth of the link, and the limit."""
    drawn = with_limits(rows, BANDWIDTH.name, "tokens_per_s", "limit_tokens_per_s")
    chart = policy_lines(
        drawn,
        BANDWIDTH,
        SPEED,
        marks,
        title="Speed by bandwidth",
        subtitle=f"{topic.simulated}; {topic.on}, its link slower and faster; "
        f"{counted(topic.slots, 'slot')} a layer",
    )
    caption = (
        f"Tokens/s with {counted(topic.slots, 'expert')} cached a layer if the link had a "
        "quarter to four times its bandwidth. A policy that prefetches pays with additional "
        "copies, which a slow link does not hide."
    )
    return Figure("speed-by-link", "Speed by bandwidth", topic.simulated, caption, chart, drawn)


def use(rows: Sequence[Row], topic: Topic) -> Figure:
    """The heat map of expert use."""
    even = 1 / topic.meta.n_experts
    chart = heat_map(
        rows, title="Use of experts by layer", subtitle=f"{topic.routing}; even use is {even:.1%}"
    )
    caption = (
        "Each expert's share of its layer's uses. Rows of one colour: no expert is worth keeping "
        "for good, and a cache lives on locality. A cell far above even use is one that a fixed "
        "choice of experts would serve."
    )
    return Figure("expert-use", "Use of experts by layer", topic.routing, caption, chart, rows)


def locality_of(rows: Sequence[Row], topic: Topic) -> Figure:
    """Locality by lag."""
    chart = locality_chart(
        rows,
        title="Locality by distance",
        subtitle=f"{topic.routing}; mean over layers",
    )
    caption = (
        "How often an expert that a token uses was among those of the token so many positions "
        "earlier in its sequence, in the same layer. What lies above the shuffled copy is "
        "locality that a cache can use."
    )
    return Figure("locality", "Locality by distance", topic.routing, caption, chart, rows)


def recall_of(rows: Sequence[Row], topic: Topic) -> Figure:
    """Recall of the gates' predictions, as the base paper's Figure 2 shows it."""
    chart = recall_chart(
        rows,
        title="Recall of predictions",
        subtitle=f"{topic.routing}; a later layer's gate on an earlier layer's hidden state",
    )
    caption = (
        "The share of a layer's experts that would have been fetched ahead, had so many of the "
        "likeliest been fetched (arXiv 2312.17238, Figure 2, right, shows the same for "
        "Mixtral-8x7B)."
    )
    return Figure("recall", "Recall of predictions", topic.routing, caption, chart, rows)


def parts_of(rows: Sequence[Row], topic: Topic) -> Figure:
    """Where the time of a token goes."""
    chart = time_parts(
        rows,
        title="Where the time goes",
        subtitle=f"{topic.simulated}; {topic.on}; {counted(topic.slots, 'slot')} a layer",
    )
    caption = (
        "The mean time of a token: layers up to the gate's choice and all outside the layers, "
        "experts that are computed, and standing still until an expert has arrived."
    )
    return Figure("time", "Where the time goes", topic.simulated, caption, chart, rows)


def timeline_of(rows: Sequence[Row], topic: Topic) -> Figure:
    """What every lane did during a few tokens."""
    chart = timeline(
        rows,
        title="A few tokens in time",
        subtitle=f"{topic.simulated}; {topic.on}; {counted(topic.slots, 'slot')} a layer",
    )
    caption = (
        f"{SHOWN_TOKENS} tokens after {WARM_TOKENS} others. A gap in the lane of compute is "
        "waiting for an expert. moesim compare --timeline FILE writes all of a run for Perfetto."
    )
    return Figure("timeline", "A few tokens in time", topic.simulated, caption, chart, rows)
