"""Compiled calls decide what interpreted ones do; code on disk is never stale and never missed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moepolicy import (
    Context,
    ExpertCache,
    Policy,
    PolicyError,
    codecache,
    compiled,
    find_policy,
)
from moepolicy.compiled import compiled_policy
from moepolicy.fingerprint import fingerprint
from support.clock import context_for, drive, make_steps, scenarios

CONTEXT = Context(n_layers=2, n_experts=4, top_k=1, slots=2)
STEP = 3


def advance(policy: Any, counts: Any) -> None:
    counts[0] += STEP
    policy.on_load(0, False, counts[0])


OWN = Path(__file__).parents[1] / "support" / "policies.py"


@pytest.mark.parametrize(
    "policy",
    [
        "lru-spec",
        "belady-bypass",
        pytest.param(f"{OWN}:AnythingAhead", marks=pytest.mark.slow),
    ],
)
@given(scenario=scenarios(), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_compiled_calls_decide_what_interpreted_ones_do(
    policy: str, scenario: dict[str, Any], seed: int
) -> None:
    steps, context = scenario["steps"], scenario["context"]
    _, expected = drive(policy, context, steps, seed=seed, streams=scenario["streams"])
    cache, got = drive(policy, context, steps, seed=seed, streams=scenario["streams"], compile=True)
    cache.check()
    assert got.events == expected.events
    assert got.journal == expected.journal


@given(scenario=scenarios(), seed=st.integers(0, 2**32), at=st.integers(0, 20))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_compiled_calls_take_over_amid_a_step(scenario: dict[str, Any], seed: int, at: int) -> None:
    steps, context = scenario["steps"], scenario["context"]
    run = {"seed": seed, "streams": scenario["streams"]}
    _, expected = drive("lru-spec", context, steps, **run)
    cache, got = drive("lru-spec", context, steps, **run, compile_at=at % len(steps))
    cache.check()
    assert got.events == expected.events
    assert got.journal == expected.journal


def test_predictions_beyond_the_horizon_are_left_out() -> None:
    ahead = np.zeros((3, 4), np.float32)
    ahead[0, 2] = 1.0
    steps = make_steps([(0, [0]), (1, [2])], 4, [ahead, ahead])
    context = context_for(steps, 2, 4, 1, 2, "layer")
    cache = ExpertCache(
        context, find_policy("lru-spec:n=1").build(context), compile=True, horizon=1
    )
    cache.begin(steps[0])
    cache.start()
    copy = cache.start()
    assert copy is not None
    assert (copy.key, copy.speculative) == (4 + 2, True)


def test_a_policy_that_raises_is_named_compiled_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from moepolicy import Policy\n"
        "class Mine(Policy):\n"
        "    def __init__(self, context):\n"
        "        pass\n"
        "    def victim(self, layer, incoming, candidates):\n"
        "        return 10_000\n"
    )
    spec = f"{path}:Mine"
    steps = make_steps([(0, [e]) for e in (0, 1, 2, 3)], 4)
    context = context_for(steps, 1, 4, 1, 1, "layer")
    with pytest.raises(PolicyError, match="a key that does not exist"):
        drive(spec, context, steps, compile=True)


def run_afresh(monkeypatch: pytest.MonkeyPatch, folder: Path) -> tuple[Any, Any]:
    """As a new process would: nothing compiled in memory."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
    monkeypatch.setattr(compiled, "_entries", {})
    policy = find_policy("fifo").build(CONTEXT)
    state = compiled_policy(policy)
    counts = np.zeros(1, np.int64)
    function = compiled.compiled(advance, state)
    function(state, counts)
    assert counts[0] == STEP
    assert vars(policy)["eviction_score"][0] == STEP
    return function, policy


def test_code_is_loaded_by_the_next_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    function, policy = run_afresh(monkeypatch, tmp_path)
    assert not function.stats.cache_hits
    assert compiled.is_compiled(advance, policy)
    function, _ = run_afresh(monkeypatch, tmp_path)
    assert function.stats.cache_hits


@pytest.mark.parametrize("suffix", [".nbc", ".nbi"])
def test_a_damaged_file_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, suffix: str
) -> None:
    run_afresh(monkeypatch, tmp_path)
    (file,) = tmp_path.glob(f"*{suffix}")
    file.write_bytes(file.read_bytes()[:100])
    function, _ = run_afresh(monkeypatch, tmp_path)
    assert not function.stats.cache_hits
    function, _ = run_afresh(monkeypatch, tmp_path)
    assert function.stats.cache_hits


