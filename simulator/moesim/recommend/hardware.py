"""The machine that this runs on: its card as the driver names it, its link, its memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moesim.errors import SimulationError
from moesim.machine.profile import Disk, Machine, load_machine, machine_names

SHARE_OF_LINK = 0.78  # of a link's nominal rate that pinned copies reach
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
LEAVE = 0.9  # of the memory: the rest is for the driver and what else runs
NO_CARD = "nvme-gen3"  # the profile of a machine without a GPU
MEMINFO = Path("/proc/meminfo")
_FIELDS = "name,memory.total,pcie.link.gen.max,pcie.link.width.max"
_NOISE = re.compile(r"nvidia|geforce|tesla|tensor core|gpu|graphics|\s|-sxm.*|-pcie.*|\d+gb.*")


class Here(NamedTuple):
    """This machine as far as it can be told without measuring it.

    memory_bytes       of the device, less a tenth; None: unknown
    host_memory_bytes  for experts in host memory, less a tenth; None: unknown
    """

    machine: Machine
    memory_bytes: int | None
    host_memory_bytes: int | None
    how: str


def find_here() -> Here:
    """The first GPU that nvidia-smi names, or the CPU and its memory.

    Raises SimulationError for a card that no profile is of.
    """
    host = _host_memory()
    card = _card()
    if card is None:
        machine = load_machine(NO_CARD)
        how = f"this machine has no NVIDIA GPU; its CPU and disk are taken to be {machine.name}'s"
        return Here(machine, host, None, how)
    name, memory_mib, generation, lanes = card
    profile = _profile_of(name)
    if profile is None:
        raise SimulationError(
            f"this machine has a {name}, and no profile is of that card: give --machine with "
            f"another name ({', '.join(machine_names())}) or a profile that 'moerun profile' wrote"
        )
    machine = load_machine(profile)
    how = f"this machine has a {name}; the other constants are those of {profile}"
    if generation in LANE_BYTES_PER_S and lanes:
        rate = SHARE_OF_LINK * LANE_BYTES_PER_S[generation] * lanes
        machine = replace(machine, link=replace(machine.link, bytes_per_s=rate))
        how += f", its link is PCIe {generation} x{lanes}"
    memory = None if memory_mib is None else int(LEAVE * memory_mib * 2**20)
    return Here(machine, memory, host, how)


def _card() -> tuple[str, int | None, int | None, int | None] | None:
    """Name, MiB of memory, and the link's generation and lanes; None where there is no card."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    lines = asked.stdout.strip().splitlines()
    if not lines:
        return None
    name, *numbers = (part.strip() for part in lines[0].split(","))
    memory, generation, lanes = (int(n) if n.isdecimal() else None for n in numbers[:3])
    return name, memory, generation, lanes


def _profile_of(card: str) -> str | None:
    """The shipped profile of a card by the driver's name: "NVIDIA GeForce RTX 4090" is rtx4090."""
    mobile = "laptop" in card.lower() or "mobile" in card.lower()
    plain = _NOISE.sub("", card.lower().replace("laptop", "").replace("mobile", ""))
    wanted = f"{plain}-mobile" if mobile else plain
    return wanted if wanted in machine_names() else None


def _host_memory() -> int | None:
    """Bytes of host memory that are free for experts; None where the system does not tell."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text("utf-8").splitlines())
        return int(LEAVE * int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError):
        return None


def on_disk(machine: Machine, disk: str, host_bytes: int) -> Machine:
    """``machine`` with its experts on the disk of another profile, and so many bytes of them in
    host memory. Raises SimulationError where that profile is not of a disk."""
    of = load_machine(disk)
    if of.experts_in != "disk":
        raise SimulationError(
            f"--disk {disk}: that machine's experts are in host memory; give one whose link is a "
            "disk: nvme-gen3, nvme-gen4"
        )
    return replace(machine, disk=Disk(of.link.bytes_per_s, of.link.latency_s, host_bytes))
