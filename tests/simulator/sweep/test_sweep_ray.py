"""Sweeps on Ray: a cluster of two real nodes, one of which dies, and then all of it."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from moesim import SimulationError
from moesim.sweep import Grid, SweepSettings, ray_driver, run_sweep
from moesim.sweep.ray_pool import ray_address
from polars.testing import assert_frame_equal
from support.traces import random_trace

SUPPORT = Path(__file__).parents[2] / "support"
SLOW = f"{SUPPORT / 'sweep_policies.py'}:Slow:ms=500"
DEADLY = f"{SUPPORT / 'sweep_policies.py'}:Deadly"
COMMAND = [sys.executable, "-c", "from moesim.cli import main; main()", "sweep"]
# What the sweeps of these tests find in their environment: a Ray on the loopback interface.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
PATIENCE_S = 240  # a client server may be asked more than once

slow = pytest.mark.slow
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "ray_cluster.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    addresses: list[str] = []
    while len(addresses) != 2 or not addresses[1].startswith("ray://"):
        line = process.stdout.readline()
        assert line, "the cluster did not start"
        addresses = line.split()
    yield process, *addresses
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    return str(random_trace(tmp_path / "trace.parquet"))


def order(cluster: Any, text: str) -> None:
    cluster[0].stdin.write(text + "\n")
    cluster[0].stdin.flush()


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | LOOPBACK,
    )


def wait_for_points(out: Path, n: int) -> None:
    journal = Path(f"{out}.partial", "points.jsonl")
    until = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < n:
        assert time.monotonic() < until, "no point was finished"
        time.sleep(0.05)


def locally(grid: Grid, out: Path) -> pl.DataFrame:
    run_sweep(grid, str(out), SweepSettings(workers=2))
    return pl.read_parquet(out)


@slow
@needs_ray
def test_a_cluster_gives_the_numbers_of_one_machine(
    cluster: Any, tmp_path: Path, trace: str
) -> None:
    grid = Grid(("lru", "random:seed=3"), (trace,), (1, 2), machines=("t4", "a100"))
    expected = locally(grid, tmp_path / "local.parquet")
    for number, address in enumerate(cluster[1:]):
        out = tmp_path / f"{number}.parquet"
        running = start(
            *grid.policies, "--trace", trace, "--slots", "1,2", "--machine", "t4,a100",
            "--on", address, "--out", out,
        )  # fmt: skip
        _, said = running.communicate(timeout=PATIENCE_S)
        assert running.returncode == 0, said
        assert "8 run in" in said
        assert_frame_equal(pl.read_parquet(out), expected)
        assert not Path(f"{out}.partial").exists()


@slow
@needs_ray
def test_a_worker_that_dies_on_a_node_is_replaced(cluster: Any, tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    deadly = f"{DEADLY}:where={tmp_path},times=1"
    running = start(deadly, "--trace", trace, "--slots", "1,2", "--on", cluster[1], "--out", out)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    assert "died" in said
    assert "Deadly" in said
    assert pl.read_parquet(out)["status"].to_list() == ["ok", "ok"]


@slow
@needs_ray
def test_a_node_that_dies_is_survived_and_a_cluster_that_goes_away_is_told(
    cluster: Any, tmp_path: Path, trace: str
) -> None:
    axes = ["--trace", trace, "--slots", "0,1,2,3", "--scope", "layer,global"]
    grid = Grid((SLOW,), (trace,), (0, 1, 2, 3), scopes=("layer", "global"))
    expected = locally(grid, tmp_path / "local.parquet")

    one = tmp_path / "one.parquet"
    running = start(SLOW, *axes, "--on", cluster[1], "--out", one)
    wait_for_points(one, 2)
    order(cluster, "kill node")
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    assert "died" in said
    assert "tried once more" in said
    assert_frame_equal(pl.read_parquet(one), expected)

    two = tmp_path / "two.parquet"
    running = start(SLOW, *axes, "--on", cluster[1], "--out", two, "--workers", "1")
    wait_for_points(two, 1)
    order(cluster, "kill head")
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 1, said
    assert f"the Ray cluster at {cluster[1]} went away" in said
    assert f"of 8 points are kept in {two}.partial: --resume goes on from them" in said
    assert "Traceback" not in said
    assert not two.exists()

    run_sweep(grid, str(two), SweepSettings(resume=True))  # what is left, on this machine
    assert_frame_equal(pl.read_parquet(two), expected)


@slow
@needs_ray
def test_a_ray_of_our_own_listens_on_loopback_and_leaves_nothing_behind(
    tmp_path: Path, trace: str
) -> None:
    import psutil

    out = tmp_path / "r.parquet"
    running = start(SLOW, "--trace", trace, "--slots", "0,1,2,3", "--on", "ray", "--out", out)
    wait_for_points(out, 1)
    family = psutil.Process(running.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in family)
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert all(ip.removeprefix("::ffff:").startswith("127.") for ip in listening), listening
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 130, said
    assert "of 4 points are kept" in said
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left


@pytest.mark.slow
@needs_ray
def test_nobody_at_an_address_is_said_at_once(tmp_path: Path, trace: str) -> None:
    out = tmp_path / "r.parquet"
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        running = start("lru", "--trace", trace, "--on", address, "--out", out)
        _, said = running.communicate(timeout=60)
        assert running.returncode == 1
        assert said.startswith(f"error: the Ray cluster at {address} cannot be used")
        assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace.parquet"]


def test_a_client_server_that_refuses_once_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    asked: list[str] = []

    def refuse_once(address: str, **_: Any) -> None:
        asked.append(address)
        if len(asked) == 1:
            raise ConnectionAbortedError("Initialization failure from server:\nTimeoutError: late")

    monkeypatch.setattr(ray, "init", refuse_once)
    monkeypatch.setattr(ray_driver, "JOIN_PAUSE_S", 0.0)
    ray_driver._join("ray://head:1")
    assert asked == ["ray://head:1"] * 2


def test_a_client_server_that_keeps_refusing_is_said_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = pytest.importorskip("ray")

    def refuse(address: str, **_: Any) -> None:
        raise ConnectionAbortedError(
            "Initialization failure from server:\nTraceback:\n  at x\nTimeoutError: late"
        )

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray_driver, "JOIN_S", 0.0)
    with pytest.raises(ConnectionAbortedError) as caught:
        ray_driver._join("ray://head:1")
    assert ray_driver._reason(caught.value) == "TimeoutError: late"


def test_what_may_be_an_address() -> None:
    assert ray_address("ray") is None
    assert ray_address("ray://head:10001") == "ray://head:10001"
    assert ray_address("10.0.0.1:6379") == "10.0.0.1:6379"
    for wrong in ("rya", "ray://", "ray://head", "http://head:1", "head:port", ":1"):
        with pytest.raises(SimulationError, match="it is local, ray, ray://host:port"):
            ray_address(wrong)


def test_without_ray_the_extra_to_install_is_named(
    tmp_path: Path, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SimulationError, match=r"needs Ray, .*pip install 'moe-offload-lab\[ray\]'"):
        run_sweep(Grid(("lru",), (trace,)), str(tmp_path / "r.parquet"), SweepSettings(on="ray"))
    assert not (tmp_path / "r.parquet.partial").exists()
