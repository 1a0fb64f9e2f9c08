"""Compile what serves every policy before it is needed: `python -m moesim.ahead [WHAT ...]`.

Without arguments it compiles everything, the built-in policies' hooks too, on all cores: so does
`make install`. A run that finds nothing compiled has a part of it done by this command while it
compiles the rest itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from moepolicy import Context, PolicyError, find_policy, policy_names
from moepolicy.calls import answer_mail, new_mail
from moepolicy.codecache import code_folder, share_code
from moepolicy.compiled import allow_memory
from moepolicy.pointers import compile_hooks, compile_machine, engine, pointed, unlinked
from moepolicy.routing import routing_buffers
from moepolicy.state import new_cache
from moeroute import open_trace

from moesim.curves.hit_ratios import ONE_PASS, hit_curve
from moesim.engines import replay_state
from moesim.engines.one_piece import ONE_PIECE, named, piece
from moesim.engines.replay import replay
from moesim.machine.costs import Sizes, costs_of
from moesim.machine.profile import DEFAULT_MACHINE, load_machine
from moesim.machine.speed import with_constants
from moesim.simulation import simulate
from moesim.workload.loading import load_workload
from moesim.workload.steps import Workload


def main(arguments: Sequence[str]) -> int:
    """Compile what ``arguments`` name, or everything; returns the exit code."""
    if not arguments:
        return _everything()
    if arguments[0] == ONE_PIECE:
        os.nice(10)  # others are waiting for the cores
        _one_piece(*arguments[1:])
        return 0
    for what in arguments:
        if what in UNITS:
            UNITS[what]()
        else:
            _hooks(what)
    return 0


def _everything() -> int:
    """Compile all there is, on all cores. Returns 1, having said why, where that cannot be kept."""
    folder = code_folder()
    share_code()
    if code_folder() != folder:
        print(f"error: {folder} cannot be written: set NUMBA_CACHE_DIR", file=sys.stderr)
        return 1
    names = list(policy_names())
    n = os.cpu_count() or 1
    shares = [*([unit] for unit in UNITS), *(names[i::n] for i in range(n))]

    def work(share: list[str]) -> int:
        command = [sys.executable, "-m", "moesim.ahead", *share]
        return subprocess.run(command, check=False).returncode

    with ThreadPoolExecutor(n) as pool:
        return int(any(pool.map(work, filter(None, shares))))


def _small() -> Workload:
    return load_workload(open_trace("tiny"), logits=True, predictions=True).head(2)


def _told(workload: Workload) -> Context:
    """What any policy can be made from."""
    machine, sizes = load_machine(DEFAULT_MACHINE), Sizes(2, 1, 1, 1, low_bytes=1)
    return with_constants(workload.context(2, "layer"), machine, sizes)


def _machine() -> None:
    workload = _small()
    context = workload.context(2, "layer")
    compile_machine(new_cache(context, find_policy("lru").build(context)))


def _replay() -> None:
    workload = _small()
    context = workload.context(2, "layer")
    linked = unlinked(new_cache(context, find_policy("lru").build(context)))
    costs = costs_of(workload, load_machine(DEFAULT_MACHINE), Sizes(1, 1, 1, 1), predicting=False)
    clocks = replay_state.new_clocks(costs, workload.n_keys)
    steps = pointed(replay_state.work_of(workload))
    outcome = np.zeros(context.n_experts, np.int8)
    given = (steps, pointed(costs), pointed(clocks), (0, 0))
    details, routing = workload.details(0, 1), routing_buffers(context, None)
    engine(replay, linked)(*linked, *given, pointed(details), pointed(routing), outcome)


def _calls() -> None:
    workload = _small()
    context = workload.context(2, "layer")
    linked = unlinked(new_cache(context, find_policy("lru").build(context)))
    mail = pointed(new_mail(context.n_experts, 1))
    engine(answer_mail, linked)(*linked, mail)


def _one_piece(policy: str, omit: str) -> None:
    """Compile the replay with a policy as one piece, without the functions named in ``omit``."""
    spec = find_policy(policy)
    workload = _small().shown_to(spec)
    context = _told(workload)
    built = spec.build(context)
    function, state = piece(built, named(omit))
    costs = costs_of(workload, load_machine(DEFAULT_MACHINE), Sizes(1, 1, 1, 1), predicting=False)
    clocks = replay_state.new_clocks(costs, workload.n_keys)
    outcome = np.zeros(context.n_experts, np.int8)
    scratch = routing_buffers(context, None), outcome
    cache, work = new_cache(context, built), replay_state.work_of(workload)
    function(cache, state, work, costs, clocks, (0, 0), workload.details(0, 1), *scratch)


def _limits() -> None:
    machine = load_machine(DEFAULT_MACHINE)
    simulate(_small(), find_policy("lru"), machine, slots=2, expert_bytes=1)


def _curves() -> None:
    for policy in ONE_PASS:
        hit_curve(_small(), policy, "layer")


UNITS: dict[str, Callable[[], None]] = {
    "machine": _machine,
    "replay": _replay,
    "limits": _limits,
    "calls": _calls,
    "curves": _curves,
}
"""What serves every policy, in the order in which it takes long."""


def _hooks(name: str) -> None:
    """Compile a policy's hooks; one that cannot be compiled is left to run interpreted."""
    try:
        spec = find_policy(name)
        policy = spec.build(_told(_small()))
    except PolicyError:
        return  # it needs parameters
    try:
        try:
            compile_hooks(policy)
        except Exception as error:
            if not allow_memory(policy, error):
                raise
            compile_hooks(policy)
    except Exception as error:  # numba's own, of many classes
        print(f"policy '{name}' runs interpreted: {type(error).__name__}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
