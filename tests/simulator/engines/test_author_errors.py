"""What an author's policy does wrong, and what compiling cannot do: told alike by every engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from moepolicy import PolicyError, find_policy
from moepolicy.reasons import why_not
from moeroute import open_trace
from moesim import load_workload
from moesim.engines import choose as engines
from moesim.engines.compilations import Compilations
from moesim.engines.names import Engine
from moesim.machine.costs import Sizes, costs_of
from support.machines import machine
from support.pages import pages, snippet

STATE = "import numpy as np\nfrom moepolicy import Policy\n\n\nclass Mine(Policy):\n"


@pytest.fixture(scope="module")
def workload() -> Any:
    return load_workload(open_trace("tiny"), predictions=True).head(120)


def policy(tmp_path: Path, code: str) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(code)
    return find_policy(f"{path}:Mine")


def run(workload: Any, spec: Any, engine: Engine = Engine.replay, **more: Any) -> Any:
    costs = costs_of(workload, machine(), Sizes(10, 5, 0, 0), predicting=False)
    context = workload.context(4, "layer")
    known = more.pop("known", None) or Compilations()
    cache, clock = engines.run(
        workload, spec, context, costs, compilations=known, engine=engine, **more
    )
    return cache.counters.tolist(), clock.total_ns


def told(workload: Any, spec: Any, engine: Engine, known: Compilations | None = None) -> str:
    with pytest.raises(PolicyError) as caught:
        run(workload, spec, engine, known=known)
    return str(caught.value)


def both_ways(workload: Any, spec: Any) -> tuple[Any, Any, Compilations]:
    """Interpreted, then compiled where that can be; and what was learnt of that."""
    known = Compilations(worth_compiling=0)
    return run(workload, spec), run(workload, spec, known=known), known


def test_the_policy_of_the_page_is_compiled_as_it_stands(tmp_path: Path, workload: Any) -> None:
    code = snippet(pages()["docs/policy-interface.md"], "# mine.py")
    spec = policy(tmp_path, code.replace("half_life=1000", "half_life=50"))
    interpreted, compiled, known = both_ways(workload, spec)
    assert compiled == interpreted
    assert known.interpreted == {}
    assert (Engine.replay, spec.policy) in known.proven


BEYOND = [
    ("self.n += 1", r"Mine\.on_hit assigns 'n' \(line 11\): keep what changes in the entries"),
    ("self.uses = self.uses + 1", r"Mine\.on_hit assigns 'uses' \(line 11\)"),
    (
        "sorted([key], key=lambda one: self.uses[one])",
        r"mine\.py:11: numba: Cannot capture the non-constant value associated with",
    ),
]


@pytest.mark.parametrize(
    ("setup", "line", "says"),
    [
        ("import time\n", "time.sleep(0)", r"mine\.py:\d+: numba: time\.sleep does not compile"),
        ("", "self.log.append(key)", r"numba: self\.log is not set in __init__ as an array or a n"),
    ],
)
def test_what_numba_does_not_know_is_told_without_its_listings(
    tmp_path: Path, workload: Any, setup: str, line: str, says: str
) -> None:
    spec = policy(
        tmp_path,
        f"{setup}{STATE}    log = []\n    def __init__(self, context):\n"
        "        self.uses = np.zeros(context.n_keys, np.int64)\n"
        f"    def on_hit(self, key, now):\n        {line}\n"
        "    def victim(self, layer, incoming, candidates):\n        return candidates[0]\n",
    )
    _, _, known = both_ways(workload, spec)
    assert re.search(says, known.interpreted[spec.policy])


def test_the_colours_of_numba_are_no_part_of_a_reason() -> None:
    coloured = ValueError("\x1b[1m\x1b[1mCannot capture it\x1b[0m\n\x1b[1mDuring: typing\x1b[0m")
    assert why_not(coloured, frozenset()) == "numba: Cannot capture it"


@pytest.mark.parametrize(("line", "reason"), BEYOND)
def test_what_does_not_compile_runs_interpreted_and_says_why(
    tmp_path: Path,
    workload: Any,
    capsys: pytest.CaptureFixture[str],
    line: str,
    reason: str,
) -> None:
    spec = policy(
        tmp_path,
        STATE + "    def __init__(self, context):\n"
        "        self.uses = np.zeros(context.n_keys, np.int64)\n        self.n = 0\n\n"
        f"    def on_hit(self, key, now):\n        {line}\n"
        "    def victim(self, layer, incoming, candidates):\n        return candidates[0]\n",
    )
    interpreted, found, known = both_ways(workload, spec)
    assert found == interpreted
    assert re.search(reason, known.interpreted[spec.policy])
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(f"runs interpreted, some 100 times slower: {reason}", said)


def test_an_error_of_compiled_code_alone_is_no_error_of_the_run(
    tmp_path: Path, workload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = policy(
        tmp_path, STATE + "    def victim(self, layer, incoming, candidates):\n"
        "        return candidates[0]\n"
    )  # fmt: skip
    expected, compiled, known = both_ways(workload, spec)
    assert compiled == expected
    real = engines._Replay.run

    def fails_compiled(self: Any, *, compile: bool, n_steps: int | None = None) -> Any:
        found = real(self, compile=compile, n_steps=n_steps)
        if compile:
            raise NotImplementedError("a failure of the compiler's")
        return found

    monkeypatch.setattr(engines._Replay, "run", fails_compiled)
    assert run(workload, spec, known=known) == expected
    assert "a failure of the compiler's" in known.interpreted[spec.policy]


LATE = "        self.n[0] += 1\n        return {answer} if self.n[0] > 100 else candidates[0]\n"
WRONG = [
    ("-7", "victim named a negative key that is not -1: it answered -7, and must answer one of"),
    ("incoming", r"victim named a key that was not among the candidates: it answered \d+, and"),
    pytest.param(
        "10_000",
        "victim named a key that does not exist: it answered 10000, and must answer one",
        marks=pytest.mark.slow,
    ),
    ("[][0]", r"IndexError: .* \(victim, step \d+, .*mine\.py:10\)"),
    pytest.param(
        "self.absent[0]",
        r"AttributeError: .*'absent' \(victim, step \d+, .*mine\.py:10\)",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("answer", "says"), WRONG)
def test_a_wrong_answer_is_told_alike_by_every_engine(
    tmp_path: Path, workload: Any, answer: str, says: str
) -> None:
    spec = policy(
        tmp_path,
        STATE + "    def __init__(self, context):\n        self.n = np.zeros(1, np.int64)\n"
        "    def victim(self, layer, incoming, candidates):\n" + LATE.format(answer=answer),
    )
    interpreted = told(workload, spec, Engine.replay)
    assert re.search(says, interpreted), interpreted
    assert re.search(r"step \d+, .*mine\.py:\d+\)$", interpreted)
    assert told(workload, spec, Engine.simpy) == interpreted
    if answer == "-7":  # compiling takes seconds
        known = Compilations(worth_compiling=0, prefix=8)  # before it goes wrong
        assert told(workload, spec, Engine.replay, known) == interpreted
        assert told(workload, spec, Engine.simpy, known) == interpreted
        assert len(known.proven) == 2  # it was compiled code that failed


HOOKS = [
    ("def victim(self, layer, incoming, candidates): return None", "victim answered None"),
    ("def victim(self, layer, incoming, candidates): return 2.5", r"victim answered 2\.5"),
    ("def prefetch(self, step, keys): return -2", "prefetch answered a number of keys that.* -2"),
    ("def prefetch(self, step, keys): return 1000", "prefetch answered a number of keys that"),
    ("def prefetch(self, step, keys): return [1]", r"prefetch answered \[1\], and must answer how"),
    ("def on_miss(self, step, rank): return 99", "on_miss answered none of LOAD, COMPUTE.* 99"),
    ("def on_miss(self, step, rank): return 13 + 2", "substitute named a key .* answered -3"),
    ("def on_step(self, step): step.predicted[0]", r"IndexError: .* \(on_step, step 0, "),
]


@pytest.mark.parametrize(("hook", "says"), HOOKS)
def test_every_hook_s_wrong_answer_names_the_hook(
    tmp_path: Path, workload: Any, hook: str, says: str
) -> None:
    body = "    def victim(self, layer, incoming, candidates): return candidates[0]\n"
    body += "    def substitute(self, step, rank, candidates): return -3\n"
    spec = policy(tmp_path, f"{STATE}    lossy = True\n{body}    {hook}\n")
    message = told(workload, spec, Engine.replay)
    assert re.search(says, message), message
    assert told(workload, spec, Engine.simpy) == message


def test_predictions_beyond_the_declared_horizon_are_not_there(
    tmp_path: Path, workload: Any
) -> None:
    assert len(workload.predicted) == 3
    code = (
        f"{STATE}    requires = frozenset({{'predictions'}})\n    horizon = 2\n"
        "    def victim(self, layer, incoming, candidates): return candidates[0]\n"
        "    def prefetch(self, step, keys):\n        step.predicted[ROW]\n        return 0\n"
    )
    spec = policy(tmp_path, code.replace("ROW", "1"))
    assert run(workload, spec) == run(workload, spec, Engine.simpy)
    spec = policy(tmp_path, code.replace("ROW", "2"))
    for engine in (Engine.replay, Engine.simpy):
        assert "IndexError" in told(workload, spec, engine)
