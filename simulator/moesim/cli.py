"""The command `moesim`: replay recorded routing under policies on a simulated machine."""

from __future__ import annotations

from moepolicy import console
from moepolicy.apps import add_command, make_app
from moepolicy.codecache import tell_of_compiling

from moesim import __version__
from moesim.commands.check import check
from moesim.commands.compare import compare
from moesim.commands.curve import curve
from moesim.commands.fit import fit
from moesim.commands.machines import machines
from moesim.commands.new import new
from moesim.commands.policies import policies
from moesim.commands.recommend import recommend
from moesim.commands.report import report
from moesim.commands.sweep import sweep
from moesim.commands.table2 import table2
from moesim.errors import SimulationError

HELP = "Score cache and prefetch policies for expert offloading on recorded routing."
PACKAGES = ("numpy", "numba", "polars", "simpy", "rich", "typer", "ray")


app = make_app("moesim", HELP, version=__version__, packages=PACKAGES)
for command in (
    compare,
    curve,
    sweep,
    report,
    recommend,
    fit,
    table2,
    machines,
    policies,
    check,
    new,
):
    add_command(app, command)


def _errors() -> tuple[type[Exception], ...]:
    from moepolicy import PolicyError
    from moeroute import TraceError

    return PolicyError, SimulationError, TraceError


def main() -> None:
    """Run the command line; an error becomes one line and an exit code."""
    tell_of_compiling(console.say)
    console.run(app, errors=_errors)
