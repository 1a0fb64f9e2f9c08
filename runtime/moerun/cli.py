"""The command `moerun`: generate text with a mixture-of-experts model that does not fit memory."""

from __future__ import annotations

from moepolicy import console
from moepolicy.apps import add_command, make_app

from moerun import __version__
from moerun.commands.bench import bench
from moerun.commands.chat import chat
from moerun.commands.config import configurable
from moerun.commands.families import families
from moerun.commands.fidelity import fidelity
from moerun.commands.generate import generate
from moerun.commands.pack import pack
from moerun.commands.perplexity import perplexity
from moerun.commands.policies import policies
from moerun.commands.profile import profile
from moerun.commands.serve import serve
from moerun.errors import RunError

HELP = """Run mixture-of-experts models with most of their experts on disk or in host memory.

Options without a command are those of generate:

moerun --policy lru-spec --slots 3 --prompt "Once upon a time"
"""
PACKAGES = (
    *("torch", "transformers", "safetensors", "hqq", "accelerate", "triton"),
    *("numpy", "numba", "polars", "rich", "typer"),
)


app = make_app("moerun", HELP, version=__version__, packages=PACKAGES, default="generate")
add_command(app, configurable(generate), context_settings={"allow_extra_args": True})
for command in (chat, serve, pack, profile, fidelity, bench, perplexity):
    add_command(app, configurable(command))
add_command(app, policies)
add_command(app, families)


def _errors() -> tuple[type[Exception], ...]:
    from moepolicy import PolicyError

    # A trace may be written or read: its errors are the user's to mend, too.
    from moeroute import TraceError

    return RunError, PolicyError, TraceError


def main() -> None:
    """Run `moerun` with the arguments of this process."""
    console.run(app, errors=_errors)
