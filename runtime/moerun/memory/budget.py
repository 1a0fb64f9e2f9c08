"""A memory budget as a user gives it, and a file in which it can be changed while a model runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch
from moepolicy import PolicyError

from moerun.amounts import format_bytes, parse_bytes
from moerun.devices import free_bytes, is_here
from moerun.errors import RunError

AUTO = "auto"
LOOK_EVERY_S = 0.2
LEAST_MARGIN_BYTES = 256 << 20


def parse_budget(text: str, device: torch.device) -> int:
    """Bytes of '9GiB', or of 'auto': what the device has free, less a tenth. Raises RunError."""
    if text.strip().lower() != AUTO:
        return parse_bytes(text)
    if not is_here(device):
        raise RunError(
            f"auto takes what is free on the device, and {device} is not here: give --memory an "
            "amount, such as 24GiB"
        )
    free = free_bytes(device)
    return max(free - max(free // 10, LEAST_MARGIN_BYTES), 0)


def read_budget(path: Path, device: torch.device) -> int:
    """The budget that a file holds. Raises RunError that names the file."""
    try:
        return parse_budget(path.read_text(encoding="utf-8"), device)
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}): write a memory budget into it, as 9GiB"
        ) from error
    except (RunError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: {error}") from error


class BudgetWatch:
    """Sets a run's budget to what a file says, whenever the file changes.

    What the file says that cannot be is reported, and the budget stays.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        set_memory: Callable[[int], None],
        report: Callable[[str], None],
    ) -> None:
        """``report`` is told in a line what became of each change, by a thread of its own."""
        self._path = path
        self._device = device
        self._set_memory = set_memory
        self._report = report
        self._seen = self._mark()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="budget", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread that watches the file."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _watch(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            mark = self._mark()
            # A file that is gone is being replaced; an empty one is being written.
            if mark is None or mark[1] == 0 or mark == self._seen:
                continue
            self._seen = mark
            try:
                budget = read_budget(self._path, self._device)
                self._set_memory(budget)
                self._report(f"memory: {format_bytes(budget)} from now on")
            except (RunError, PolicyError) as error:
                self._report(f"memory: unchanged, since {error}")
