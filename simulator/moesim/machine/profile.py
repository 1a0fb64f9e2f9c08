"""Machine profiles: what a simulated machine's link and compute cost, from TOML.

Shipped profiles have a name; anyone else's is a file, written by hand or by `moerun profile`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from moepolicy.console import nearest
from moeroute.jsontext import parse_toml

from moesim.errors import SimulationError, UsageError

SHIPPED = Path(__file__).parents[1] / "machines"
SOURCES = ("measured", "published")
PLACES = ("host", "disk")  # that the link may fetch experts from
DEVICES = ("gpu", "cpu")  # that may compute
ORIGINS = ("datasheet", "derived", "measured", "assumed")
NS_PER_S = 1_000_000_000
DEFAULT_MACHINE = "rtx3060"  # where a command or function is told of none


@dataclass(frozen=True)
class LinkProfile:
    """The way from where the experts are kept to where they are used.

    ``streams`` copies may be under way at once: their latencies overlap, their bytes share the
    bandwidth one after the other. With ``chunk_bytes`` an expert travels in pieces: demanded
    copies have streams of their own and overtake a prefetch at the end of its piece. With
    ``write_back`` a copy that evicts first sends its victim back, as the base paper's released
    code does although weights are never changed. With ``back_to_back`` a copy that waits for its
    stream to be free has no latency: its command is there when the last one ends.
    """

    bytes_per_s: float  # once bytes flow
    latency_s: float = 0.0  # of each transfer, before its bytes flow
    streams: int = 1  # copies under way at once, 1 to 3
    chunk_bytes: int = 0  # 0: an expert travels whole
    write_back: bool = False  # a copy that evicts first sends its victim back
    back_to_back: bool = False  # a copy that waited for its stream has no latency


@dataclass(frozen=True)
class Disk:
    """A stage before the link, one read at a time, with a cache of experts in host memory (LRU)."""

    bytes_per_s: float  # once bytes flow
    latency_s: float = 0.0  # of each read
    host_bytes: int = 0  # of the host's cache


@dataclass(frozen=True)
class Cpu:
    """Workers that compute missing experts on the CPU, while the compute stream goes on."""

    workers: int  # experts that are computed at once
    expert_s: float = 0.0  # an expert call
    expert_token_s: float = 0.0  # each further token in it
    memory_bytes_per_s: float = math.inf  # of each worker
    flops_per_s: float = math.inf  # of each worker


@dataclass(frozen=True)
class Compute:
    """What one forward pass costs outside the link, in seconds; every overhead is an entry."""

    token_s: float = 0.0  # once a pass: embedding, head, sampling, the loop around them
    layer_s: float = 0.0  # a layer outside its experts: attention, norms, gate, launches
    layer_token_s: float = 0.0  # each further token of a batch, in such a layer
    gate_sync_s: float = 0.0  # a layer: bringing the gate's choice to the host
    prefetch_s: float = 0.0  # a layer whose later gates are asked for predictions
    arrival_s: float = 0.0  # an expert that compute stood still for: waking up when it is there
    expert_s: float = 0.0  # an expert call
    expert_token_s: float = 0.0  # each further token in it
    memory_bytes_per_s: float = math.inf  # weights are read at this rate, on top of the fixed costs
    flops_per_s: float = math.inf  # an expert call takes at least its operations over this


@dataclass(frozen=True)
class Machine:
    """One machine profile: what copies, disk reads and compute take. Times are seconds, sizes
    bytes, rates bytes/s.

    source  "measured" or "published": where the constants are from
    disk    a stage before the link; None: the experts are in host memory
    cpu     None: no policy may compute on CPU workers
    memory_bytes  of the device that computes; None: unknown
    device  what computes: "gpu" or "cpu"
    experts_in  where the link fetches experts from: "host", or "disk" where the device computes in
             the host's memory
    sources  where each entry is from, by its name ("link.bytes_per_s"): "datasheet: ...",
             "derived: ...", "measured: ..." or "assumed: ..."
    """

    name: str
    description: str
    source: str
    link: LinkProfile
    compute: Compute
    disk: Disk | None = None
    cpu: Cpu | None = None
    memory_bytes: int | None = None
    device: str = "gpu"
    experts_in: str = "host"
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    def row(self) -> dict[str, Any]:
        """All constants under names such as link_bytes_per_s; None in a part that is not there."""
        found: dict[str, Any] = {
            "machine": self.name,
            "source": self.source,
            "description": self.description,
            "memory_bytes": self.memory_bytes,
            "device": self.device,
            "experts_in": self.experts_in,
        }
        parts = {"link": LinkProfile, "compute": Compute, "disk": Disk, "cpu": Cpu}
        for name, kind in parts.items():
            part = getattr(self, name)
            found |= {f"{name}_{one.name}": getattr(part, one.name, None) for one in fields(kind)}
        return found

    def copy_ns(self, n_bytes: int) -> int:
        """Time that a copy's bytes occupy the link, in nanoseconds."""
        return max(1, math.ceil(n_bytes * NS_PER_S / self.link.bytes_per_s))

    @property
    def latency_ns(self) -> int:
        """Before the first byte of a copy."""
        return _ns(self.link.latency_s)

    @property
    def arrival_ns(self) -> int:
        """What compute spends on an expert that arrives."""
        return _ns(self.compute.arrival_s)

    def pass_ns(self, token_bytes: int) -> int:
        """Time of a forward pass outside its layers, in nanoseconds."""
        return _ns(self.compute.token_s + token_bytes / self.compute.memory_bytes_per_s)

    def layer_ns(self, tokens: int, layer_bytes: int) -> int:
        """A layer up to the moment its gate's choice is known, without later gates."""
        cost = self.compute
        seconds = cost.layer_s + cost.gate_sync_s + (tokens - 1) * cost.layer_token_s
        return _ns(seconds + layer_bytes / cost.memory_bytes_per_s)

    @property
    def gates_ns(self) -> int:
        """What asking the later gates for predictions takes, a layer."""
        return _ns(self.compute.prefetch_s)

    def expert_ns(self, tokens: int, expert_bytes: int, expert_params: int) -> int:
        """One expert's compute for ``tokens`` tokens."""
        return _expert_ns(self.compute, tokens, expert_bytes, expert_params)

    def cpu_expert_ns(self, tokens: int, expert_bytes: int, expert_params: int) -> int:
        """One expert's compute on a CPU worker, in nanoseconds."""
        if self.cpu is None:
            return 1
        return max(1, _expert_ns(self.cpu, tokens, expert_bytes, expert_params))

    def read_ns(self, expert_bytes: int) -> int:
        """One expert from disk to host memory; 0 where there is no disk stage."""
        if self.disk is None:
            return 0
        return _ns(self.disk.latency_s + expert_bytes / self.disk.bytes_per_s)


