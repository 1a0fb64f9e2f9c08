"""What a notebook imports, used as its writer would, and documented."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import moepolicy
import moeroute
import moesim
import numpy as np
import pytest

PACKAGES = ("moeroute", "moepolicy", "moesim")
NAMES = [(one, name) for one in PACKAGES for name in importlib.import_module(one).__all__]


def written(thing: Any) -> str:
    """The docstring that was written for ``thing``, not one that Python or a base class gives."""
    if inspect.isclass(thing):
        text = vars(thing).get("__doc__") or ""
        made = f"{thing.__name__}("  # by dataclass or NamedTuple: its fields
        return "" if text.startswith(made) else text
    return inspect.getdoc(thing) or ""


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_public_name_is_documented(package: str, name: str) -> None:
    module = importlib.import_module(package)
    thing = getattr(module, name)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert len(written(thing).split()) > 3, f"{package}.{name} has no docstring of its own"
        public = vars(thing).items() if inspect.isclass(thing) else ()
        for member, value in public:
            if inspect.isfunction(value) and not member.startswith("_"):
                shown = f"{package}.{name}.{member}"
                assert inspect.getdoc(getattr(thing, member)), f"{shown} has no docstring"
    else:
        assert name in (module.__doc__ or ""), f"{package}'s docstring does not tell of {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_is_cheap(package: str) -> None:
    code = (
        f"import sys, {package}; print(*sorted({{'polars', 'numba', 'torch'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_trace_is_looked_at() -> None:
    assert "tiny" in moeroute.sample_names()
    trace = moeroute.open_trace("tiny")
    meta, experts = trace.meta, trace.array("experts")
    assert isinstance(trace, moeroute.Trace)
    assert isinstance(meta, moeroute.TraceMeta)
    assert experts.shape == (trace.n_rows, meta.top_k)
    assert set(np.unique(trace.array("phase"))) <= {moeroute.PROMPT, moeroute.DECODE}
    assert trace.has(moeroute.prediction_column(1))
    found = {(one.name, one.parameter): one.value for one in moeroute.summarize(trace)}
    assert 0 < found["hit_ratio_lru", "slots=4"] < 1
    with pytest.raises(moeroute.TraceError, match="nowhere"):
        moeroute.open_trace("nowhere.parquet")


def test_a_trace_is_written_and_read_again(tmp_path: Path) -> None:
    meta = moeroute.TraceMeta(source="synthetic", model="mine", n_layers=1, n_experts=4, top_k=2)
    rows = moeroute.Rows(
        sequence=np.zeros(2, np.uint32),
        position=np.arange(2, dtype=np.uint32),
        phase=np.full(2, moeroute.DECODE, np.uint8),
        token_id=None,
        layer=np.zeros(2, np.uint16),
        experts=np.array([[0, 1], [2, 0]], np.uint16),
        weights=np.full((2, 2), 0.5, np.float32),
    )
    with moeroute.TraceWriter(tmp_path / "mine.parquet", meta) as writer:
        writer.write(rows)
    trace = moeroute.open_trace(tmp_path / "mine.parquet")
    workload = moesim.load_workload(trace)
    result = moesim.simulate(
        workload,
        moepolicy.find_policy("lru"),
        moesim.load_machine("rtx3060"),
        slots=2,
        expert_bytes=1000,
    )
    assert (result.requests, result.hits, result.loads, result.bytes_loaded) == (4, 1, 3, 3000)
    assert result.hit_ratio == 0.25


class Mine(moepolicy.Policy):
    """Evicts the lowest key: a notebook's first policy."""

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


