"""Simulated machines for tests: small round times that coincide often."""

from __future__ import annotations

from dataclasses import fields

from hypothesis import strategies as st
from moesim import Machine
from moesim.machine.profile import Compute, Cpu, Disk, LinkProfile

NS = 1e-9

_short = st.sampled_from([0.0, 1 * NS, 2 * NS, 5 * NS, 10 * NS])
_rate = st.sampled_from([1e9, 2e9, 5e9, 1e10])

links = st.builds(
    LinkProfile,
    bytes_per_s=_rate,
    latency_s=_short,
    streams=st.integers(1, 3),
    chunk_bytes=st.sampled_from([0, 0, 3, 5, 10]),
    write_back=st.booleans(),
    back_to_back=st.booleans(),
)
computes = st.builds(
    Compute,
    token_s=_short,
    layer_s=_short,
    layer_token_s=_short,
    gate_sync_s=_short,
    prefetch_s=_short,
    arrival_s=_short,
    expert_s=_short,
    expert_token_s=_short,
    memory_bytes_per_s=st.sampled_from([float("inf"), 5e9]),
)
disks = st.builds(
    Disk, bytes_per_s=_rate, latency_s=_short, host_bytes=st.sampled_from([0, 10, 30, 60])
)
cpus = st.builds(Cpu, workers=st.integers(1, 3), expert_s=_short, expert_token_s=_short)

# Everything a profile can say, for experts of 10 bytes.
machines = st.builds(
    Machine,
    name=st.just("test"),
    description=st.just(""),
    source=st.just("published"),
    link=links,
    compute=computes,
    disk=st.none() | disks,
    cpu=cpus,
)

full_machines = st.builds(
    Machine,
    name=st.just("test"),
    description=st.just(""),
    source=st.just("published"),
    link=links,
    compute=computes,
    disk=disks,
    cpu=cpus,
)


def machine(**changes: float) -> Machine:
    """1 byte a ns over the link, 5 ns a layer, 3 ns an expert, and the changes asked for."""
    entries = {"bytes_per_s": 1e9, "layer_s": 5 * NS, "expert_s": 3 * NS} | changes
    names = [field.name for field in fields(LinkProfile)]
    link = {name: entries.pop(name) for name in names if name in entries}
    return Machine("test", "", "published", LinkProfile(**link), Compute(**entries))  # type: ignore[arg-type]
