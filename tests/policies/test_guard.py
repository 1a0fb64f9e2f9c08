"""What a policy may not do by mistake: change what it is shown, end the run, change the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moepolicy import Context, ExpertCache, Policy, PolicyError, PolicySpec, Step, find_policy
from moepolicy.fitted import checked_arrays
from moepolicy.kinds import LOAD, LOW, SKIP, SUBSTITUTE
from moesim.conformance.routing import seeded_workload
from moesim.conformance.runs import CACHES, CheckedPolicy
from moesim.engines.names import Engine

CONTEXT = Context(n_layers=2, n_experts=4, top_k=2, slots=2)


class First(Policy):
    """Evicts the lowest key."""

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        return int(candidates[0])


class Sorts(First):
    """Changes an array of a step in place, as an author does who does not think of it."""

    requires = frozenset({"logits", "predictions", "tokens"})

    def __init__(self, context: Context, what: str = "logits") -> None:
        self.what = what

    def on_step(self, step: Step) -> None:
        getattr(step, self.what).sort()


class Routes(First):
    """The same, where a token's experts are asked for."""

    lossy = True

    def __init__(self, context: Context, what: str = "logits") -> None:
        self.what = what

    def route(self, step: Step, row: int, resident: Any, chosen: Any) -> None:
        getattr(step, self.what).sort()


class Quits(First):
    """Ends the process, from one call on."""

    def __init__(self, context: Context, hook: str = "victim") -> None:
        if hook == "__init__":
            raise SystemExit
        self.hook = hook

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        if self.hook == "on_load":
            raise GeneratorExit

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        raise SystemExit(0)


class Answers(First):
    """Answers a miss with what changes the result, and says nothing of it."""

    requires = frozenset({"low"})

    def __init__(self, context: Context, answer: int = LOAD) -> None:
        self.answer = answer

    def on_miss(self, step: Step, rank: int) -> int:
        return self.answer

    def substitute(self, step: Step, rank: int, candidates: Any) -> int:
        return int(candidates[0])


class StandsInForNobody(First):
    """Writes a key of its own among the candidates and answers with it."""

    lossy = True

    def on_miss(self, step: Step, rank: int) -> int:
        return SUBSTITUTE

    def substitute(self, step: Step, rank: int, candidates: Any) -> int:
        candidates[0] = (step.layer + 1) % 2 * 4
        return int(candidates[0])


def simulated(policy: type[Policy], engine: Engine, **parameters: Any) -> None:
    CheckedPolicy(PolicySpec(policy.__name__, policy, parameters)).simulate(CACHES[0], engine)


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
@pytest.mark.parametrize(
    ("policy", "what"),
    [
        *((Sorts, what) for what in ("experts", "weights", "logits", "predicted", "token_ids")),
        *((Routes, what) for what in ("experts", "weights", "logits")),
    ],
)
def test_a_step_s_arrays_cannot_be_changed_by_mistake(
    engine: Engine, policy: type[Policy], what: str
) -> None:
    with pytest.raises(PolicyError, match=r"^policy '.*' failed: ValueError: .*read-only"):
        simulated(policy, engine, what=what)


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
@pytest.mark.parametrize("hook", ["__init__", "victim", "on_load"])
def test_a_policy_that_would_end_the_process_is_named(engine: Engine, hook: str) -> None:
    with pytest.raises(PolicyError, match=r"^policy 'Quits.*it raised (SystemExit|GeneratorExit)"):
        simulated(Quits, engine, hook=hook)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Speechless(First):
    """Raises what cannot be printed."""

    def __init__(self, context: Context, hook: str = "victim") -> None:
        if hook == "__init__":
            raise Unspeakable

    def victim(self, layer: int, incoming: int, candidates: Any) -> int:
        raise Unspeakable


@pytest.mark.parametrize("hook", ["__init__", "victim"])
def test_an_error_that_cannot_say_anything_is_told_by_its_class(hook: str) -> None:
    with pytest.raises(PolicyError, match=r"^policy 'Speechless.*: Unspeakable( \(.*)?$"):
        simulated(Speechless, Engine.replay, hook=hook)


def test_a_policy_s_file_that_would_end_the_process_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(PolicyError, match=r"mine\.py does not load: .*SystemExit"):
        find_policy(f"{file}:Mine")


def test_a_policy_s_file_may_have_another_encoding(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "# coding: latin-1\nfrom moepolicy import Policy\n\n\nclass Mine(Policy):\n"
    text += '    """Größe."""\n\n    def victim(self, layer, incoming, candidates):\n'
    text += "        return int(candidates[0])\n"
    file.write_bytes(text.encode("latin-1"))
    assert find_policy(f"{file}:Mine").policy.__doc__ == "Größe."


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
@pytest.mark.parametrize("answer", [LOW, SKIP, SUBSTITUTE])
def test_only_a_policy_that_declares_it_may_change_the_result(engine: Engine, answer: int) -> None:
    with pytest.raises(PolicyError, match="put lossy = True into the class: it answered"):
        simulated(Answers, engine, answer=answer)
    simulated(Answers, engine, answer=LOAD)


def test_only_a_resident_of_the_layer_stands_in_for_another() -> None:
    workload = seeded_workload(0, n_layers=2, n_experts=4).shown_to(
        PolicySpec("x", StandsInForNobody)
    )
    cache = ExpertCache(CONTEXT, StandsInForNobody(CONTEXT))

    def run() -> None:
        for number in range(workload.n_steps):
            cache.begin(workload.step(number))
            while copy := cache.start():
                cache.finish(copy.key)
            cache.end()

    with pytest.raises(PolicyError, match="not among the candidates"):
        run()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (None, "no dict"),
        ({}, "no dict"),
        ([np.zeros(1)], "no dict"),
        ({3: np.zeros(1)}, "an array named 3"),
        ({"a": [1.0]}, "no array of numbers as 'a'"),
        ({"a": np.array(["x"])}, "no array of numbers as 'a'"),
        ({"a": np.array([None])}, "no array of numbers as 'a'"),
        ({"a": np.array([np.nan])}, "'a' that is not finite"),
    ],
)
def test_what_was_fitted_or_learned_is_arrays_of_numbers_by_name(answer: Any, said: str) -> None:
    with pytest.raises(PolicyError, match=f"policy 'mine' failed: learned answered {said}"):
        checked_arrays("mine", "learned", answer)
