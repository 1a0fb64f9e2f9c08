"""A bar as it is seen: on terminals of several widths, on a dumb one, and where there is none."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

WORK = """
import time
import moepolicy.progress as progress
progress.SOON_S = 0.05
with progress.Bar("foresight-bypass:reach=12, 16 slots of a layer", 40, "point") as bar:
    for number in range(40):
        bar.begin("foresight-bypass:reach=12, 16 slots of a layer")
        time.sleep(0.02)
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


STATUS = """
import sys, time
import moepolicy.statusline as statusline
statusline.EVERY_S = statusline.LOGGED_EVERY_S = 0.05
said = "12 tokens, 3.50 tokens/s, 71.2 % hits, 1,234 loads, 0.4 s stalled"
with statusline.StatusLine(lambda: said):
    for word in "a text that streams".split():
        print(word, end=" ", flush=True)
        time.sleep(0.1)
print()
"""


def seen(width: int, work: str = WORK, **variables: str) -> str:
    """What the work writes to a terminal of so many columns and 24 rows."""
    person, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment |= {"TERM": "xterm-256color", **variables}
    process = subprocess.Popen(
        [sys.executable, "-c", work], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    found = b""
    while True:
        try:
            part = os.read(person, 65536)
        except OSError:  # the program has left
            break
        found += part
        if not part:
            break
    assert process.wait() == 0
    return found.decode()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_bar_takes_one_line_of_any_terminal(width: int) -> None:
    shown = seen(width)
    lines = [line for line in re.split(r"[\r\n]+", CONTROL.sub("", shown)) if line.strip()]
    assert lines
    assert max(map(len, lines)) <= width
    assert any("/40" in line and " left" in line for line in lines)
    assert any("points/s" in line for line in lines) == (width >= 56)
    assert shown.endswith(("\x1b[2K", "\x1b[?25h"))  # the line is wiped and the cursor is back


def test_there_is_none_elsewhere() -> None:
    assert seen(80, TERM="dumb") == ""
    piped = subprocess.run([sys.executable, "-c", WORK], capture_output=True, check=True)
    assert piped.stdout == piped.stderr == b""


@pytest.mark.parametrize("width", [40, 80])
def test_a_status_line_keeps_to_the_last_row(width: int) -> None:
    shown = seen(width, STATUS)
    assert "\x1b[1;23r" in shown  # the text scrolls in the rows above
    lines = re.findall(r"\x1b\[24;1H\x1b\[2K\x1b\[2m(.*?)\x1b\[0m", shown)
    assert lines
    assert all(line.startswith("12 tokens, 3.50 tokens/s") for line in lines)
    assert max(map(len, lines)) <= width
    assert shown.rindex("\x1b[r") > shown.rindex("\x1b[2m")  # and has all of them again
    text = re.sub(r"\x1b7.*?\x1b8", "", shown)
    assert " ".join(CONTROL.sub("", text).split()) == "a text that streams"


def test_it_is_logged_elsewhere() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STATUS], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a text that streams \n"
    assert done.stderr.splitlines()[0] == (
        "12 tokens, 3.50 tokens/s, 71.2 % hits, 1,234 loads, 0.4 s stalled"
    )
    assert "\x1b" not in done.stderr
