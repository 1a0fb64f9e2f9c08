"""Machine profiles: the shipped ones, and what is said of nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest
from moesim import SimulationError, load_machine, machine_names

GOOD = 'name = "mine"\nsource = "measured"\n[link]\nbytes_per_s = 1e9\n[compute]\nlayer_s = 1e-6\n'


def test_shipped_profiles_load_and_say_where_they_are_from() -> None:
    assert {"t4", "rtx3060", "rtx3080-mobile", "a100", "cpu-disk"} <= set(machine_names())
    for name in machine_names():
        machine = load_machine(name)
        assert machine.name == name
        assert machine.description


def test_costs_in_nanoseconds(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        "[link]\nbytes_per_s = 3e9\n[compute]\nlayer_s = 2e-6\nlayer_token_s = 1e-9\n"
        "prefetch_s = 5e-9\nexpert_s = 1e-6\nmemory_bytes_per_s = 1e9\nflops_per_s = 1e12\n"
    )
    machine = load_machine(str(path))
    assert machine.copy_ns(10) == 4  # a copy is never shorter than its bytes
    assert machine.layer_ns(3, 100, predicting=True) == 2000 + 2 + 5 + 100
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
