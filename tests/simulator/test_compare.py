"""`moesim.compare` as a notebook would use it: the command's rows, as a frame."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import moesim
import numpy as np
import polars as pl
import pytest
from moepolicy import Policy, PolicyError
from moeroute import TraceError, open_trace
from numpy.typing import NDArray


class Highest(Policy):
    """Evict the highest key."""

    def victim(self, layer: int, incoming: int, candidates: NDArray[np.int32]) -> int:
        return int(candidates[-1])


def test_it_gives_the_rows_of_the_command(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    options = ["--slots", "2,4", "--machine", "t4", "--tokens", "300", "--out", str(out)]
    command = [sys.executable, "-m", "moesim.cli", "compare", "lru", "lru-spec:n=1", *options]
    code = "import sys; from moesim.cli import main; sys.argv = sys.argv[1:]; main()"
    subprocess.run([sys.executable, "-c", code, *command[2:]], check=True)
    frame = moesim.compare("tiny", ["lru", "lru-spec:n=1"], slots=[2, 4], machine="t4", tokens=300)
    assert frame.to_dicts() == json.loads(out.read_text())
    assert frame["policy"].to_list() == ["lru", "lru-spec:n=1"] * 2


def test_traces_machines_and_policies_may_be_objects() -> None:
    trace, machine = open_trace("tiny"), moesim.load_machine("t4")
    frame = moesim.compare(trace, [Highest, "belady"], slots=4, machine=machine, tokens=200)
    assert frame["policy"].to_list() == ["Highest", "belady"]
    misses = frame["misses"].to_list()
    assert misses[0] > misses[1] == frame["limit_loads_kept"][0]


def test_a_policy_that_cannot_run_is_a_row_with_the_reason() -> None:
    frame = moesim.compare("tiny", ["lru", "hobbit"], slots=4, tokens=100)
    lru, hobbit = frame.to_dicts()
    assert lru["refused"] is None
    assert "lower precision" in hobbit["refused"]
    assert hobbit["loads"] is None
    assert frame.schema["loads"] == pl.Int64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"trace": "tinny"}, TraceError, "tiny"),
        ({"machine": "rtx3061"}, moesim.SimulationError, "rtx3060"),
        ({"policies": ["lruu"]}, PolicyError, "lru"),
        ({"precision": "bf16", "expert_bytes": 5}, moesim.UsageError, "not both"),
        ({"engine": "fast"}, moesim.UsageError, "simpy"),
    ],
)
def test_what_is_not_there_is_named(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        moesim.compare(**{"trace": "tiny", "tokens": 50} | options)  # type: ignore[arg-type]
