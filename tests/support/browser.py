"""A headless Chromium for tests of pages, where one is installed."""

from __future__ import annotations

import shutil
import subprocess
import zlib
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (apt: chromium)")
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND"


def _browser(page: Path, profile: Path, *options: str, query: str = "") -> str:
    """Chromium's stdout. It reaches no host."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", NO_NETWORK]
    address = page.as_uri() + (f"?{query}" if query else "")
    command += ["--hide-scrollbars", f"--user-data-dir={profile}", *options, address]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return found.stdout


def dom(page: Path, profile: Path, *, query: str = "", wait_ms: int = 0) -> str:
    """The document as the browser understood it, after ``wait_ms`` of the page's own time."""
    waiting = [f"--virtual-time-budget={wait_ms}"] if wait_ms else []
    return _browser(page, profile, "--dump-dom", *waiting, query=query)


def first_pixel(page: Path, profile: Path, *, dark: bool) -> tuple[int, int, int]:
    """The colour of the page's upper left corner for a reader who prefers dark or light pages."""
    shot = profile / f"{page.stem}.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    _browser(page, profile, scheme, "--window-size=300,200", f"--screenshot={shot}")
    return _first_of(shot.read_bytes())


def _first_of(png: bytes) -> tuple[int, int, int]:
    """A PNG's first pixel: whichever filter its row has, the first pixel is as it is."""
    data, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += length + 12
    row = zlib.decompress(data)
    return row[1], row[2], row[3]
