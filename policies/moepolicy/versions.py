"""What is installed: versions that a result depends on, and the extra with what is not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

DISTRIBUTION = "moe-offload-lab"
EXTRAS = ("run", "serve", "guided", "ray", "plots")
"""The extras that bring packages which a command needs, the smallest first."""


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Version by name, of those of ``packages`` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def extra_with(module: str) -> str | None:
    """The extra that brings the package of a module, by the project's own metadata."""
    wanted = module.partition(".")[0].replace("_", "-").lower()
    try:
        stated = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return None
    for extra in EXTRAS:
        for line in stated:
            name = re.match(r"[\w.-]+", line)
            brought = name is not None and name[0].lower().removesuffix("-python") == wanted
            if brought and re.search(f"extra == ['\"]{extra}['\"]", line):
                return extra
    return None


def lacking(module: str) -> str:
    """What to say of a module that is not installed, in a line."""
    extra = extra_with(module)
    package = module.partition(".")[0]
    if extra is None:
        return f"this needs the package {package}, which is not installed: pip install {package}"
    return f"this needs {package}, which is not installed: pip install '{DISTRIBUTION}[{extra}]'"
