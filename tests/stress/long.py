"""Long runs: the counters agree, memory is flat, and no lossless policy beats the limit.

Simulated: every built-in lossless policy at several cache sizes over a seeded trace of a million
tokens; its beginning by SimPy, too. Live: the bundled model generates thousands of tokens a piece,
and each piece ends with a run that is recorded and replayed.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stress.forks import forked, import_all
from stress.journal import Journaled
from stress.policies import Wrong, require, require_alike

JOURNAL = "long.jsonl"
SAID = "said"
SLOTS = (2, 4, 6)
BEGINNING = 600  # tokens that SimPy replays, too
GROWTH_BYTES = 48 << 20
ONE_PASS = ("lru", "lfu", "belady")  # whose hits one pass counts at every size
LIVE = ("lru", "lru-spec", "foresight-bypass", "arc")
RECORDED = 300  # tokens of a live piece
WORDS = ("the", "of", "a", "tale", "two", "cities", "best", "worst", "times", "age", "was", "it")
PATIENCE_S = 3 * 3600.0


@dataclass(frozen=True)
class Ran:
    """One long run: its tokens, its seconds, what it came to, and what was wrong with it."""

    what: str
    tokens: int
    seconds: float
    loads: int = 0
    x_limit: float | None = None
    grown_bytes: int = 0
    fault: str = ""


class Long(Journaled[Ran]):
    """A folder with the trace and the runs so far; ``simulated`` and ``live`` add to them."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(folder, f"{seed}-{JOURNAL}", Ran)
        self.seed = seed
        os.environ["NUMBA_CACHE_DIR"] = str(self.folder / "code")
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")

    def simulated(self, n_tokens: int, *, minutes: float) -> None:
        """Every policy and size that is not on record, until the time is up."""
        from moepolicy.library import BUILT_IN

        policies = [name for name, cls in BUILT_IN.items() if not cls.lossy]
        todo = [(name, slots) for name in policies for slots in SLOTS]
        workloads = None
        until = time.monotonic() + 60 * minutes
        for name, slots in todo:
            what = f"simulated {name}, {slots} slots"
            if self._has(what, n_tokens):
                continue
            if time.monotonic() > until:
                return
            if workloads is None:
                workloads = self._workloads(n_tokens)
                self._compile(workloads[1])
            self._note(what, n_tokens, partial(_simulated, *workloads, name, slots))

    def live(self, n_tokens: int, a_piece: int, *, minutes: float) -> None:
        """Pieces of ``a_piece`` tokens until ``n_tokens`` are on record, or the time is up."""
        import_all(forked(_modules_of_live, self.folder / SAID).value)
        until = time.monotonic() + 60 * minutes
        number = sum(ran.what.startswith("live") for ran in self.outcomes)
        while number * a_piece < n_tokens and time.monotonic() < until:
            policy = LIVE[number % len(LIVE)]
            piece = self.folder / f"piece-{number}"
            self._note(
                f"live {policy}, piece {number}",
                a_piece,
                partial(_live, policy, piece, f"{self.seed} {number}", a_piece),
            )
            number += 1

    @property
    def faults(self) -> list[Ran]:
        """Runs that something was wrong with."""
        return [ran for ran in self.outcomes if ran.fault]

    def rows(self) -> list[dict[str, str | int]]:
        """Simulated and live runs: tokens, the least loads over the limit, the most memory."""
        found: list[dict[str, str | int]] = []
        for kind in ("simulated", "live"):
            ran = [each for each in self.outcomes if each.what.startswith(kind)]
            least = min((each.x_limit for each in ran if each.x_limit is not None), default=None)
            found.append(
                {
                    "runs": kind,
                    "number": len(ran),
                    "tokens": sum(each.tokens for each in ran),
                    "least x limit": "" if least is None else f"{least:.3f}",
                    "most grown MiB": max((each.grown_bytes >> 20 for each in ran), default=0),
                    "faults": sum(bool(each.fault) for each in ran),
                }
            )
        return found

    def _has(self, what: str, tokens: int) -> bool:
        return any(ran.what == what and ran.tokens == tokens for ran in self.outcomes)

    def _note(self, what: str, tokens: int, work: Callable[[], dict[str, Any]]) -> None:
        began_s = time.monotonic()
        ended = forked(work, self.folder / SAID, patience_s=PATIENCE_S, cpu_s=int(PATIENCE_S))
        found = ended.value or {"fault": f"{ended.how}: {ended.told}"}
        ran = Ran(what, tokens, round(time.monotonic() - began_s, 1), **found)
        self.outcomes.append(ran)
        with self.journal.open("a") as file:
            file.write(json.dumps(asdict(ran)) + "\n")

    def _workloads(self, n_tokens: int) -> tuple[Any, Any]:
        """The long trace and a short one, made in a child: polars has threads."""
        place = self.folder / f"{self.seed}-{n_tokens}.pickle"

        def work() -> None:
            from moesim.conformance.routing import seeded_workload

            made = [
                seeded_workload(self.seed, n_layers=2, n_tokens=n, horizon=2)
                for n in (n_tokens, BEGINNING)
            ]
            place.write_bytes(pickle.dumps(made))

        if not place.exists():
            ended = forked(work, self.folder / SAID, patience_s=PATIENCE_S, cpu_s=3600)
            assert not ended.how, ended
        long, beginning = pickle.loads(place.read_bytes())
        return long, beginning

    def _compile(self, workload: Any) -> None:
        """Compile what serves every policy, for the children to have."""
        from moepolicy import find_policy
        from moesim.conformance.runs import CACHES, CheckedPolicy, Compiled
        from moesim.engines.names import Engine

        checked = CheckedPolicy(find_policy("lru-spec"))
        vars(checked)["workload"] = workload.shown_to(checked.spec)
        checked.simulate(CACHES[0], Engine.replay, compilations=Compiled())


