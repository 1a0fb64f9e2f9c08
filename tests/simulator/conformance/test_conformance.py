"""Every policy is put through the suite; what breaks a rule fails it, by name, step and line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from moepolicy import Policy, find_policy
from moepolicy.library import BUILT_IN
from moesim import UsageError
from moesim.conformance import (
    CHECK_NAMES,
    CHECKS,
    CheckResult,
    Status,
    assert_conforms,
    check_policy,
)

OWN = Path(__file__).parents[2] / "support" / "policies.py"
CORNERS = (
    "SlotSpec",
    "Anything",
    "AnythingAhead",
    "AnythingStaged",
    "Rerouting",
    "SharingAhead",
    "Knowing",
)
POLICIES = [*BUILT_IN, *(f"{OWN}:{name}" for name in CORNERS), "lru-spec:n=1,staging=1"]
COMPILING = "compiled"  # takes some ten seconds a policy
QUICK = [name for name in CHECKS if name not in (COMPILING, "time")]  # no test is of time


# Some seconds a policy: of each kind one is among the fast tests.
FAST = {"lru", "lru-spec", "belady-bypass", "hobbit-spec", "cache-conditional", "adapmoe-slots"}
CASES = [
    pytest.param(name, marks=[] if name in FAST or name not in BUILT_IN else pytest.mark.slow)
    for name in POLICIES
]


def test_the_help_names_the_checks_that_there_are() -> None:
    assert tuple(CHECKS) == CHECK_NAMES


@pytest.mark.parametrize("policy", CASES)
def test_every_policy_conforms(policy: str) -> None:
    failed = [one for one in check_policy(policy, QUICK) if one.status is Status.failed]
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_compiles_to_the_same(policy: str) -> None:
    assert_conforms(policy, COMPILING)


def test_checks_that_do_not_apply_say_why() -> None:
    said = {one.check: one.said for one in check_policy("clairvoyant", ["resize", "live"])}
    assert all("knows the future" in text for text in said.values())
    (one,) = check_policy("hobbit", ["limit"])
    assert (one.status, one.said) == (Status.remark, "lossy: the limit does not apply")


HEAD = """
import random; LOG = []
import numpy as np
from moepolicy import Policy
from moepolicy.kinds import SKIP

class Mine(Policy):
    lossy = True
    def __init__(self, context):
        self.n = context.n_experts
        self.seen = []
        self.handle = None
    def victim(self, layer, incoming, candidates):
        return int(candidates[0])
