"""One bad policy, simulated or run live in a child, and how that ended.

A policy must run, or be refused in one line that names it. What else it may not do: make a lossless
run differ, end or stop the process, change the routing for others, or take memory without bounds.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stress.files import call
from stress.forks import forked, import_all, resident
from stress.hostile import Hostile, hostile
from stress.outcomes import RAN, REFUSED, TRACEBACK, UNCLEAR, WILD, WRONG, Outcome

SHARES = {"interpreted": 70, "by address": 14, "one piece": 1, "live": 15}
"""The forms in which a policy is run, and how many of a hundred run so."""

SAID, FILE, CLASS = "said", "mine.py", "Hostile"
GROWTH_BYTES = 1 << 30
LONG_TOKENS = 240  # of three layers: beyond the prefix on which compiled code is tried
PROMPT = "It was the best of times"
GENERATE = ("moerun", "generate", "--prompt", PROMPT, "--max-new-tokens", "12", "--slots", "2",
            "--device", "cpu", "--format", "json", "--low", "2bit")  # fmt: skip

Ended = tuple[str, str]


class BadPolicies:
    """The jobs of one worker: a form by its name, and the number of the policy."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._seed = seed
        self._right_text = ""
        os.environ["NUMBA_CACHE_DIR"] = str(root.parent / "code")
        os.environ["XDG_CACHE_HOME"] = str(root.parent / "cache")
        import_all(_modules(root))
        self._workloads = _workloads(root)
        self._compile()

    def __call__(self, case: str, number: int) -> Outcome:
        """Run policy ``number`` in the form ``case``."""
        policy = hostile(f"{self._seed} {case} {number}")
        (self._root / FILE).write_text(policy.source)
        if case == "live" and not self._right_text:
            self._right_text = self._text_of("lru")
        ended = forked(lambda: self._one(case, policy), self._root / SAID)
        outcome, told = ended.value or (ended.how, ended.told)
        return Outcome(case, number, outcome, f"{'; '.join(policy.deeds)} | {told}"[-4000:])

    def _one(self, case: str, policy: Hostile) -> Ended:
        os.chdir(self._root)
        before = resident()
        outcome, told = self._live(policy) if case == "live" else self._simulated(case, policy)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if outcome in (RAN, REFUSED) and grown > GROWTH_BYTES:
            return WILD, f"{grown >> 20} MiB more memory: {told}"
        return outcome, told

    def _text_of(self, policy: str) -> str:
        ended = forked(lambda: self._generated(policy), self._root / SAID)
        assert ended.value is not None, ended
        code, trace, said = ended.value
        assert code == 0, (trace, said)
        return str(parted(said)[1]["text"])

    def _generated(self, policy: str) -> tuple[int, str, str]:
        os.chdir(self._root)
        code, trace = call((*GENERATE, "--policy", policy))
        sys.stdout.flush()
        sys.stderr.flush()
        return code, trace, (self._root / SAID).read_text(errors="replace")

    def _live(self, policy: Hostile) -> Ended:
        code, trace, said = self._generated(f"{FILE}:{CLASS}")
        if trace or "Traceback (most" in said:
            return TRACEBACK, trace or said
        told, report = parted(said)
        about = [
            line
            for line in told.splitlines()
            if f"'{FILE}:{CLASS}'" in line and "runs interpreted" not in line
        ]
        if report is None:
            clear = code in (1, 2) and len(about) == 1 and about[0].startswith("error: ")
            return (REFUSED if clear else UNCLEAR), said
        text = report["text"]
        if policy.lossless and text != self._right_text:
            return WRONG, f"{text!r} in place of {self._right_text!r}: {said}"
        if code == 0:
            return RAN, ""
        return (REFUSED if code == 1 and len(about) == 1 else UNCLEAR), said[:2000]

    def _simulated(self, case: str, policy: Hostile) -> Ended:
        from moepolicy import PolicyError, find_policy
        from moesim.errors import SimulationError

        before = _digest(self._workloads[0]), _digest(self._workloads[1])
        try:
            spec = find_policy(f"{FILE}:{CLASS}")
            told = self._runs(case, policy, spec)
        except (PolicyError, SimulationError) as error:
            told = str(error)
            if CLASS not in told:
                return UNCLEAR, f"names no policy: {told}"
            ended = REFUSED, told
        except Wrong as wrong:
            return WRONG, str(wrong)
        else:
            ended = RAN, ""
        if (_digest(self._workloads[0]), _digest(self._workloads[1])) != before:
            return WRONG, "the routing is another one now"
        return ended

    def _runs(self, case: str, policy: Hostile, spec: Any) -> str:
        from moesim.conformance.runs import CACHES, CheckedPolicy, Compiled
        from moesim.engines.names import Engine

        checked = CheckedPolicy(spec)
        short, long = (each.shown_to(spec) for each in self._workloads)
        vars(checked)["workload"] = short if case == "interpreted" else long
        failures = []
        for size in CACHES[: 3 if case == "interpreted" else 1]:
            plain = _tried(partial(checked.simulate, size, Engine.replay))
            if case == "interpreted":
                require_alike(plain, _tried(partial(checked.simulate, size, Engine.simpy)))
            elif case == "by address":
                compiled = partial(checked.simulate, compilations=Compiled())
                require_alike(plain, _tried(partial(compiled, size, Engine.replay)))
            else:
                context = checked.context(long, size.slots, size.scope)
                _, error = _tried(partial(_decide, long, spec, context))
                require((plain[1] is None) == (error is None), plain[1] or error, "fails")
            if plain[0] is not None and policy.lossless:
                _require_lossless(plain[0].arrays["counters"])
            failures += [plain[1]] if plain[1] else []
        if failures:
            raise failures[0]
        return ""

    def _compile(self) -> None:
        """Compile what serves every policy, for the children to have."""
        from moepolicy import find_policy
        from moesim.conformance.runs import CACHES, CheckedPolicy, Compiled
        from moesim.engines.names import Engine

        for name in ("lru-spec", "adapmoe-skip"):
            spec = find_policy(name)
            checked = CheckedPolicy(spec)
            vars(checked)["workload"] = self._workloads[0].shown_to(spec)
            checked.simulate(CACHES[0], Engine.replay, compilations=Compiled())


