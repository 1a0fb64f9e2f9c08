"""`moesim new`: a policy to begin with."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Annotated

import typer
from moepolicy.apps import Force
from moepolicy.console import CommandUsageError, emit
from moepolicy.outputs import check_free, check_suffix, written_whole
from moepolicy.tables import wrapped

TEMPLATE = '''\
"""{name}: a policy for caching experts, to be changed at will."""

import numpy as np
from moepolicy import Context, Policy


class {name}(Policy):
    """Evict the expert of the fewest recent uses; a use counts half after half_life uses."""

    # What the policy reads of a step; "predictions", "weights" ... (moepolicy.policy.NEEDS)
    requires = frozenset()

    def __init__(self, context: Context, half_life: int = 1000) -> None:
        # State in NumPy arrays and plain numbers: a long replay compiles the class as it stands.
        # A key is layer * n_experts + expert.
        self.score = np.zeros(context.n_keys)
        self.worth = np.ones(1)  # of one more use; it grows, so that older uses count less
        self.growth = 2 ** (1 / half_life)

    def on_hit(self, key: int, now: int) -> None:
        self.worth[0] *= self.growth
        self.score[key] += self.worth[0]
        if self.worth[0] > 1e100:  # keep the numbers small; the order stays
            self.score /= self.worth[0]
            self.worth[0] = 1.0

    def on_load(self, key: int, speculative: bool, now: int) -> None:
        if not speculative:
            self.on_hit(key, now)

    def victim(self, layer: int, incoming: int, candidates: np.ndarray) -> int:
        best = candidates[0]  # never empty; -1 would decline to make room
        for key in candidates:
            if self.score[key] < self.score[best]:
                best = key
        return best
'''


def new(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write, *.py.")],
    *,
    name: Annotated[str, typer.Option(help="The name of the class.")] = "Mine",
    force: Force = False,
) -> None:
    """Write a policy that works, to be changed: some 30 lines, with comments."""
    check_suffix(path, [".py"], "FILE")
    check_free(path, force=force, what="FILE")
    if not name.isidentifier() or keyword.iskeyword(name) or name in ("Policy", "Context"):
        raise CommandUsageError(f"--name {name} is no name for a class of your own, such as Mine")
    with written_whole(path) as partial:
        partial.write_text(TEMPLATE.format(name=name), encoding="utf-8")
    spec = f"{path}:{name}"
    emit(
        wrapped(
            [
                f"{path} has the policy {name}. Now:",
                f"  moesim check {spec}",
                f"  moesim compare lru {spec}",
                f'  moerun generate --policy {spec} --prompt "..."',
            ]
        )
    )