def test_a_folder_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    function, _ = run_afresh(monkeypatch, tmp_path / "file" / "cache")
    assert not function.stats.cache_hits


def test_any_change_of_the_code_changes_its_fingerprint() -> None:
    def with_globals(**changed: Any) -> str:
        function = FunctionType(advance.__code__, {**globals(), **changed}, "advance")
        return fingerprint(function, (find_policy("fifo").policy,), frozenset())

    assert with_globals() == with_globals(unrelated=1)
    assert with_globals() != with_globals(STEP=4)
    lru = find_policy("lru").policy
    assert isinstance(advance, FunctionType)
    assert with_globals() != fingerprint(advance, (lru,), frozenset())


class Pair(NamedTuple):
    one: int
    other: int


class Renamed(NamedTuple):
    one: int
    other: int


class Exchanged(NamedTuple):
    other: int
    one: int


def first_of(pair: Pair) -> int:
    return pair.one


def test_a_tuple_s_fields_are_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code finds them by their places, and whoever exchanges two changes no function."""
    assert isinstance(first_of, FunctionType)
    before = fingerprint(first_of, (), frozenset())
    monkeypatch.setitem(globals(), "Pair", Exchanged)
    assert fingerprint(first_of, (), frozenset()) != before
    monkeypatch.setitem(globals(), "Pair", Renamed)
    assert fingerprint(first_of, (), frozenset()) != before


class Method(Policy):
    def __init__(self) -> None:
        self.step = 1

    def total(self) -> int:
        return self.step


class Field(Policy):
    def __init__(self) -> None:
        self.total = np.full(1, 41)

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        self.total[0] += 1


def load_once(policy: Any, counts: Any) -> None:
    policy.on_load(0, False, counts[0])


def ask_total(policy: Any, counts: Any) -> None:
    counts[0] = policy.total()


def test_what_is_a_method_of_one_policy_may_be_a_field_of_another() -> None:
    counts = np.zeros(1, np.int64)
    state = compiled_policy(Method())
    compiled.compiled(ask_total, state)(state, counts)
    assert counts[0] == 1
    field = Field()
    state = compiled_policy(field)
    compiled.compiled(load_once, state)(state, counts)
    assert field.total[0] == 42


def test_of_processes_that_want_one_code_at_a_time_one_compiles_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Who comes second waits for the first, and loads what that has left."""
    import numba

    def added(a: int, b: int) -> int:
        return a + b

    def kept_in(folder: Path) -> Any:
        folder.mkdir()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
        made = numba.njit(added)
        codecache.keep(made, "sum", tell=True)
        return made

    assert kept_in(tmp_path / "of the first")(1, 2) == 3
    waiting = kept_in(tmp_path / "shared")
    first = codecache._Turn(codecache._file_of("sum") + ".lock")
    assert not first.take(), "nobody was there before"
    answers: list[int] = []
    second = threading.Thread(target=lambda: answers.append(waiting(1, 2)))
    second.start()
    second.join(0.5)
    assert not answers
    for file in (tmp_path / "of the first").iterdir():
        shutil.copy(file, tmp_path / "shared")
    first.give()
    second.join()
    assert answers == [3]
    assert sum(waiting.stats.cache_hits.values()) == 1
    assert not list(tmp_path.glob("*/*.lock"))


def test_code_that_nobody_else_compiles_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    holder = codecache._Turn("a.lock")
    assert not holder.take()
    monkeypatch.setattr(codecache, "LOCKED_S", 0.1)
    assert codecache._Turn("a.lock").take(), "it waited, and no longer than it may"
    holder.give()
    assert not codecache._Turn("a.lock").take()


def test_code_that_is_used_outlives_code_that_was_written_later(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An engine is compiled first and serves every policy; users' policies come after it."""
    import numba

    def added(a: int, b: int) -> int:
        return a + b

    def run(name: str) -> int:
        made = numba.njit(added)
        codecache.keep(made, name)
        assert made(1, 2) == 3
        return sum(made.stats.cache_hits.values())

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(codecache, "KEPT", 2)
    run("engine")
    for policy in ("first", "second", "third"):
        run(policy)
        assert run("engine") == 1
    kept = {file.name.split(".")[0] for file in tmp_path.iterdir()}
    assert kept == {"engine", "third"}
    assert len(list(tmp_path.iterdir())) == 4  # an index and code each
