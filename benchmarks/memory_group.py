"""A memory limit for child processes: a control group of their own, page cache included.

The group is made below the one this process runs in, of cgroup v2 or of v1's memory controller,
where the user may make one (root, a container's owner, a delegated systemd scope).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """``add`` a process before it has read anything: pages stay with the group that read them."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Raises OSError where no group can be made."""
        parent, limit_file = own_group()
        self.path = parent / f"{name}-{os.getpid()}"
        self.path.mkdir()
        try:
            (self.path / limit_file).write_text(str(limit_bytes))
        except OSError:
            self.close()
            raise

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def peak_bytes(self) -> int | None:
        with suppress(FileNotFoundError):
            return peak_bytes_of(self.path)
        return None

    def close(self) -> None:
        """Remove the group; its processes must have ended."""
        for _ in range(50):
            try:
                self.path.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # the last process is still being cleared away
                time.sleep(0.1)


def usage_bytes(group: Path) -> int:
    """What a group holds now, page cache included."""
    return _counter(group, "memory.usage_in_bytes", "memory.current")


def peak_bytes_of(group: Path) -> int:
    """The most that a group has held."""
    return _counter(group, "memory.max_usage_in_bytes", "memory.peak")


def _counter(group: Path, *names: str) -> int:
    for name in names:
        with suppress(OSError, ValueError):
            return int((group / name).read_text())
    raise FileNotFoundError(f"{group} has none of {', '.join(names)}")


def own_group() -> tuple[Path, str]:
    """This process's group, and the name of the file with the limit of one below it."""
    groups = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    if "memory" in groups:
        return V1 / groups["memory"].lstrip("/"), "memory.limit_in_bytes"
    return V2 / groups[""].lstrip("/"), "memory.max"


def forget(path: Path) -> None:
    """Have the system drop a file's pages, so that who reads them next is charged for them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
