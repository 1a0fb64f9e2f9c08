"""Sessions whose policy is compiled beside them: same decisions, and nothing to wait for."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from moepolicy import Context, ExpertCache, find_policy, pointers
from moepolicy.calls import CompiledCalls
from moerun.links import DiskLink
from moerun.live.session import Session
from moerun.memory.compiling import COMPILE_AFTER_S, BackgroundCompiler, Compiling, Told
from support.links import RECORD_BYTES, MemoryRecords, MemorySlot

CONTEXT = Context(n_layers=3, n_experts=6, top_k=2, slots=3)
LIVELY = """
from moepolicy import Policy
class Lively(Policy):
    def __init__(self, context):
        self.seen = {}
    def on_load(self, key, speculative, now):
        self.seen[key] = now
    def victim(self, layer, incoming, candidates):
        return min(candidates, key=self.seen.__getitem__)
"""


def session(policy: str) -> Session:
    return Session(
        CONTEXT,
        find_policy(policy),
        lambda n: DiskLink(MemoryRecords(CONTEXT.n_keys), [MemorySlot() for _ in range(n)]),
        record_bytes=RECORD_BYTES,
        journal=[],
        compiling=Compiling.ALWAYS,
    )


def decode(session: Session, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(tokens):
        for layer in range(CONTEXT.n_layers):
            ids = torch.randperm(CONTEXT.n_experts, generator=generator)[None, :2]
            served = [e for e, _ in session.serve(layer, ids, torch.tensor([[0.7, 0.3]]))]
            assert sorted(served) == sorted(ids[0].tolist())


def test_calls_are_compiled_between_steps_and_again_after_a_reset() -> None:
    with session("lru") as live:
        decode(live, 5, seed=0)
        live.wait_compiled()
        assert isinstance(live.cache._calls, CompiledCalls)
        decode(live, 5, seed=1)
        live.settle()
        journal, before = live.cache.journal, live.totals
        assert journal
        live.cache.check()
        live.reset(journal=[])
        live.wait_compiled()
        assert isinstance(live.cache._calls, CompiledCalls)
        decode(live, 5, seed=0)
        decode(live, 5, seed=1)
        live.settle()
        after = live.totals
    # Demand alone does not depend on time: whoever made the calls, the decisions are the same.
    assert (before.hits, before.misses) == (after.hits, after.misses)


def test_a_policy_beyond_compiling_runs_interpreted(tmp_path: Path) -> None:
    path = tmp_path / "lively.py"
    path.write_text(LIVELY)
    with session(f"{path}:Lively") as live:
        live.wait_compiled()
        assert not isinstance(live.cache._calls, CompiledCalls)
        decode(live, 10, seed=0)


def test_who_owns_what_was_told_hears_of_a_policy_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lively.py"
    path.write_text(LIVELY)
    spec = find_policy(f"{path}:Lively")
    ours, theirs = Told(), Told()
    for told in (ours, ours, theirs):
        cache = ExpertCache(CONTEXT, spec.build(CONTEXT), name="lively")
        BackgroundCompiler(cache, threading.Condition(), 1, told=told).finish()
    said = capsys.readouterr().err.splitlines()
    assert (
        said
        == [
            "policy 'lively' runs interpreted: Lively.seen is a dict, neither an array nor a number"
        ]
        * 2
    )


def test_a_short_run_compiles_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setattr(pointers, "_entries", {})  # as in a process that has just begun
    cache = ExpertCache(CONTEXT, find_policy("lfu").build(CONTEXT))
    compiler = BackgroundCompiler(cache, threading.Condition(), 1)
    compiler.close()
    assert not isinstance(cache._calls, CompiledCalls)
    assert not (tmp_path / "code").exists()


def test_hooks_before_steps_end_a_pass_with_nothing_half_done() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with session("lru") as live:
        decode(live, 2, seed=0)
        live.before_steps.append(stop)
        with pytest.raises(KeyboardInterrupt):
            decode(live, 1, seed=1)
        live.before_steps.remove(stop)
        decode(live, 2, seed=2)


def test_with_what_serves_every_policy_there_hooks_are_compiled_at_once() -> None:
    first = ExpertCache(CONTEXT, find_policy("lru").build(CONTEXT))
    first.compile_calls(1)
    policy = find_policy("lfu").build(CONTEXT)
    cache = ExpertCache(CONTEXT, policy)
    assert first.lacks().nothing_general
    assert cache.lacks().nothing_general
    compiler = BackgroundCompiler(cache, threading.Condition(), 1)
    compiler._thread.join(COMPILE_AFTER_S - 1)
    assert isinstance(cache._calls, CompiledCalls)
