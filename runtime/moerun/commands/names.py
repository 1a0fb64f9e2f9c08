"""The names that options take, for shells to complete; none of them needs torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from moerun.ranges import REUSES

UNIFORM = "uniform"
ON_POLICY_ERROR = ("fallback", "stop")


def policies() -> dict[str, str]:
    """The policies that run live, with what they do."""
    from moepolicy import find_policy, policy_names

    from moerun.policies import unserved

    return {
        name: summary for name, summary in policy_names().items() if not unserved(find_policy(name))
    }


def machines() -> list[str]:
    """The machines that moesim knows by name; none where it is not installed.

    The simulator is not imported: this package does not depend on it.
    """
    spec = find_spec("moesim")
    folders = (spec.submodule_search_locations if spec else None) or []
    return sorted(file.stem for folder in folders for file in Path(folder).glob("machines/*.toml"))


def models() -> list[str]:
    """Models that are bundled."""
    return ["tiny"]


def shapes() -> list[str]:
    """What `moerun bench --shape` knows by name."""
    from moeroute.models import published

    return ["tiny", *published()]


def samples() -> list[str]:
    """Routing traces that are bundled."""
    from moeroute import sample_names

    return sample_names()


def routings() -> list[str]:
    """What `moerun bench --routing` knows by name."""
    from moeroute import sample_names

    return [*sample_names(), UNIFORM]


def precisions() -> list[str]:
    """Precisions of a store: the model's own, plain ones, quantised ones."""
    from moeroute.models import ATTENTION

    return list(ATTENTION)


def plain_precisions() -> list[str]:
    """Precisions that no quantisation makes: the model's own and the plain ones."""
    from moeroute.models import PLAIN

    return ["native", *PLAIN]


def lower_precisions() -> list[str]:
    """Precisions of the second store, which policies load some misses from."""
    from moeroute.models import ATTENTION

    return [name for name in ATTENTION if name not in ("native", "fp32")]


def scopes() -> list[str]:
    """Whether each layer has its own slots or all layers share theirs."""
    return ["layer", "global"]


def answers_to_errors() -> list[str]:
    """What a run does when its policy fails."""
    return list(ON_POLICY_ERROR)


def reuses() -> list[str]:
    """How a text goes on from what is kept of another."""
    return list(REUSES)


def devices() -> list[str]:
    """Devices that a run can be told to use."""
    return ["auto", "cpu", "cuda"]
