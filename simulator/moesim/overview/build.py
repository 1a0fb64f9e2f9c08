"""A report from a trace: simulations, statistics, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from moepolicy import PolicySpec
from moeroute.statistics import read_routing

from moesim import __version__
from moesim.comparison import PolicyComparison
from moesim.overview import figures
from moesim.overview.figures import Topic
from moesim.overview.routing import locality_rows, recall_rows, use_rows
from moesim.overview.simulated import (
    SPEED_SIZES,
    Study,
    link_rows,
    memory_rows,
    part_rows,
    ratio_rows,
    spread,
    timeline_rows,
)
from moesim.pictures.colours import PolicyMarks
from moesim.pictures.page import Figure, Page
from moesim.reading import sentence
from moesim.report import table

N_PARTS = 8
Say = Callable[[str], None]


def make_page(study: Study, seed: int, why: str, say: Say) -> Page:
    """The report on ``study``. ``why`` says how its machine and sizes were chosen; ``say`` is told
    what is under way, ``N_PARTS`` times."""
    setting, meta = study.setting, study.setting.meta
    marks = PolicyMarks.of(spec.label for spec in study.policies)
    tokens = study.workload.n_decoded + study.workload.n_prompt
    machine = setting.machine
    topic = Topic(meta, setting.trace.title, machine.name, machine.source, study.slots, tokens)
    say("policies by cache size")
    sizes = spread(min(meta.top_k, meta.n_experts), meta.n_experts, SPEED_SIZES)
    found = study.compared(sorted({*sizes, study.slots}))
    shown = [one for one in found.rows if one.slots == study.slots]
    lead = sentence([one for one in found.rows if one.slots < meta.n_experts])
    return Page(
        title=f"Routing of {setting.trace.title}",
        lead=lead,
        facts=_facts(study, topic, seed, why),
        figures=list(_figures(study, found, marks, topic, seed, say)),
        table=table(found.rows, found.title, found.alike),
        notes=[] if shown else ["no policy could run"],
    )


def _figures(
    study: Study,
    found: PolicyComparison,
    marks: PolicyMarks,
    topic: Topic,
    seed: int,
    say: Say,
) -> Iterator[Figure]:
    """In the order of the page; those of times only where the size of an expert is known."""
    timed = study.setting.expert_bytes is not None
    say("hit ratios")
    yield figures.hit_ratios(ratio_rows(study, found, seed), marks, topic)
    if timed:
        yield figures.speed_by_memory(memory_rows(study, found), marks, topic)
        say("bandwidths")
        yield figures.speed_by_link(link_rows(study), marks, topic)
        say("parts of the time")
        yield figures.parts_of(part_rows(study, found), topic)
        say("timeline")
        yield figures.timeline_of(timeline_rows(study), topic)
    say("use of experts")
    routing = read_routing(study.setting.trace)
    yield figures.use(use_rows(routing), topic)
    say("locality")
    yield figures.locality_of(locality_rows(routing, seed), topic)
    say("recall")
    if recalls := recall_rows(study.setting.trace):
        yield figures.recall_of(recalls, topic)


def _facts(study: Study, topic: Topic, seed: int, why: str) -> list[tuple[str, str]]:
    setting, meta = study.setting, study.setting.meta
    found = [
        ("trace", f"{topic.title}, SHA-256 {setting.trace.digest[:16]}..."),
        ("model", f"{meta.n_layers} layers, top-{meta.top_k} of {meta.n_experts} experts"),
        ("routing", f"{meta.source}; {topic.tokens:,} tokens replayed"),
        ("machine", f"{topic.on}: {setting.machine.description}"),
        ("made with", f"moesim {__version__}, seed {seed} of the shuffled copy"),
    ]
    size = setting.expert_bytes
    known = f"{size:,} bytes" if size else "of unknown size, so that there are no times"
    found.insert(2, ("experts", known))
    return found + ([("chosen", why)] if why else [])


def live_first(policies: Sequence[PolicySpec]) -> list[PolicySpec]:
    """Policies that know the future after those that do not."""
    return sorted(policies, key=lambda spec: "future" in spec.requires)
