"""What a policy takes: memory that must not grow for ever, and time that a layer must cover."""

from __future__ import annotations

import inspect
import pickle
import re
import time
from collections import deque
from collections.abc import Callable
from functools import wraps
from statistics import median
from typing import Any

from moepolicy.compiled import NotCompilable, compiled_policy
from moepolicy.policy import HOOKS, Policy, defines

from moesim.conformance.checks import Remark, Violation
from moesim.conformance.runs import CheckedPolicy, place_of, serve, steps_of
from moesim.machine.profile import DEFAULT_MACHINE, load_machine

GROWS = 0.5  # bytes a step: more than counters that grow longer, less than an entry a step
CONTAINERS = (list, dict, set, bytearray, deque)
SHAPES = ((8, 2, 15.0), (128, 8, 60.0))  # experts a layer, top-k, and the goal in us


def keeps_its_size(checked: CheckedPolicy) -> str:
    """Its state does not grow with the steps: a server runs for ever."""
    workload = checked.long_workload
    cache = checked.cache_for(workload, 4, "layer")
    half, last = workload.n_steps // 2, workload.n_steps
    early: dict[str, int] = {}
    for step, rows in steps_of(workload):
        if step.number == half:
            early = _sizes(cache.policy)
        serve(cache, step, rows)
    late = _sizes(cache.policy)
    grown = {
        name: late[name] - early.get(name, 0)
        for name in late
        if late[name] - early.get(name, 0) > GROWS * (last - half)
    }
    if grown:
        told = [
            f"'{name}' has grown by {n:,} bytes between step {half} and step {last}"
            f"{_where_used(type(cache.policy), name)}"
            for name, n in grown.items()
        ]
        raise Violation(f"its memory is not bounded: {'; '.join(told)}")
    return f"{sum(late.values()):,} bytes after {last} steps, {sum(early.values()):,} after {half}"


def _sizes(policy: Policy) -> dict[str, int]:
    """The pickled size of each thing it keeps. Remark where one cannot be pickled."""
    found: dict[str, int] = {}
    for name, value in _kept(policy).items():
        if isinstance(value, Policy):  # a composition's part
            found |= {f"{name}.{inner}": size for inner, size in _sizes(value).items()}
            continue
        try:
            found[name] = len(pickle.dumps(value))
        except Exception as error:  # whatever the attribute's own class raises
            raise Remark(
                f"cannot be measured: '{name}' is a {type(value).__name__}, which does not pickle "
                f"({type(error).__name__}); bounded memory is not guaranteed"
            ) from error
    return found


def _kept(policy: Policy) -> dict[str, Any]:
    """What a policy keeps: its own attributes, and containers of its class and its module."""
    found: dict[str, Any] = {}
    for cls in type(policy).__mro__:
        if cls is Policy or not issubclass(cls, Policy):
            continue
        found |= {n: v for n, v in vars(cls).items() if isinstance(v, CONTAINERS)}
        for method in filter(inspect.isfunction, vars(cls).values()):
            known = {n: method.__globals__.get(n) for n in method.__code__.co_names}
            found |= {n: v for n, v in known.items() if isinstance(v, CONTAINERS)}
    return found | vars(policy)


def _where_used(policy: type[Policy], attribute: str) -> str:
    """The first line of a hook, or of what a hook calls, that names ``attribute``."""
    for name, method in vars(policy).items():
        if name == "__init__" or not inspect.isfunction(method):
            continue
        try:
            lines, first = inspect.getsourcelines(method)
        except OSError:
            return ""
        for number, line in enumerate(lines, first):
            if re.search(rf"\b{attribute}\b", line):
                return f" ({name}, {method.__code__.co_filename}:{number})"
    return ""


def takes_little_time(checked: CheckedPolicy) -> str:
    """Its hooks, interpreted, take less time than a layer that runs meanwhile."""
    machine = load_machine(DEFAULT_MACHINE)
    told = []
    for n_experts, top_k, goal_us in SHAPES:
        spent = _spent_us(checked, n_experts, top_k)
        middle = median(sum(hooks.values()) for hooks in spent)
        told.append(f"{middle:.1f} us a step with {n_experts} experts (goal {goal_us:.0f} us)")
        layer_us = 1e6 * (machine.compute.layer_s + top_k * machine.compute.expert_s)
        if middle > layer_us and not _lends_itself(checked):
            raise Violation(_too_slow(checked, spent, told[-1], layer_us, machine.name))
    return f"interpreted, {', '.join(told)}"


def _spent_us(checked: CheckedPolicy, n_experts: int, top_k: int) -> list[dict[str, float]]:
    """Of each step, what each hook took: microseconds."""
    workload = checked.wide_workload(n_experts, top_k)
    policy = checked.spec.build(workload.context(n_experts // 2, "layer"))
    cls = type(policy)  # of a composition it is not the spec's
    spent: list[dict[str, float]] = []
    own = [hook for hook in HOOKS if defines(cls, hook)]
    hooks = {hook: _timed(getattr(cls, hook), hook, spent) for hook in own}
    policy.__class__ = type(cls.__name__, (cls,), hooks)
    cache = checked.cache_for(workload, n_experts // 2, "layer", policy=policy)
    for step, rows in steps_of(workload):
        spent.append({})
        serve(cache, step, rows)
    return spent


def _timed(method: Callable[..., Any], hook: str, spent: list[dict[str, float]]) -> Any:
    @wraps(method)
    def call(*arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            taken = 1e6 * (time.perf_counter() - begin)
            spent[-1][hook] = spent[-1].get(hook, 0.0) + taken

    return call


def _lends_itself(checked: CheckedPolicy) -> bool:
    """Whether a live run compiles the policy, and is then some 100 times faster."""
    try:
        compiled_policy(checked.spec.build(checked.context(checked.workload, 4, "layer")))
    except NotCompilable:
        return False
    return True


def _too_slow(
    checked: CheckedPolicy, spent: list[dict[str, float]], told: str, layer_us: float, machine: str
) -> str:
    """Which hook is the slowest, and the step at which it was."""
    step = max(range(len(spent)), key=lambda number: sum(spent[number].values()))
    hook = max(spent[step], key=lambda name: spent[step][name])
    place = place_of(checked.spec.policy, hook)
    return (
        f"{told}, longer than a layer, which is {layer_us:.0f} us on {machine}; slowest: {hook}, "
        f"{spent[step][hook]:.0f} us at step {step} ({place})"
    )
