"""Finding policies: by name, with parameters, from a file; and the messages when it fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from moepolicy import Context, PolicyError, find_policy, policy_names

CONTEXT = Context(n_layers=2, n_experts=4, top_k=2, slots=2)


def test_every_built_in_policy_says_what_it_does() -> None:
    names = policy_names()
    assert {"lru", "lfu", "fifo", "random", "static", "belady", "belady-bypass", "lru-spec"} <= set(
        names
    )
    assert all(summary.endswith(".") or summary.endswith(").") for summary in names.values())


def test_parameters_reach_the_policy() -> None:
    spec = find_policy("lru-spec:n=1,staging=3")
    assert spec.label == "lru-spec:n=1,staging=3"
    assert spec.build(CONTEXT).staging == 3


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lur", "did you mean 'lru'? `moesim policies` or `moerun policies` lists"),
        ("LRU", "unknown policy 'LRU'; did you mean 'lru'?"),
        ("lru:k=3", "policy 'lru' has no parameter 'k': it has none"),
        ("lru-spec:m=3", "has no parameter 'm': it has n, staging"),
        ("lru-spec:n", "'n' is not parameter=value"),
        ("lru-spec:n=many", "n must be a number, not 'many'"),
        ("lru-spec:n=1.5", "n must be a whole number, not 1.5"),
        ("absent.py:Mine", "no policy file absent.py"),
        ("lru+", "policy 'lru+': give a name on each side of a +, lru+gate"),
        ("", "give a name"),
    ],
)
def test_a_spec_that_cannot_be_found_says_why(spec: str, says: str) -> None:
    with pytest.raises(PolicyError) as caught:
        find_policy(spec)
    assert says in str(caught.value)


def test_blanks_beside_a_plus_are_no_part_of_a_name() -> None:
    assert find_policy("lru + gate(n=1)").label == find_policy("lru+gate(n=1)").label


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("Mine.py:Lru2", "no policy file Mine.py; did you mean 'mine.py'?"),
        ("mine:Lru2", "unknown policy 'mine'; mine.py needs a class, as mine.py:Lru2"),
        ("mine.Lru2", "unknown policy 'mine.Lru2'; mine.py needs a class, as mine.py:Lru2"),
        ("mine.py:lru2", "mine.py has no class 'lru2'; did you mean 'Lru2'?"),
    ],
)
def test_a_file_that_is_given_wrongly_is_found_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, says: str
) -> None:
    code = "from moepolicy import Policy\n\nclass Lru2(Policy):\n    pass\n"
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PolicyError, match=re.escape(says)):
        find_policy(spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("lru-spec:n=9", "n must be 1 to 4, not 9"),
        ("random:seed=-1", "seed must be 0 or more"),
        ("belady", "needs the future of a recorded trace"),
        ("belady-bypass", "needs the future of a recorded trace"),
        ("static", "needs the expert counts"),
    ],
)
def test_a_policy_that_cannot_be_made_says_why(spec: str, says: str) -> None:
    with pytest.raises(PolicyError, match=says):
        find_policy(spec).build(CONTEXT)


def test_a_class_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from moepolicy import Policy\n"
        "class Highest(Policy):\n"
        "    def victim(self, layer, incoming, candidates):\n"
        "        return int(candidates[-1])\n"
        "class Other: pass\n"
    )
    built = find_policy(f"{path}:Highest").build(CONTEXT)
    assert built.victim(0, 1, [2, 3]) == 3  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="no class 'Hihgest'; did you mean 'Highest'"):
        find_policy(f"{path}:Hihgest")
    with pytest.raises(PolicyError, match=r"derive its class from moepolicy\.Policy"):
        find_policy(f"{path}:Other")
    with pytest.raises(PolicyError, match=r"mine\.py needs a class, as .*:Highest; it has: H"):
        find_policy(str(path))
    path.write_text("from moepolicy import Policy\n")
    with pytest.raises(PolicyError, match=r"mine\.py has no policy: derive a class"):
        find_policy(str(path))
    path.write_text("import nothing_of_that_name\n")
    with pytest.raises(PolicyError, match="does not load: ModuleNotFoundError"):
        find_policy(f"{path}:Highest")


def test_an_installed_package_adds_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text(
        "from moepolicy.library.recency.lru import Lru\nclass Theirs(Lru):\n    'Keep all.'\n"
    )
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe.policies]\ntheirs = theirs:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert policy_names()["theirs"] == "Keep all."
    assert find_policy("theirs").policy.__name__ == "Theirs"
