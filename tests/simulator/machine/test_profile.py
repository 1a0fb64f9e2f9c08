"""Machine profiles: the shipped ones, and what is said of nonsense."""

from __future__ import annotations

import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from moesim import SimulationError, load_machine, machine_names
from moesim.machine.profile import ORIGINS, SHIPPED

GOOD = 'name = "mine"\nsource = "measured"\n[link]\nbytes_per_s = 1e9\n[compute]\nlayer_s = 1e-6\n'


def test_shipped_profiles_load_and_say_where_they_are_from() -> None:
    assert {"t4", "rtx3060", "rtx3080-mobile", "a100", "cpu-disk"} <= set(machine_names())
    for name in machine_names():
        machine = load_machine(name)
        assert machine.name == name
        assert machine.description


@pytest.mark.parametrize("name", machine_names())
def test_shipped_profiles_say_where_every_number_is_from(name: str) -> None:
    machine = load_machine(name)
    sections = {part: value for part, value in asdict(machine).items() if isinstance(value, dict)}
    given = tomllib.loads((SHIPPED / f"{name}.toml").read_text())
    entries = {f"{part}.{entry}" for part in sections if part != "sources" for entry in given[part]}
    entries |= {"memory_bytes"} & set(given)
    assert set(machine.sources) == entries
    assert all(said.split(":")[0] in ORIGINS for said in machine.sources.values())
    if machine.source == "published":
        assert machine.memory_bytes
        assert not any(said.startswith("measured") for said in machine.sources.values())


def test_the_cards_that_people_have_are_there() -> None:
    wanted: dict[str, float] = {
        "rtx3060": 360,
        "rtx3070": 448,
        "rtx3090": 936,
        "rtx4060": 272,
        "rtx4070": 504,
    }
    wanted |= {"rtx4090": 1008, "rtx5070ti": 896, "rtx5090": 1792, "l4": 300, "t4": 320}
    wanted |= {"a10": 600, "a100": 2039, "h100": 3350, "jetson-orin": 204.8, "ryzen-ai-max": 256}
    for name, gb_per_s in wanted.items():
        assert load_machine(name).compute.memory_bytes_per_s == gb_per_s * 1e9
    slow, fast = (load_machine(f"nvme-{each}").link.bytes_per_s for each in ("gen3", "gen4"))
    assert slow < fast


def test_costs_in_nanoseconds(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        "[link]\nbytes_per_s = 3e9\n[compute]\nlayer_s = 2e-6\nlayer_token_s = 1e-9\n"
        "prefetch_s = 5e-9\nexpert_s = 1e-6\nmemory_bytes_per_s = 1e9\nflops_per_s = 1e12\n"
    )
    machine = load_machine(str(path))
    assert machine.copy_ns(10) == 4  # a copy is never shorter than its bytes
    assert machine.layer_ns(3, 100) == 2000 + 2 + 100
    assert machine.gates_ns == 5
    assert machine.expert_ns(1, 600, 300) == 1000 + 600  # its bytes take longer than its operations
    assert machine.expert_ns(1000, 600, 300_000) == 1000 + 600_000  # and here they do not


def test_bytes_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"{GOOD}\n[disk]\nbytes_per_s = 2e9\nhost_bytes = 16e9\n")
    disk = load_machine(str(path)).disk
    assert disk is not None
    assert disk.host_bytes == 16_000_000_000
    assert isinstance(disk.host_bytes, int)
    path.write_text(path.read_text().replace("16e9", "0.5"))
    with pytest.raises(SimulationError, match=r"host_bytes is 0\.5, not a whole number"):
        load_machine(str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("bytes_per_s = 1e9", "bytes_per_s = 0"), "[link] bytes_per_s is 0; a rate must be above"),
        (("bytes_per_s = 1e9", "latency_s = 1"), "[link] has no bytes_per_s"),
        (("layer_s = 1e-6", "layer_s = -1.0"), "[compute] layer_s is -1.0; it must be 0 or"),
        (("layer_s = 1e-6", "layer_s = nan"), "[compute] layer_s is nan, not a number"),
        (("layer_s = 1e-6", 'layer_s = "1"'), "[compute] layer_s is '1', not a number"),
        (("layer_s", "layers"), "unknown entry [compute] layers; did you mean 'layer_s'?"),
        (("[compute]", "[computer]"), "unknown entry computer; did you mean 'compute'?"),
        (("[compute]", "streams = 9\n[compute]"), "[link] streams is 9, not 1, 2 or 3"),
        (('"measured"', '"guessed"'), "source is 'guessed', not one of measured, published"),
        (("[link]", "[link"), "is not a machine profile"),
        (("[link]", "memory_bytes = 0\n[link]"), "memory_bytes is 0, not a number above 0"),
        (("[link]", '[sources]\n"link.x" = "derived"\n[link]'), "has no such entry"),
        (
            ("[link]", '[sources]\n"link.bytes_per_s" = "heard"\n[link]'),
            "begins with one of datasheet, derived, measured, assumed",
        ),
    ],
)
def test_a_nonsense_profile_is_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    assert load_machine(str(path)).name == "mine"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(SimulationError) as caught:
        load_machine(str(path))
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_machine_lists_those_there_are() -> None:
    with pytest.raises(SimulationError, match="did you mean 'rtx3060'"):
        load_machine("rtx3061")
