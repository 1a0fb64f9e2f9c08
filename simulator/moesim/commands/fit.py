"""`moesim fit`: a policy's arrays, made of a calibration trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from moepolicy import console
from moepolicy.apps import Force
from moepolicy.completion import among
from moepolicy.outputs import check_free, check_suffix
from moepolicy.tables import wrapped
from moeroute.options import TraceName

from moesim.workload import DEFAULT_TRACE

# The built-in policies with something to fit, named here so that no help imports the policies.
FITTABLE = (
    *("edgemoe", "moe-infinity", "flashmoe", "promoe"),
    *("foresight", "foresight-bypass", "foresight-ahead", "foresight-spec"),
)


def _fittable() -> tuple[str, ...]:
    return FITTABLE


def fit(
    policy: Annotated[
        str,
        typer.Argument(
            metavar="POLICY",
            help=f"The policy to fit: {', '.join(FITTABLE)}, or path/to/file.py:Class.",
            autocompletion=among(_fittable),
        ),
    ],
    *,
    trace: TraceName = DEFAULT_TRACE,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write (.safetensors).")],
    share: Annotated[
        float,
        typer.Option(
            help="Share of the trace's sequences to fit on; the others are left to score on. "
            "1: fit on all, and score on another trace.",
        ),
    ] = 0.5,
    seed: Annotated[
        int, typer.Option(help="Seed of the choice of sequences, and of the fit.", min=0)
    ] = 0,
    force: Force = False,
) -> None:
    """Fit a policy's parameters on a calibration trace.

    Give them back as POLICY:params=FILE to compare, sweep and moerun. The file says which sequences
    of which trace it was fitted on; compare refuses to score a policy on those unless asked to.
    """
    from moepolicy import find_policy
    from moepolicy.fitted import write_fitted
    from moeroute import open_trace

    check_suffix(out, [".safetensors"])
    check_free(out, force=force)
    from moesim.fitting import fit as fit_policy

    spec = find_policy(policy)
    fitting = fit_policy(spec, open_trace(trace), share=share, seed=seed)
    write_fitted(out, fitting.arrays, fitting.of)
    n_bytes = sum(array.nbytes for array in fitting.arrays.values())
    sizes = ", ".join(
        f"{name} {'x'.join(map(str, array.shape))}" for name, array in fitting.arrays.items()
    )
    told = (
        f"{out}: {spec.label} fitted on {len(fitting.of.sequences)} of {fitting.of.n_sequences} "
        f"sequences of {trace} (seed {seed}), {fitting.held_out} held out"
    )
    console.emit(wrapped([told, f"arrays: {sizes}; {n_bytes:,} bytes"]))