class Memory:
    """The most anonymous memory of this process since ``began``, by a thread that looks."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.2):
            self.most = max(self.most, anonymous_bytes())

    def end(self) -> int:
        """Stop looking; the most there was."""
        self._ended.set()
        self._thread.join()
        return self.most


def anonymous_bytes() -> int:
    """Bytes of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) << 10


def _simulated(long: Any, beginning: Any, name: str, slots: int) -> dict[str, Any]:
    """One policy and size; what it came to, or what is wrong."""
    try:
        return _simulate(long, beginning, name, slots)
    except Wrong as wrong:
        return {"fault": str(wrong)}


def _simulate(long: Any, beginning: Any, name: str, slots: int) -> dict[str, Any]:
    from moepolicy import Kind, find_policy
    from moesim.conformance.routing import EXPERT_BYTES
    from moesim.conformance.runs import LOW_BYTES, MACHINE, CacheSize, CheckedPolicy, Compiled
    from moesim.curves.hit_ratios import hit_curve
    from moesim.engines.names import Engine
    from moesim.simulation import simulate

    spec = find_policy(name)
    checked = CheckedPolicy(spec)
    size = CacheSize(slots, "layer", 1)
    vars(checked)["workload"] = beginning.shown_to(spec)
    compiled = Compiled()
    require_alike(
        (checked.simulate(size, Engine.simpy), None),
        (checked.simulate(size, Engine.replay, compilations=compiled), None),
    )
    workload = long.shown_to(spec)
    np.add.reduce(workload.keys)  # is read now, not while memory is watched
    context = checked.context(workload, slots, "layer")
    spec.build(context)
    before, memory = anonymous_bytes(), Memory()
    row = simulate(
        workload,
        spec,
        MACHINE,
        slots=slots,
        expert_bytes=EXPERT_BYTES,
        low_bytes=LOW_BYTES,
        engine=Engine.replay,
        compilations=compiled,
        limits=False,
    )
    grown = max(memory.end(), anonymous_bytes()) - before
    require(row.hits + row.late + row.misses == len(workload.keys), row, "counts its demand")
    if name in ONE_PASS:
        share = hit_curve(workload, name, "layer")[slots]
        require(round(share * len(workload.keys)) == row.hits + row.late, share, "hits as often")
    least = _limit(workload, slots)
    brought = row.loads + row.cpu_experts
    require(brought >= least, (brought, least), "needs as many loads")
    require(not grown > GROWTH_BYTES + _state_bytes(spec, context), f"{grown} bytes", "stays small")
    assert Kind.LOAD
    return {"loads": row.loads, "x_limit": brought / least, "grown_bytes": grown}


