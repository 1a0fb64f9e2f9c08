"""`moerun serve` whose stderr is a pipe that nobody reads."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import httpx2 as httpx
import pytest
from moerun.serving.logs import MOST_WAITING, written_aside
from support.serving import PATIENCE_S, SERVING, begin_serving

SMALLEST_PIPE = 4096


def talk_nonsense(url: str, times: int) -> None:
    """Requests that are no HTTP: the server logs a line for each."""
    place = urlsplit(url)
    assert place.hostname
    assert place.port
    for _ in range(times):
        with socket.create_connection((place.hostname, place.port), timeout=PATIENCE_S) as sent:
            sent.sendall(b"nonsense\r\n\r\n")
            while sent.recv(4096):
                pass


@pytest.mark.skipif(sys.platform != "linux", reason="makes a pipe small")
def test_a_reader_of_stderr_who_stalls_does_not_stop_the_answers(tmp_path: Path) -> None:
    import fcntl

    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    process = begin_serving(tmp_path, ("--model", "tiny", "--slots", "2"), write, {})
    os.close(write)
    try:
        said = ""
        while not (found := SERVING.search(said)):
            part = os.read(read, 4096).decode()
            assert part, said
            said += part
        url = found[1]
        talk_nonsense(url, MOST_WAITING + 2 * SMALLEST_PIPE // len("WARNING:  Invalid HTTP"))
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).json() == {"status": "ok"}
        told: list[bytes] = []
        reader = threading.Thread(
            target=lambda: told.extend(iter(lambda: os.read(read, 4096), b""))
        )
        reader.start()
        talk_nonsense(url, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        reader.join(PATIENCE_S)
        assert b" lines were dropped: nobody read them in time" in b"".join(told)
    finally:
        process.kill()
        process.wait()
        os.close(read)


def test_what_is_logged_is_written_and_the_loggers_are_as_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("moerun")
    handlers = list(logger.handlers)
    with written_aside():
        logger.error("error: %s", "the policy lost count")
        logger.debug("not this")
    assert capsys.readouterr().err == "error: the policy lost count\n"
    assert logger.handlers == handlers
