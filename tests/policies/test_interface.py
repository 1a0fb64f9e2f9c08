"""A class that is not the policy its author meant is told in one line, before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from moepolicy import Context, PolicyError, PolicySpec, find_policy, policy_names
from moepolicy.interface import check_class

CONTEXT = Context(n_layers=2, n_experts=4, top_k=2, slots=2)
VICTIM = "def victim(self, layer, incoming, candidates): return int(candidates[0])"


def find(tmp_path: Path, *body: str, spec: str = "Mine") -> PolicySpec:
    lines = "".join(f"    {line}\n" for line in body)
    (tmp_path / "mine.py").write_text(
        f"from moepolicy import Policy\nimport numpy as np\nclass Mine(Policy):\n{lines}"
        "an_instance = 3\n"
    )
    return find_policy(f"{tmp_path}/mine.py:{spec}")


MISTAKES = [
    (["def on_hits(self, key, now): pass"], "'on_hits', which nothing calls: .* hook 'on_hit'?"),
    (["def prefetchs(self, step, keys): return 0"], "the hook 'prefetch'?"),
    (["def onLoad(self, key, speculative, now): pass"], "the hook 'on_load'?"),
    (["requirs = frozenset({'predictions'})"], "the declaration 'requires'?"),
    (["def on_hit(self, key): pass"], r"on_hit is called as on_hit\(self, key, now\), and is"),
    (["def on_step(self, step, more): pass"], r"on_step is called as on_step\(self, step\)"),
    (["victim = 3"], "victim is a int, not victim"),
    (["def prefetch(self, step, keys): yield 1"], "prefetch must return its answer, not await"),
    (["def __init__(self): pass"], "__init__ takes the context first"),
    (["requires = 'predictions'"], "requires is 'predictions', and must be a set of names"),
    (["requires = {'prediction'}"], "requires 'prediction': did you mean 'predictions'?"),
    (["horizon = 0"], "horizon is 0, and must be the number of layers ahead"),
    (["lossy = None"], "lossy is None, and must be True or False"),
    (["made_of = (int,)"], "made_of and only are for compositions alone"),
    (["made_of = None"], "made_of and only are for compositions alone"),
    (["only = 3"], "made_of and only are for compositions alone"),
]


@pytest.mark.parametrize(("body", "says"), MISTAKES)
def test_a_mistaken_class_is_told(tmp_path: Path, body: list[str], says: str) -> None:
    with pytest.raises(PolicyError, match=says) as caught:
        find(tmp_path, VICTIM, *body)
    assert "\n" not in str(caught.value)
    assert "mine.py:Mine" in str(caught.value)


def test_a_policy_without_a_victim_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"has no victim: define victim\(self, layer, incoming"):
        find(tmp_path, "def on_hit(self, key, now): pass")


def test_a_part_alone_is_told_how_to_give_it(tmp_path: Path) -> None:
    says = r"has no victim: .* or give it as a part of another policy, lru\+.*mine\.py:Mine$"
    with pytest.raises(PolicyError, match=says):
        find(tmp_path, "def prefetch(self, step, keys): return 0")


def test_what_is_no_class_is_told(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="an_instance is not a class, but a int"):
        find(tmp_path, VICTIM, spec="an_instance")
    with pytest.raises(PolicyError, match="Policy is not a policy: derive its class"):
        find(tmp_path, VICTIM, spec="Policy")


def test_helpers_and_names_of_ones_own_pass(tmp_path: Path) -> None:
    spec = find(
        tmp_path,
        "factor = 2",
        "def on_hit(self, key, now): self.on_hits(key)",
        "def on_hits(self, key): pass",
        "def _victims(self): pass",
        "def score(self, key): return 0",
        "@staticmethod",
        "def victim(layer, incoming, candidates): return int(candidates[0])",
    )
    assert spec.build(CONTEXT).victim(0, 1, np.array([2, 3])) == 2


def test_every_built_in_policy_passes() -> None:
    for name in policy_names():
        check_class(name, find_policy(name).policy)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("Mine:n=1", "policy '.*' needs m: give .*:m=VALUE"),
        ("Mine:m=1,m=2", "gives 'm' twice"),
        ("Mine:m=1,flag=maybe", "flag must be true or false, not 'maybe'"),
        ("Mine:m=1,n=nan", "n must be a number, not 'nan'"),
        ("Mine:m=1,n=", "n must be a number, not ''"),
        ("Mine:m=1,k=2", "has no parameter 'k': it has m, n, flag, word"),
    ],
)
def test_a_parameter_that_does_not_fit_is_told(tmp_path: Path, spec: str, says: str) -> None:
    body = "def __init__(self, context, m, n=0.5, flag=True, word=''): pass"
    with pytest.raises(PolicyError, match=says):
        find(tmp_path, VICTIM, body, spec=spec)


def test_parameters_take_the_type_of_their_defaults(tmp_path: Path) -> None:
    body = "def __init__(self, context, flag=True, word='', n=1): pass"
    spec = find(tmp_path, VICTIM, body, spec="Mine:flag=false,word=12,n=3")
    assert spec.parameters == {"flag": False, "word": "12", "n": 3}


def test_an_init_that_raises_is_told_with_its_line(tmp_path: Path) -> None:
    spec = find(tmp_path, VICTIM, "def __init__(self, context): context.slotz")
    with pytest.raises(PolicyError, match=r"could not be made: AttributeError: .*mine\.py:5\)"):
        spec.build(CONTEXT)


def test_a_policy_is_given_what_it_requires_and_no_more(tmp_path: Path) -> None:
    init = "def __init__(self, context): self.got = context"
    counts = np.ones((2, 4), np.int64)
    context = CONTEXT._replace(counts=counts, next_use=np.zeros(1, np.int64))
    got = find(tmp_path, VICTIM, init).build(context).got  # type: ignore[attr-defined]
    assert (got.counts, got.next_use) == (None, None)
    spec = find(tmp_path, VICTIM, init, "requires = frozenset({'counts'})")
    shown = spec.build(context).got.counts  # type: ignore[attr-defined]
    assert shown.tolist() == counts.tolist()
    with pytest.raises(ValueError, match="read-only"):
        shown[:] = 0
    with pytest.raises(PolicyError, match="needs the expert counts of a calibration trace"):
        spec.build(CONTEXT)


def test_a_policy_is_given_what_it_welcomes_where_that_is_known(tmp_path: Path) -> None:
    init = "def __init__(self, context): self.got = context"
    spec = find(tmp_path, VICTIM, init, "welcomes = frozenset({'speed'})")
    known = CONTEXT._replace(copy_over_layer=3.0, expert_bytes=7)
    got = spec.build(known).got  # type: ignore[attr-defined]
    assert (got.copy_over_layer, got.expert_bytes) == (3.0, None)
    unknown = spec.build(CONTEXT).got.copy_over_layer  # type: ignore[attr-defined]
    assert np.isnan(unknown)
    with pytest.raises(PolicyError, match="welcomes 'counts': there are: bytes, speed"):
        find(tmp_path, VICTIM, "welcomes = frozenset({'counts'})")


def test_the_horizon_is_what_is_declared(tmp_path: Path) -> None:
    needs = "requires = frozenset({'predictions'})"
    assert find(tmp_path, VICTIM, "horizon = 2").horizon == 0
    assert find(tmp_path, VICTIM, needs).horizon == 1
    assert find(tmp_path, VICTIM, needs, "horizon = 3").horizon == 3
    init = "def __init__(self, context, horizon=2): pass"
    assert find(tmp_path, VICTIM, needs, init).horizon == 2
    assert find(tmp_path, VICTIM, needs, init, spec="Mine:horizon=4").horizon == 4
