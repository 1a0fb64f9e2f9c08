"""Digests of everything that a finished point depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import moepolicy

import moesim
from moesim.machine.profile import Machine

# The parts of moesim that decide what a simulation gives; a test holds this list complete.
DECIDES = (
    "engines",
    "errors.py",
    "jit.py",
    "limits",
    "machine",
    "result.py",
    "simulation.py",
    "sizes.py",
    "workload",
)


@cache
def code_digest() -> str:
    """SHA-256 of the code of the simulator and the policies that results depend on."""
    digest = hashlib.sha256()
    for package in (moepolicy, moesim):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            inner = file.relative_to(root)
            if package is moepolicy or inner.parts[0] in DECIDES:
                digest.update(f"{package.__name__}/{inner.as_posix()}\n".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def machine_digest(machine: Machine) -> str:
    """SHA-256 of a profile's constants; its name, description and source do not count."""
    constants = asdict(machine)
    for name in ("name", "description", "source"):
        del constants[name]
    return digest_of(constants)


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
