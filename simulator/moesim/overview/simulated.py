"""The simulations that a report shows, as rows: by cache size, by bandwidth, and in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from moepolicy import PolicySpec
from moepolicy.policy import Policy

from moesim.comparison import PolicyComparison, Setting, SizedPolicy, run
from moesim.curves.hit_ratios import LIMIT as BYPASS
from moesim.curves.hit_ratios import ONE_PASS, hit_curve, shuffled
from moesim.engines.clock import COMPUTE_LANE, CPU_LANE, DISK_LANE, LINK_LANE, Segment
from moesim.engines.compilations import Compilations
from moesim.engines.timeline import NAMES
from moesim.machine.costs import costs_of
from moesim.machine.profile import Machine
from moesim.pictures.colours import LIMIT
from moesim.pictures.times import DEMAND, DENSE, EXPERTS, PREFETCH, READING, STALL
from moesim.report import Compared
from moesim.simulation import simulate
from moesim.sizes import sizes_of
from moesim.workload.steps import Workload

MOST_SIZES = 32  # of a curve that are drawn
SPEED_SIZES = 7  # of the cache that tokens/s are simulated at
LINK_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
WARM_TOKENS = 48  # before those whose timeline is shown
SHOWN_TOKENS = 2

Row = dict[str, Any]
Watch = Callable[[list[SizedPolicy]], Iterable[SizedPolicy]]


@dataclass(frozen=True)
class Study:
    """What all simulations of a report share."""

    setting: Setting
    policies: Sequence[PolicySpec]
    workload: Workload
    slots: int  # where one size is shown
    compilations: Compilations
    watch: Watch

    def compared(self, slots: Sequence[int], machine: Machine | None = None) -> PolicyComparison:
        """All policies at these sizes, on another machine if one is given."""
        setting = self.setting if machine is None else replace(self.setting, machine=machine)
        return run(
            setting,
            self.policies,
            slots,
            compilations=self.compilations,
            watch=self.watch,
            workload=self.workload,
        )


def spread(least: int, most: int, count: int) -> list[int]:
    """At most ``count`` whole numbers from ``least`` to ``most``, both included."""
    return sorted({round(float(x)) for x in np.linspace(least, most, count)})


def ratio_rows(study: Study, found: PolicyComparison, seed: int) -> list[Row]:
    """The hit ratio of cache sizes under lossless policies that copy on demand alone; the limit is
    that of such policies. Those that one pass serves have all sizes, on the tokens as they are and
    shuffled, and the others those that were simulated."""
    n_experts = study.setting.meta.n_experts
    sizes = spread(1, n_experts, MOST_SIZES)
    named = [spec.name for spec in study.policies if not spec.parameters]
    wanted = [name for name in ONE_PASS if name in named and name != BYPASS] + [BYPASS]
    mixed = shuffled(study.workload, seed)
    scope, cold = study.setting.scope, study.setting.cold
    simulated = (one.result for one in found.rows if isinstance(one, Compared))
    return [
        {
            "policy": LIMIT if name == BYPASS else name,
            "slots": size,
            "hit_ratio": float(curve[size]),
            "shuffled": of is mixed,
        }
        for of in (study.workload, mixed)
        for name in wanted
        for curve in [hit_curve(of, name, scope, cold=cold)]
        for size in sizes
    ] + [
        {
            "policy": result.policy,
            "slots": result.slots,
            "hit_ratio": result.hit_ratio,
            "shuffled": False,
        }
        for result in simulated
        if not (result.policy in wanted or result.lossy or result.prefetches)
    ]


def memory_rows(study: Study, found: PolicyComparison) -> list[Row]:
    """tokens/s by the bytes of all slots."""
    n_layers = study.setting.meta.n_layers
    return [
        _speed(one) | {"memory_bytes": one.slots * n_layers * (one.result.expert_bytes or 0)}
        for one in found.rows
        if isinstance(one, Compared)
    ]


def link_rows(study: Study) -> list[Row]:
    """tokens/s by the bandwidth of the link, from a quarter to four times the machine's."""
    rows = []
    for factor in LINK_FACTORS:
        link = study.setting.machine.link
        faster = replace(link, bytes_per_s=link.bytes_per_s * factor)
        found = study.compared([study.slots], replace(study.setting.machine, link=faster))
        rows += [
            _speed(one) | {"link_gb_per_s": faster.bytes_per_s / 1e9}
            for one in found.rows
            if isinstance(one, Compared)
        ]
    return rows


