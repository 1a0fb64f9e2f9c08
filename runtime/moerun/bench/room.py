"""Whether a bench fits this machine, known before anything is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moerun.errors import RunError

_SPARE_BYTES = 1 << 30  # activations, the libraries, what the system needs


@dataclass(frozen=True)
class Room:
    """Bytes: of all experts, of the slots they come and go in, of every other weight."""

    expert_bytes: int
    slot_bytes: int
    dense_bytes: int

    def __str__(self) -> str:
        return (
            f"experts {self.expert_bytes / 1e9:.2f} GB, slots {self.slot_bytes / 1e9:.2f} GB, "
            f"other weights {self.dense_bytes / 1e9:.2f} GB"
        )


def refuse_too_big(room: Room, device: torch.device, *, on_disk: bool) -> None:
    """RunError naming the sizes where host or device memory does not suffice."""
    on_device = room.slot_bytes + room.dense_bytes + _SPARE_BYTES
    in_host = 0 if on_disk and device.type == "cpu" else room.expert_bytes
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if on_device > free:
            raise RunError(_too_big(room, on_device, str(device), free, "fewer --slots"))
    else:
        in_host += on_device
    free = host_bytes_available()
    if in_host > free:
        how = "fewer --layers" if device.type == "cuda" else "--store FOLDER, fewer --layers"
        raise RunError(_too_big(room, in_host, "this machine's memory", free, how))


def _too_big(room: Room, needed: int, where: str, free: int, how: str) -> str:
    return (
        f"this needs {needed / 1e9:.2f} GB of {where} ({room}), of which {free / 1e9:.2f} GB are "
        f"free: give {how} or a lower --precision"
    )


def host_bytes_available() -> int:
    """What programs can have without swapping: page cache counts as free where it is known."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # another system than Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