"""
ROUTE = "    def route(self, step, row, resident, chosen):\n"
VICTIM = "    def victim(self, layer, incoming, candidates):\n"
# What the class adds, the check that fails, and what is said; {n} is the line of the mistake.
MISTAKES: dict[str, tuple[str, str, str]] = {
    "raises": (
        "    def on_hit(self, key, now):\n        raise RuntimeError('my table is empty')\n",
        "rules",
        r"RuntimeError: my table is empty \(on_hit, step \d+, .*mine\.py:16\)",
    ),
    "no candidate": (
        f"{VICTIM}        return incoming\n",
        "rules",
        r"victim .*not among the candidates: it answered \d+, .*\(step \d+, .*mine\.py:15\)",
    ),
    "no expert": (
        f"{ROUTE}        chosen[0] = self.n\n",
        "rules",
        r"route chose an expert that does not exist: it answered \[8, \d\], and must answer "
        r"distinct experts of the layer.*\(step 0, .*mine\.py:15\)",
    ),
    "twice": (
        f"{ROUTE}        chosen[0] = chosen[1]\n",
        "rules",
        r"route chose an expert twice for one token: it answered \[(\d), \1\].*"
        r"\(step 0, .*mine\.py:15\)",
    ),
    "random": (
        f"{VICTIM}        return int(candidates[random.randrange(len(candidates))])\n",
        "repeats",
        r"a second run decides differently at step \d+: EVICT of key \d+, then EVICT of key \d+ "
        r"\(.*mine\.py:15\); keep all state in self, draw from what __init__ makes of a seed",
    ),
    "grows in its class": (
        "    log = []\n    def on_hit(self, key, now):\n        self.log.append(key)\n",
        "memory",
        r"memory is not bounded: 'log' has grown by [\d,]+ bytes .*\(on_hit, .*mine\.py:17\)",
    ),
    "grows in its module": (
        "    def on_hit(self, key, now):\n        LOG.append(key)\n",
        "memory",
        r"memory is not bounded: 'LOG' has grown by [\d,]+ bytes .*\(on_hit, .*mine\.py:16\)",
    ),
    "an array": (
        f"{VICTIM}        return candidates[:1]\n",
        "rules",
        r"victim answered \[\d+\], and must answer one of the candidates",
    ),
    "undeclared": (
        "    def on_step(self, step):\n        self.n = step.predicted[0, 0]\n",
        "rules",
        r"IndexError: .*\(on_step, step 0, .*mine\.py:16\); step\.predicted is empty unless the "
        r"class has requires = frozenset\(\{\"predictions\"\}\)",
    ),
    "grows": (
        "    def on_hit(self, key, now):\n        self.seen.append(key)\n",
        "memory",
        r"memory is not bounded: 'seen' has grown by [\d,]+ bytes between step 591 and step 1182 "
        r"\(on_hit, .*mine\.py:16\)",
    ),
    "clock": (
        "    def on_step(self, step):\n        import time; self.now = time.perf_counter()\n"
        "    def on_load(self, key, speculative, now):\n"
        "        self.late = int(self.now * 1e7) % 2\n"
        f"{VICTIM}        return int(candidates[-self.late])\n",
        "repeats",
        r"decides differently at step \d+",
    ),
    "slow": (
        "    def on_hit(self, key, now):\n        self.n = sum(range(100_000))\n",
        "time",
        r"us a step with 8 experts .*longer than a layer, which is \d+ us on rtx3060; slowest: "
        r"on_hit, \d+ us at step \d+ \(.*mine\.py:15\)",
    ),
}


def checked(tmp_path: Path, code: str, check: str) -> CheckResult:
    path = tmp_path / "mine.py"
    path.write_text(HEAD + code)
    (result,) = check_policy(f"{path}:Mine", [check])
    return result


def test_experts_taken_for_keys_are_remarked_upon(tmp_path: Path) -> None:
    ahead = "    requires = frozenset({'logits'})\n    def prefetch(self, step, keys):\n"
    expert = "        keys[0] = np.argmax(step.logits)\n        return 1\n"
    result = checked(tmp_path, ahead + expert, "rules")
    assert result.status is Status.remark
    assert "fetches ahead is of layer 0: a key is layer * n_experts + expert" in result.said
    key = expert.replace("np", "step.layer * self.n + np")
    assert checked(tmp_path, ahead + key, "rules").status is Status.ok


def test_the_memory_of_a_part_is_measured(tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(
        "from moepolicy import Policy\n\nclass Part(Policy):\n"
        "    def __init__(self, context):\n        self.seen = []\n"
        "    def prefetch(self, step, keys):\n        self.seen.append(1)\n        return 0\n"
    )
    (result,) = check_policy(f"lru+{tmp_path / 'part.py'}:Part", ["memory"])
    assert result.status is Status.failed
    assert "memory is not bounded: 'part.seen' has grown by" in result.said


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_and_its_place_is_named(tmp_path: Path, mistake: str) -> None:
    code, check, said = MISTAKES[mistake]
    result = checked(tmp_path, code, check)
    assert result.status is Status.failed
    assert re.search(said, result.said), result.said
    path = tmp_path / "mine.py"
    with pytest.raises(AssertionError, match=f"{check}: "):
        assert_conforms(f"{path}:Mine", check)


def test_what_the_mistakes_are_made_in_is_without_one(tmp_path: Path) -> None:
    for check in ("rules", "repeats", "memory", "live"):
        assert checked(tmp_path, "", check).status is Status.ok


def test_what_cannot_be_measured_or_compiled_is_a_remark(tmp_path: Path) -> None:
    code = "    def on_step(self, step):\n        self.handle = lambda: 0\n"
    memory = checked(tmp_path, code, "memory")
    assert memory.status is Status.remark
    assert "'handle' is a function, which does not pickle" in memory.said
    assert "bounded memory is not guaranteed" in memory.said
    compiled = checked(tmp_path, code, "compiled")
    assert compiled.status is Status.remark
    assert compiled.said.startswith("runs interpreted: Mine.on_step assigns 'handle'")


class Lowest(Policy):
    """Evicts the lowest key."""

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


def test_a_result_beyond_the_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No policy comes to one: here the limit is raised."""
    from moesim.conformance import checks
    from moesim.simulation import simulate as real

    assert_conforms(Lowest, "limit")

    def lucky(*arguments: Any, **more: Any) -> Any:
        row = real(*arguments, **more)
        return type(row)(**{**vars(row), "limit_loads": row.loads + 1})

    monkeypatch.setattr(checks, "simulate", lucky)
    with pytest.raises(AssertionError, match=r"\d+ loads, and no policy can do with fewer than"):
        assert_conforms(Lowest, "limit")


def test_engines_that_disagree_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.conformance.runs import CheckedPolicy
    from moesim.engines.names import Engine

    real = CheckedPolicy.simulate

    def later(self: Any, size: Any, engine: Engine, **more: Any) -> Any:
        found = real(self, size, engine, **more)
        return found._replace(stall_ns=found.stall_ns + (engine is Engine.simpy))

    monkeypatch.setattr(CheckedPolicy, "simulate", later)
    with pytest.raises(AssertionError, match=r"SimPy and replay, .*: they differ in stall_ns"):
        assert_conforms("lru", "engines")


def test_a_composition_is_checked_as_a_whole() -> None:
    """Its hooks are those of the class that asks its parts: they take time."""
    found = {one.check: one for one in check_policy("lru+gate(n=1)", ["rules", "live", "time"])}
    assert {one.status for one in found.values()} == {Status.ok}
    assert "by journal" in found["live"].said
    assert "interpreted, 0.0 us" not in found["time"].said


def test_the_seed_makes_the_routing() -> None:
    def said(seed: int) -> str:
        (result,) = check_policy(find_policy("lru"), ["limit"], seed=seed)
        return result.said

    assert said(0) == said(0) != said(1)


def test_an_unknown_check_is_refused() -> None:
    with pytest.raises(UsageError, match="no check 'speed'; there are: rules, "):
        list(check_policy("lru", ["speed"]))
