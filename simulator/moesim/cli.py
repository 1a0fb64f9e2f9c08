"""The command `moesim`: replay recorded routing under policies on a simulated machine."""

from __future__ import annotations

from moepolicy import PolicyError, console, policy_names
from moepolicy.apps import add_command, make_app
from moepolicy.tables import described
from moeroute import TraceError

from moesim import __version__
from moesim.commands.compare import compare
from moesim.commands.curve import curve
from moesim.commands.sweep import sweep
from moesim.commands.table2 import table2
from moesim.errors import SimulationError
from moesim.machine.profile import load_machine, machine_names

HELP = "Score cache and prefetch policies for expert offloading on recorded routing."
PACKAGES = ("numpy", "numba", "polars", "simpy", "rich", "typer", "ray")


def list_policies() -> None:
    """List the policies there are."""
    console.emit(described(policy_names()))


def list_machines() -> None:
    """List the machine profiles that ship with the simulator."""
    machines = {name: load_machine(name) for name in machine_names()}
    console.emit(described({n: f"{m.source}: {m.description}" for n, m in machines.items()}))


app = make_app("moesim", HELP, version=__version__, packages=PACKAGES)
for command in (compare, curve, sweep, table2):
    add_command(app, command)
add_command(app, list_policies, "policies")
add_command(app, list_machines, "machines")


def main() -> None:
    """Run the command line; an error becomes one line and an exit code."""
    console.run(app, errors=(PolicyError, SimulationError, TraceError))