def parted(said: str) -> tuple[str, Any]:
    """What was said in lines, and the report in JSON that stands among them, if there is one."""
    lines = said.splitlines()
    if "{" not in lines or "}" not in lines:
        return said, None
    first, last = lines.index("{"), lines.index("}")
    report = json.loads("\n".join(lines[first : last + 1]))
    return "\n".join([*lines[:first], *lines[last + 1 :]]), report


class Wrong(Exception):
    """What no policy may bring about."""


def require(holds: bool, what: Any, how: str) -> None:
    if not holds:
        raise Wrong(f"one form {how}, and another does not: {what}")


def _tried(run: Any) -> tuple[Any, Any]:
    """What a simulation gives, or how the policy failed in it."""
    from moepolicy import PolicyError

    try:
        return run(), None
    except PolicyError as error:
        return None, error


def _decide(workload: Any, spec: Any, context: Any) -> None:
    """Let a policy decide, compiled into one piece with the loop if it can be."""
    from moepolicy.compiled import NotCompilable
    from moesim.engines.timeless import decisions

    try:
        decisions(workload, spec, context)
    except NotCompilable:
        decisions(workload, spec, context, compile=False)


def require_alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    require((one[1] is None) == (other[1] is None), one[1] or other[1], "fails")
    if one[0] is None:
        return
    names = [
        name
        for name, array in one[0].arrays.items()
        if not np.array_equal(array, other[0].arrays[name], equal_nan=array.dtype.kind == "f")
    ]
    require(not names, names, "decides otherwise")
    require(one[0].total_ns == other[0].total_ns, "time", "takes longer")


def _require_lossless(counters: Any) -> None:
    from moepolicy import Kind

    for kind in (Kind.SKIP, Kind.SUBSTITUTE, Kind.LOW, Kind.REROUTE):
        require(counters[kind] == 0, kind.name, "that is lossless by its declaration changes more")


def _digest(workload: Any) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(vars(workload).items()):
        for array in value if isinstance(value, tuple) else (value,):
            if isinstance(array, np.ndarray):
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _modules(root: Path) -> list[str]:
    """What a live run and a simulation import."""
    program = (*GENERATE, "--policy", "lru")

    def work() -> list[str]:
        os.chdir(root)
        call(program)
        importlib.import_module("moesim.conformance")
        return sorted(sys.modules)

    found = forked(work, root / SAID)
    assert not found.how, found
    names: list[str] = found.value
    return names


def _workloads(root: Path) -> Any:
    """A short and a long workload, made in a child: polars, which reads traces, has threads."""
    place = root / "workloads.pickle"

    def work() -> None:
        from moesim.conformance.routing import seeded_workload

        made = [seeded_workload(0, n_tokens=n, horizon=2) for n in (40, LONG_TOKENS)]
        place.write_bytes(pickle.dumps(made))

    ended = forked(work, root / SAID)
    assert not ended.how, ended
    return pickle.loads(place.read_bytes())