def _expert_ns(cost: Compute | Cpu, tokens: int, expert_bytes: int, expert_params: int) -> int:
    read_s = expert_bytes / cost.memory_bytes_per_s
    flops_s = 2.0 * expert_params * tokens / cost.flops_per_s
    return _ns(cost.expert_s + (tokens - 1) * cost.expert_token_s + max(read_s, flops_s))


def _ns(seconds: float) -> int:
    return round(seconds * NS_PER_S)


LISTED_BY = "moesim machines"  # the command that lists the names


def machine_names() -> list[str]:
    """The names of the profiles that ship with the simulator, for `load_machine`."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def load_machine(name_or_path: str) -> Machine:
    """A shipped profile by name, or a TOML file. SimulationError says what is wrong with it."""
    path = Path(name_or_path)
    if name_or_path in machine_names():
        path = SHIPPED / f"{name_or_path}.toml"
    elif path.suffix != ".toml" and not path.exists():
        raise UsageError(
            f"unknown machine '{name_or_path}'; "
            f"{nearest(name_or_path, machine_names(), LISTED_BY)}; "
            "or a profile of your own as path/to/machine.toml"
        )
    try:
        table = parse_toml(path.read_bytes())
    except tomllib.TOMLDecodeError as error:
        raise SimulationError(f"{path} is not a machine profile: {error}") from None
    return _machine(path, table)


def _machine(path: Path, table: dict[str, Any]) -> Machine:
    known = {"name", "description", "source", "memory_bytes", "link", "compute", "disk", "cpu"}
    known |= {"device", "experts_in", "sources"}
    _refuse_unknown(path, "", table, known)
    return Machine(
        name=str(table.get("name", path.stem)),
        description=str(table.get("description", "")),
        source=_one_of(path, table, "source", SOURCES, "published"),
        link=LinkProfile(**_numbers(path, "link", table, LinkProfile)),
        compute=Compute(**_numbers(path, "compute", table, Compute)),
        disk=Disk(**_numbers(path, "disk", table, Disk)) if "disk" in table else None,
        cpu=Cpu(**_numbers(path, "cpu", table, Cpu)) if "cpu" in table else None,
        memory_bytes=_memory(path, table),
        device=_one_of(path, table, "device", DEVICES, DEVICES[0]),
        experts_in=_one_of(path, table, "experts_in", PLACES, PLACES[0]),
        sources=_sources(path, table),
    )


def _one_of(
    path: Path, table: dict[str, Any], key: str, values: tuple[str, ...], default: str
) -> str:
    found = table.get(key, default)
    if found not in values:
        raise SimulationError(f"{path}: {key} is {found!r}, not one of {', '.join(values)}")
    return str(found)


def _memory(path: Path, table: dict[str, Any]) -> int | None:
    found = table.get("memory_bytes")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not found > 0:
        raise SimulationError(f"{path}: memory_bytes is {found!r}, not a number above 0")
    if math.isinf(found) or found != math.floor(found):
        raise SimulationError(f"{path}: memory_bytes is {found}, not a whole number")
    return int(found)


def _sources(path: Path, table: dict[str, Any]) -> dict[str, str]:
    """Where entries are from: each key names an entry of the profile, each value begins with one
    of `ORIGINS`."""
    found = table.get("sources", {})
    if not isinstance(found, dict):
        raise SimulationError(f"{path}: [sources] is not a table")
    there = {
        f"{section}.{entry}"
        for section in ("link", "compute", "disk", "cpu")
        for entry in table.get(section, {})
    } | ({"memory_bytes"} & set(table))
    for key, value in found.items():
        if key not in there:
            raise SimulationError(f"{path}: [sources] {key}: the profile has no such entry")
        if not isinstance(value, str) or value.partition(":")[0] not in ORIGINS:
            raise SimulationError(
                f"{path}: [sources] {key} is {value!r}; it begins with one of "
                f"{', '.join(ORIGINS)}, and a colon if more is to be said"
            )
    return found


def _numbers(path: Path, section: str, table: dict[str, Any], cls: type) -> dict[str, Any]:
    """A section's entries, each checked against the class that will hold them."""
    values = table.get(section, {})
    if not isinstance(values, dict):
        raise SimulationError(f"{path}: [{section}] is not a table")
    known = {f.name: f for f in fields(cls)}
    _refuse_unknown(path, f"[{section}] ", values, set(known))
    for key, entry in known.items():
        if entry.default is MISSING and key not in values:
            raise SimulationError(f"{path}: [{section}] has no {key}")
    for key, value in values.items():
        if known[key].type == "bool":
            if not isinstance(value, bool):
                raise SimulationError(f"{path}: [{section}] {key} is {value!r}, not true or false")
        else:
            _check_number(path, f"[{section}] {key}", known[key], value)
    # Bytes may be written as 16e9.
    return {key: int(value) if known[key].type == "int" else value for key, value in values.items()}


def _check_number(path: Path, where: str, entry: Field[Any], value: Any) -> None:
    key = entry.name
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise SimulationError(f"{path}: {where} is {value!r}, not a number")
    if key == "streams" and (not isinstance(value, int) or not 1 <= value <= 3):
        raise SimulationError(f"{path}: {where} is {value}, not 1, 2 or 3")
    if entry.type == "int" and value != math.floor(value):
        raise SimulationError(f"{path}: {where} is {value}, not a whole number")
    if key == "workers" and value < 1:
        raise SimulationError(f"{path}: {where} is {value}; leave [cpu] out for none")
    if key.endswith("_per_s") and not value > 0:
        raise SimulationError(f"{path}: {where} is {value}; a rate must be above 0")
    if value < 0 or (math.isinf(value) and not key.endswith("_per_s")):
        raise SimulationError(f"{path}: {where} is {value}; it must be 0 or more and finite")


def _refuse_unknown(path: Path, where: str, table: dict[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            raise SimulationError(f"{path}: unknown entry {where}{key}; {nearest(key, known)}")
