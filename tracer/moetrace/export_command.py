"""The command `moetrace export`: traces for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from moepolicy.apps import Force
from moepolicy.console import emit
from moepolicy.outputs import check_free, check_suffix, written_whole
from moeroute.options import TRACE_HELP, complete_traces


class Target(StrEnum):
    """What a trace becomes."""

    counts = "counts"
    lines = "jsonl"
    arrays = "npz"
    placement = "placement"


class Scope(StrEnum):
    """Which experts share slots."""

    layer = "layer"
    whole = "global"


SUFFIXES = {
    Target.counts: (".json", ".pt"),
    Target.lines: (".jsonl",),
    Target.arrays: (".npz",),
    Target.placement: (".json",),
}


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """What a placement keeps."""

    slots: Annotated[
        int | None,
        typer.Option(min=1, help="placement: experts to keep in each layer.", show_default=False),
    ] = None
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="placement: global lets layers share all slots. Default: layer.",
            show_default=False,
        ),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            help="placement: a policy whose cache, after the whole trace, says what to keep. "
            "Default: the experts used most.",
            show_default=False,
        ),
    ] = None

    def check(self, to: Target) -> None:
        """Raise BadParameter for options of another target, and for a placement without slots."""
        given = {"--slots": self.slots, "--scope": self.scope, "--policy": self.policy}
        if to is Target.placement and self.slots is None:
            raise typer.BadParameter("--to placement needs --slots")
        if to is not Target.placement and (odd := [n for n, v in given.items() if v is not None]):
            raise typer.BadParameter(f"{odd[0]} is of --to placement")


def export(
    trace: Annotated[
        str, typer.Argument(metavar="TRACE", help=TRACE_HELP, autocompletion=complete_traces)
    ],
    *,
    to: Annotated[
        Target,
        typer.Option(
            help="counts: uses of each expert, as EPLB, SGLang and KTransformers read them (.json, "
            ".pt). jsonl: a line a (token, layer). npz: arrays (docs/traces.md). placement: the "
            "experts to keep on the device, by layer (.json)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    dense_layers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="counts: layers without experts that come first in the model; their counts are "
            "0. Default: those that the trace notes.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    placing: PlacementOptions,
) -> None:
    """Write a trace as a file that other programs read."""
    placing.check(to)
    if to is not Target.counts and dense_layers is not None:
        raise typer.BadParameter("--dense-layers is of --to counts")
    suffix = check_suffix(out, SUFFIXES[to])
    check_free(out, force=force)
    from moeroute import export as exports
    from moeroute import open_trace

    opened = open_trace(trace)
    with written_whole(out) as unfinished:
        if to is Target.counts:
            exports.write_counts(opened, unfinished, suffix, dense_layers or 0)
        elif to is Target.lines:
            exports.write_lines(opened, unfinished)
        elif to is Target.arrays:
            exports.write_npz(opened, unfinished)
        else:
            document = _placement(opened, placing)
            unfinished.write_text(json.dumps(document), encoding="utf-8")
    emit(f"{out}: {to.value} of {opened.title}\n")


def _placement(trace: Any, placing: PlacementOptions) -> dict[str, Any]:
    """The document of a placement: its experts by layer, and what it was made from."""
    from moepolicy import find_policy

    from moetrace import placement

    assert placing.slots is not None
    slots, scope = placing.slots, (placing.scope or Scope.layer).value
    if placing.policy is None:
        experts = placement.most_used(trace, slots, scope=scope)
    else:
        experts = placement.resident_after(trace, find_policy(placing.policy), slots, scope=scope)
    return {
        "model": trace.meta.model,
        "n_layers": trace.meta.n_layers,
        "n_experts": trace.meta.n_experts,
        "policy": placing.policy or placement.MOST_USED,
        "slots": slots,
        "scope": scope,
        "trace_sha256": trace.digest,
        "experts": experts,
    }
