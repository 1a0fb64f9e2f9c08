"""Mixture-of-experts models run with their experts offloaded, under any policy of `moepolicy`.

Importing the package is cheap: torch and transformers load with the first name that needs them.

    with moerun.load("tiny", policy="lru-spec", slots=4) as model:
        ...  # an ordinary transformers model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moerun.errors import RunError, UsageError

if TYPE_CHECKING:
    from moerun.live.loaded import Offloaded as Offloaded
    from moerun.live.loaded import load as load
    from moerun.live.runner import Runner as Runner
    from moerun.live.totals import Totals as Totals
    from moerun.settings import Settings as Settings
    from moerun.store.expert_store import ExpertStore as ExpertStore
    from moerun.store.pack import pack as pack

__version__ = "0.1.0"

# Where the names lie whose modules import torch.
_LAZY = {
    "ExpertStore": "moerun.store.expert_store",
    "Offloaded": "moerun.live.loaded",
    "Runner": "moerun.live.runner",
    "Settings": "moerun.live.runner",
    "Totals": "moerun.live.totals",
    "load": "moerun.live.loaded",
    "pack": "moerun.store.pack",
}

__all__ = [
    "ExpertStore",
    "Offloaded",
    "RunError",
    "Runner",
    "Settings",
    "Totals",
    "UsageError",
    "load",
    "pack",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
