"""``requirements.lock`` and ``docs/licences.md`` made anew: `make lock`.

The lock has the versions that stand in constraints.txt and, for what those bring along, the
versions that are installed in the Python that runs this. uv resolves it and takes the hashes from
the package index. PyTorch's CPU build, which the tests run with, is not there: UV_FIND_LINKS must
name a folder that has it, or UV_INDEX PyTorch's index.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK, LICENCES = ROOT / "requirements.lock", ROOT / "docs/licences.md"
EXTRAS = ("run", "serve", "ray", "dev")
PLATFORM = ("--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu")
HEAD_OF_LOCK = r"""# What the tests ran with on Linux (`make lock`). PyTorch is its build for CPUs:
# pip install --require-hashes -r requirements.lock \
#     --extra-index-url https://download.pytorch.org/whl/cpu
"""
HEAD = """# Licences of dependencies

Made by `make lock` of the metadata of the packages in `requirements.lock`: what
`.[run,serve,ray,dev]` brings along on Linux. The project itself is under the Apache License 2.0.

| package | version | licence |
|---|---|---|
"""
TAIL = """

PyTorch's build for CUDA, which pip takes on Linux by default, brings some 18 packages `nvidia-*`
and `cuda-*` along. Those of `nvidia-*` are proprietary (`LicenseRef-NVIDIA-Proprietary`).
"""
# How licences are called where the metadata has no SPDX expression.
CALLED = (
    (r"MPL-2.0 AND MIT", "MPL-2.0 AND MIT"),
    (r"MIT OR Apache", "MIT OR Apache-2.0"),
    (r"Mozilla|MPL", "MPL-2.0"),
    (r"Apache", "Apache-2.0"),
    (r"3-Clause|BSD-3", "BSD-3-Clause"),
    (r"BSD", "BSD"),
    (r"ISC", "ISC"),
    (r"MIT", "MIT"),
    (r"PSF|Python Software", "PSF-2.0"),
)


def main() -> None:
    """Write both files."""
    write_lock()
    write_licences()


def locked(text: str) -> dict[str, str]:
    """Packages of a lock and their versions."""
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, re.MULTILINE))


def write_lock() -> None:
    """Resolve and write the lock."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as installed:
        installed.writelines(f"{name}=={version}\n" for name, version in _installed())
        installed.flush()
        done = subprocess.run(
            [
                *("uv", "pip", "compile", "pyproject.toml", "--generate-hashes", *PLATFORM),
                *(part for extra in EXTRAS for part in ("--extra", extra)),
                *("-c", "constraints.txt", "-c", installed.name),
                *("--no-header", "--no-annotate", "--quiet"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.exit(f"error: {done.stderr.strip()}")
    if not locked(done.stdout)["torch"].endswith("+cpu"):
        sys.exit("error: no CPU build of torch: name a folder that has one in UV_FIND_LINKS")
    LOCK.write_text(HEAD_OF_LOCK + done.stdout)


def _installed() -> Iterator[tuple[str, str]]:
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        if name != "moe-offload-lab":
            yield name, found.version.partition("+")[0]


def write_licences() -> None:
    """Write the page, of what is installed."""
    packages = locked(LOCK.read_text())
    rows = [
        f"| {name} | {version} | {licence_of(name)} |" for name, version in sorted(packages.items())
    ]
    LICENCES.write_text(HEAD + "\n".join(rows) + TAIL)


def licence_of(name: str) -> str:
    """A package's licence by its metadata, as SPDX calls it."""
    metadata = importlib.metadata.metadata(name)
    if said := metadata.get("License-Expression"):
        return str(said)
    given = [*(metadata.get_all("Classifier") or []), (metadata.get("License") or "")[:80]]
    said = " ".join(text for text in given if "License" in text or text == given[-1])
    return next(spdx for called, spdx in CALLED if re.search(called, said))


if __name__ == "__main__":
    main()