def test_policies_are_compared_on_a_machine_made_by_hand() -> None:
    assert "rtx3060" in moesim.machine_names()
    machine = moesim.Machine(
        "by hand",
        "for a test",
        "published",
        moesim.LinkProfile(bytes_per_s=1e9),
        moesim.Compute(layer_s=1e-3),
        disk=moesim.Disk(bytes_per_s=5e8),
        cpu=moesim.Cpu(workers=2),
    )
    frame = moesim.compare("tiny", ["lru", Mine], slots=[2, 4], machine=machine, tokens=12)
    assert frame["policy"].to_list() == ["lru", "Mine"] * 2
    assert frame.height == 4
    assert all(0 <= ratio <= 1 for ratio in frame["hit_ratio"])
    with pytest.raises(moesim.UsageError, match="unknown engine"):
        moesim.compare("tiny", ["lru"], engine="none")
    with pytest.raises(moepolicy.PolicyError, match="did you mean 'lru'"):
        moesim.compare("tiny", ["lruu"])


def test_a_run_is_watched_and_its_curve_is_what_it_counts() -> None:
    trace = moeroute.open_trace("tiny")
    lru, machine = moepolicy.find_policy("lru"), moesim.load_machine("rtx3060")
    workload = moesim.workload_for(trace, [lru]).head(12)
    assert isinstance(workload, moesim.Workload)
    segments: list[moesim.Segment] = []
    seen: list[moepolicy.Event] = []
    known = moesim.Compilations()
    result = moesim.simulate(
        workload,
        lru,
        machine,
        slots=4,
        timeline=segments,
        observers=(seen.append,),
        compilations=known,
    )
    assert isinstance(result, moesim.Result)
    assert sum(event.kind is moepolicy.Kind.HIT for event in seen) == result.hits
    assert result.time_s is not None
    assert max(segment.ends for segment in segments) == round(result.time_s * 1e9)
    assert moesim.hit_curve(workload, "lru", "layer")[4] == pytest.approx(result.hit_ratio)


def test_a_cache_is_driven_by_hand() -> None:
    context = moepolicy.Context(n_layers=1, n_experts=4, top_k=2, slots=2)
    cache = moepolicy.ExpertCache(context, moepolicy.find_policy("lru").build(context))
    experts, weights = moepolicy.demand_order(np.array([[3, 1]]), np.array([[0.4, 0.6]]))
    assert experts.tolist() == [1, 3]
    step = moepolicy.Step(
        0, 0, experts, weights, moepolicy.NO_LOGITS, moepolicy.NO_PREDICTIONS, tokens=1
    )
    assert cache.begin(step).tolist() == [moepolicy.Kind.MISS] * 2
    while copy := cache.start():
        cache.finish(copy.key)
    for key in experts.tolist():
        cache.consume(key)
    before = moepolicy.counts_of(cache.arrays)
    cache.end()
    cache.begin(step._replace(number=1))
    counts = moepolicy.counts_of(cache.arrays)
    assert (counts.requests, counts.loads, counts.hit_ratio) == (4, 2, 0.5)
    assert counts.since(before) == moepolicy.Counts(requests=2, hits=2)
    assert before + counts.since(before) == counts


def test_results_show_themselves_in_a_notebook() -> None:
    trace = moeroute.open_trace("tiny")
    shown = trace._repr_html_()
    assert "top-2 of 8" in shown
    assert str(trace.path) not in shown
    assert trace.frame().select("layer").head(1).collect().height == 1
    frame = moesim.compare(trace, ["lru", Mine], slots=[2, 4], machine="t4", tokens=40)
    picture = moesim.draw(frame)
    assert picture._repr_html_().startswith("<svg")
    assert repr(picture) == "Picture('Policies compared')"
    with pytest.raises(moesim.UsageError, match="nothing to draw"):
        moesim.draw([{"card": "t4"}])


@pytest.mark.slow
def test_a_recommendation_is_asked_for() -> None:
    found = moesim.recommendation("tiny", machine="t4", memory="300MiB")
    assert isinstance(found, moesim.Recommendation)
    assert found.options["model"] == "tiny"
    assert "tokens/s simulated" in repr(found)
    shown = found._repr_html_()
    assert shown.startswith("<table>")
    assert "moerun generate" in shown
    with pytest.raises(moesim.UsageError, match="no amount"):
        moesim.recommendation("tiny", machine="t4", memory="lots")