def _speed(one: Compared) -> Row:
    result = one.result
    return {
        "policy": result.policy,
        "slots": result.slots,
        "tokens_per_s": result.tokens_per_s,
        "limit_tokens_per_s": result.limit_tokens_per_s,
    }


def part_rows(study: Study, found: PolicyComparison) -> list[Row]:
    """The parts of a token's time under each policy, in ms, at the size that is shown alone."""
    specs = {spec.label: spec for spec in study.policies}
    tokens = study.workload.n_decoded + study.workload.n_prompt
    rows = []
    for one in found.rows:
        if not isinstance(one, Compared) or one.slots != study.slots:
            continue
        result = one.result
        if result.time_s is None or result.stall_s is None:
            continue
        dense_s = _dense_s(study, specs[result.policy]) + (result.gates_s or 0.0)
        seconds = {
            DENSE: dense_s,
            EXPERTS: max(0.0, result.time_s - result.stall_s - dense_s),
            STALL: result.stall_s,
        }
        rows += [
            {"policy": result.policy, "part": part, "ms_per_token": 1e3 * of / tokens}
            for part, of in seconds.items()
        ]
    return rows


def _dense_s(study: Study, spec: PolicySpec) -> float:
    """Seconds of all steps up to their gate's choice, later gates not included, and of the passes
    outside the layers."""
    workload, expert_bytes = study.workload, study.setting.expert_bytes
    assert expert_bytes is not None
    costs = costs_of(
        workload,
        study.setting.machine,
        sizes_of(workload.meta, expert_bytes, study.setting.low_bytes),
        predicting=False,
        routing=spec.routes,
    )
    return float(costs.gate_ns(slice(0, workload.n_steps)).sum()) / 1e9


def timeline_policies(policies: Sequence[PolicySpec]) -> list[PolicySpec]:
    """The first policy without prefetching and the first with, of those that can run live."""
    live = [spec for spec in policies if "future" not in spec.requires]
    ahead = [spec for spec in live if spec.policy.prefetch is not Policy.prefetch]
    others = [spec for spec in live if spec not in ahead]
    return others[:1] + ahead[:1] or list(policies[:1])


def timeline_rows(study: Study) -> list[Row]:
    """What every lane did during a few tokens, after as many as fill a cache."""
    head = study.workload.head(WARM_TOKENS + SHOWN_TOKENS)
    rows = []
    for spec in timeline_policies(study.policies):
        segments: list[Segment] = []
        simulate(
            head,
            spec,
            study.setting.machine,
            slots=study.slots,
            scope=study.setting.scope,
            expert_bytes=study.setting.expert_bytes,
            low_bytes=study.setting.low_bytes,
            timeline=segments,
            limits=False,
            compilations=study.compilations,
        )
        rows += list(_last_tokens(spec.label, segments, study.setting.meta.n_experts))
    return rows


def _last_tokens(policy: str, segments: Sequence[Segment], n_experts: int) -> Iterator[Row]:
    """The stretches of the last tokens, from the first one's first layer on."""
    first_layers = [one.begins for one in segments if one.lane == COMPUTE_LANE and one.key == -1]
    if not first_layers:
        return
    begins = sorted(first_layers)[-min(SHOWN_TOKENS, len(first_layers))]
    several = {one.lane for one in segments if one.unit > 0}
    for one in segments:
        if one.ends <= begins:
            continue
        lane = NAMES[one.lane] + f" {one.unit + 1}" * (one.lane in several)
        layer, expert = divmod(one.key, n_experts) if one.key >= 0 else (-1 - one.key, None)
        yield {
            "policy": policy,
            "lane": lane,
            "what": _what(one),
            "begin_ms": max(0, one.begins - begins) / 1e6,
            "end_ms": (one.ends - begins) / 1e6,
            "layer": layer,
            "expert": expert,
        }


def _what(segment: Segment) -> str:
    if segment.lane == LINK_LANE:
        return DEMAND if segment.demand else PREFETCH
    if segment.lane == DISK_LANE:
        return READING
    return EXPERTS if segment.lane == CPU_LANE or segment.key >= 0 else DENSE