def _limit(workload: Any, slots: int) -> int:
    """The fewest loads that there can be."""
    from moesim.conformance.routing import EXPERT_BYTES
    from moesim.conformance.runs import MACHINE
    from moesim.limits import limits_of
    from moesim.sizes import sizes_of

    found = limits_of(
        workload,
        MACHINE,
        sizes_of(workload.meta, EXPERT_BYTES, 0),
        slots,
        "layer",
        buffers=0,
        cold=False,
        shares=None,
    )
    return int(found.loads)


def _state_bytes(spec: Any, context: Any) -> int:
    """What the policy itself keeps, before it has seen anything."""
    return sum(v.nbytes for v in vars(spec.build(context)).values() if isinstance(v, np.ndarray))


def _modules_of_live() -> list[str]:
    from moerun.commands import run  # noqa: F401

    return sorted(sys.modules)


def _live(policy: str, piece: Path, seed: str, n_tokens: int) -> dict[str, Any]:
    """Generate ``n_tokens`` in one process, the last of them recorded and replayed."""
    from moepolicy import find_policy
    from moerun.live.recording import LiveRecording
    from moerun.live.runner import Runner
    from moerun.live.sampling import Sampling
    from moerun.settings import Settings
    from moerun.store.find import find_store

    rng = random.Random(seed)
    store = find_store("tiny")
    settings = Settings(find_policy(policy), slots=3, context_tokens=512)
    texts, made = [], 0
    with Runner(store, settings) as runner:

        def say(tokens: int, recording: Any = None) -> int:
            prompt = " ".join(rng.choices(WORDS, k=rng.randrange(3, 40)))
            generation = runner.generation(None)
            if recording:
                recording.recorder.begin_sequence()
            asked = Sampling(
                max_new_tokens=tokens, temperature=1.0, seed=rng.randrange(1 << 30), stop=False
            )
            generation.run(runner.encode(prompt), asked)
            return int(generation.outcome().new_tokens)

        while made < n_tokens - RECORDED:
            made += say(min(300, n_tokens - RECORDED - made))
            texts.append(anonymous_bytes())
        trace, journal = piece.with_suffix(".parquet"), piece.with_suffix(".json")
        recording = LiveRecording(runner, trace, journal, 0)
        made += say(n_tokens - made, recording)
        recording.finish()
        counters = runner.session.cache.arrays.counters.copy()
    warm = len(texts) // 4
    grown = max(texts[warm:]) - max(texts[: warm + 1])
    told = _replayed(policy, trace, journal, counters)
    if grown > GROWTH_BYTES:
        told = f"{grown} bytes more after {len(texts) - warm} texts"
    for file in (trace, journal):
        file.unlink()
    return {"loads": 0, "grown_bytes": max(grown, 0), "fault": told}


def _replayed(policy: str, trace: Path, journal: Path, counters: Any) -> str:
    """Whether a replay of a recorded run counts what the run did; what differs."""
    from moepolicy import Context, ExpertCache, Kind, find_policy, replay_journal
    from moeroute import open_trace
    from moesim import workload_for

    spec = find_policy(policy)
    workload = workload_for(open_trace(trace), [spec]).shown_to(spec)
    document = json.loads(journal.read_text())
    context = Context(
        **{name: document[name] for name in ("n_layers", "n_experts", "top_k", "slots", "scope")}
    )
    cache = ExpertCache(context, spec.build(context), max_slots=context.n_experts)
    steps = map(workload.step, range(workload.n_steps))
    replay_journal(cache, steps, [tuple(call) for call in document["calls"]])
    names = [kind.name for kind in Kind if cache.count(kind) != counters[kind]]
    return f"the replay counts otherwise: {', '.join(names)}" if names else ""
