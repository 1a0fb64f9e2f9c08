"""Bytes that a simulation is charged for: dense weights in every engine and in the limits, or said
to be unknown."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
from moepolicy import find_policy
from moeroute import DECODE, TraceMeta, TraceWriter
from moeroute.models import find_model
from moeroute.schema import Rows
from moesim import Workload, simulate
from moesim.cli import main
from moesim.engines.names import Engine
from moesim.errors import SimulationError
from moesim.gap import gap_of
from moesim.limits import limits_of, min_time_ns
from moesim.machine.unknown import LOWER_BOUND
from moesim.result import Result
from moesim.sizes import expert_size, sizes_of
from moesim.sweep.grid import make_grid
from moesim.sweep.plan import make_plan
from support.machines import NS, machine
from support.traces import decoded, write_trace
from support.workloads import make_workload

PASSES, LAYERS = 6, 2


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def moesim(*arguments: str | Path) -> Ended:
    """The command in this process, which has it imported."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["moesim", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ended(code, out.getvalue(), err.getvalue())


ON = machine(memory_bytes_per_s=1e9)  # a byte takes a nanosecond to read


def workload(**sizes: Any) -> Workload:
    """Two layers, one expert each of two in turn: one slot misses every time, two never again."""
    demands = [(layer, (step % 2,)) for step in range(PASSES) for layer in range(LAYERS)]
    made = make_workload(demands, LAYERS, 2)
    return made.sized(replace(made.meta, **sizes))


def run(of: Workload, engine: Engine = Engine.simpy, slots: int = 2, **options: Any) -> Result:
    return simulate(of, find_policy("lru"), ON, slots=slots, engine=engine, **options)


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
@pytest.mark.parametrize("slots", [1, 2])
def test_reading_dense_weights_takes_its_time_in_every_engine(engine: Engine, slots: int) -> None:
    """7 ns more for each layer, 11 for each pass: on-demand copies hide nothing."""
    free = run(workload(), engine, slots).time_s
    layers = run(workload(layer_bytes=7), engine, slots).time_s
    both = run(workload(layer_bytes=7, token_bytes=11), engine, slots).time_s
    assert free is not None
    assert layers is not None
    assert both is not None
    assert layers - free == pytest.approx(PASSES * LAYERS * 7 * NS)
    assert both - layers == pytest.approx(PASSES * 11 * NS)


def test_reading_dense_weights_takes_its_time_in_the_limit() -> None:
    """With all experts cached the least time is compute's, and each byte of it counts."""

    def least_ns(**sizes: int) -> int:
        of = workload(**sizes)
        return min_time_ns(of, ON, sizes_of(of.meta, 1), 2, "layer")

    free = least_ns()
    assert least_ns(layer_bytes=70) - free == PASSES * LAYERS * 70
    assert least_ns(token_bytes=110) - free == PASSES * 110
    known = limits_of(
        workload(layer_bytes=70, token_bytes=110), ON, sizes_of(workload().meta, 1), 2, "layer"
    )
    assert known.tokens_per_s is not None
    result = run(workload(layer_bytes=70, token_bytes=110), slots=2)
    assert result.limit_tokens_per_s == pytest.approx(
        PASSES / ((free + PASSES * (LAYERS * 70 + 110)) * NS), rel=0.2
    )


def test_both_engines_and_the_limit_agree_on_real_sizes() -> None:
    """A layer of gpt-oss-20b's dense weights takes 148 us of a 360 GB/s card, a token's 3.2 ms."""
    model = find_model("gpt-oss-20b")
    dense = model.dense()
    card = machine(memory_bytes_per_s=360e9)
    of = workload(layer_bytes=dense.layer_bytes, token_bytes=dense.token_bytes)
    times = [
        simulate(of, find_policy("lru"), card, slots=2, engine=engine).time_s
        for engine in (Engine.simpy, Engine.replay)
    ]
    assert times[0] == times[1]
    assert times[0] is not None
    reading = PASSES * (LAYERS * dense.layer_bytes + dense.token_bytes) / 360e9
    assert reading == pytest.approx(times[0], rel=0.01)
    assert dense.layer_bytes / 360e9 == pytest.approx(148e-6, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "missing"),
    [
        ({}, ("layer", "token")),
        ({"layer_bytes": 7}, ("token",)),
        ({"token_bytes": 7}, ("layer",)),
        ({"layer_bytes": 7, "token_bytes": 7}, ()),
    ],
)
def test_a_row_says_whether_its_time_is_a_lower_bound(
    sizes: dict[str, int], missing: tuple[str, ...]
) -> None:
    of = workload(**sizes)
    assert sizes_of(of.meta, 10).uncharged(ON) == missing
    row = run(of).row()
    assert row["time_is_lower_bound"] is bool(missing)
    assert (row["layer_bytes"], row["token_bytes"]) == (
        sizes.get("layer_bytes"),
        sizes.get("token_bytes"),
    )
    # Where a machine's fixed costs hold the reading, nothing is left out.
    fixed = machine()
    assert math.isinf(fixed.compute.memory_bytes_per_s)
    assert simulate(of, find_policy("lru"), fixed, slots=2).time_is_lower_bound is False


@pytest.mark.parametrize("engine", [Engine.simpy, Engine.replay])
def test_without_an_experts_size_counts_are_found_and_times_are_not(engine: Engine) -> None:
    unsized = workload(expert_bytes={})
    chunked = machine(memory_bytes_per_s=1e9, chunk_bytes=5)
    for slots in (1, 2):
        known = run(workload(), engine, slots)
        found = simulate(unsized, find_policy("lru"), chunked, slots=slots, engine=engine)
        for name in ("hits", "misses", "loads", "hit_ratio", "limit_loads", "limit_loads_kept"):
            assert getattr(found, name) == getattr(known, name)
        for name in (
            "expert_bytes",
            "bytes_loaded",
            "time_s",
            "stall_s",
            "link_busy_s",
            "tokens_per_s",
            "limit_tokens_per_s",
            "share_of_limit",
            "time_is_lower_bound",
        ):
            assert getattr(found, name) is None
        assert gap_of(found.row(), found.row()).time is None


def test_what_needs_an_experts_size_says_so() -> None:
    unsized = workload(expert_bytes={})
    with pytest.raises(
        SimulationError, match=r"'lru-spec:n=1' prefetches, and which prefetches arrive in time"
    ):
        simulate(unsized, find_policy("lru-spec:n=1"), ON, slots=1)
    with pytest.raises(SimulationError, match=r"a timeline needs times: nothing says how big"):
        run(unsized, timeline=[])
    assert expert_size(unsized.meta, precision=None, expert_bytes=None) is None
    with pytest.raises(SimulationError, match="no size for precision '4bit'; it has none"):
        expert_size(unsized.meta, precision="4bit", expert_bytes=None)


def imported(path: Path, **sizes: Any) -> Path:
    """A trace as an import leaves it: of gpt-oss-20b's shape, of two tokens, without sizes."""
    rng = np.random.default_rng(0)
    n = 30 * 24
    settings: dict[str, Any] = {"n_layers": 24, "n_experts": 32, "top_k": 4, **sizes}
    meta = TraceMeta(source="imported", model="foreign", **settings)
    experts = np.stack([rng.permutation(32)[:4] for _ in range(n)]).astype(np.uint16)
    rows = Rows(
        sequence=np.zeros(n, np.uint32),
        position=np.repeat(np.arange(30), 24).astype(np.uint32),
        phase=np.full(n, DECODE, np.uint8),
        token_id=None,
        layer=np.tile(np.arange(24), 30).astype(np.uint16),
        experts=experts,
        weights=None,
    )
    with TraceWriter(path, meta) as writer:
        writer.write(rows)
    return path


def compared(*options: str | Path) -> Any:
    done = moesim("compare", "lru", "--slots", "8", *options, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[0]


def test_like_makes_the_simulated_machine_read_the_dense_weights(tmp_path: Path) -> None:
    trace = imported(tmp_path / "t.parquet")
    dense = find_model("gpt-oss-20b").dense()
    bare = compared("--trace", trace, "--expert-bytes", "13236480")
    full = compared("--trace", trace, "--like", "gpt-oss-20b")
    assert (bare["layer_bytes"], bare["token_bytes"], bare["time_is_lower_bound"]) == (
        None,
        None,
        True,
    )
    assert [full["layer_bytes"], full["token_bytes"]] == list(dense)
    assert full["time_is_lower_bound"] is False
    assert full["expert_bytes"] == bare["expert_bytes"]
    assert full["sizes_like"] == "gpt-oss-20b"
    reading_s = 30 * (24 * dense.layer_bytes + dense.token_bytes) / 360e9
    assert full["time_s"] - bare["time_s"] == pytest.approx(reading_s, rel=1e-3)
    numbers = compared(
        "--trace",
        trace,
        "--expert-bytes",
        "13236480",
        "--dense-layer-bytes",
        str(dense.layer_bytes),
        "--dense-token-bytes",
        str(dense.token_bytes),
    )
    assert numbers["tokens_per_s"] == pytest.approx(full["tokens_per_s"], rel=1e-6)
    lighter = compared("--trace", trace, "--like", "gpt-oss-20b", "--attention", "4bit")
    assert lighter["tokens_per_s"] > full["tokens_per_s"]
    assert lighter["dense_precision"] == "bf16, attention 4bit"


def test_a_table_says_what_is_unknown_and_what_was_assumed(tmp_path: Path) -> None:
    trace = imported(tmp_path / "t.parquet")
    bare = moesim("compare", "lru", "--slots", "8", "--trace", trace, "--expert-bytes", "1000000")
    shown = " ".join(bare.stdout.split())  # the notes are wrapped
    assert "Dense weights unknown." in shown
    assert f"{LOWER_BOUND}, and tokens/s an upper bound" in shown
    assert "--dense-layer-bytes and --dense-token-bytes" in shown
    full = moesim("compare", "lru", "--slots", "8", "--trace", trace, "--like", "gpt-oss-20b")
    shown = " ".join(full.stdout.split())
    assert "Dense weights of 53,296,192 bytes a layer and 1,158,278,400 bytes a token" in shown
    assert "a token (bf16)." in shown
    assert "unknown" not in full.stdout
    nothing = moesim("compare", "lru", "--slots", "8", "--trace", trace)
    assert nothing.returncode == 0, nothing.stderr
    shown = " ".join(nothing.stdout.split())
    assert "experts of unknown size" in shown
    assert "-: nothing says how big an expert is, so there are no times" in shown
    lru = next(line for line in nothing.stdout.splitlines() if line.split()[:1] == ["lru"])
    assert lru.split()[-4:] == ["-", "-", "-", "-"]  # stall %, tokens/s, limit %, gap %
    assert float(lru.split()[2]) > 0  # hit %
    rows = moesim("compare", "lru", "--slots", "8", "--trace", trace, "--format", "csv").stdout
    row = next(csv.DictReader(io.StringIO(rows)))
    assert (row["tokens_per_s"], row["limit_tokens_per_s"], row["expert_bytes"]) == ("", "", "")


def test_a_recording_of_fewer_experts_a_token_says_so_where_sizes_are_taken(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t.parquet", decoded(*[[[3, 5]] * 24] * 2), 32)
    done = moesim("compare", "lru", "--slots", "8", "--trace", trace, "--like", "gpt-oss-20b")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    assert "(bf16); top-2 of a model that has top-4: reduced by the recorder" in shown


def test_a_timeline_says_what_its_times_leave_out(tmp_path: Path) -> None:
    trace = imported(tmp_path / "t.parquet")
    out = tmp_path / "out.json.gz"
    options: list[str | Path] = ["compare", "lru", "--slots", "8", "--tokens", "2"]
    options += ["--timeline", out]
    done = moesim(*options, "--trace", trace, "--expert-bytes", "1000000")
    assert done.returncode == 0, done.stderr
    with gzip.open(out, "rt") as file:
        assert LOWER_BOUND in json.load(file)["otherData"]["notes"]
    done = moesim(*options, "--trace", trace, "--like", "gpt-oss-20b", "--force")
    assert done.returncode == 0, done.stderr
    with gzip.open(out, "rt") as file:
        assert json.load(file)["otherData"] == {}
    refused = moesim(*options, "--trace", trace, "--force")
    assert refused.returncode == 1
    assert "a timeline needs times, and nothing says how big an expert is" in refused.stderr


def test_a_model_the_trace_cannot_be_of_is_refused(tmp_path: Path) -> None:
    trace = imported(tmp_path / "t.parquet")
    refused = moesim("compare", "lru", "--trace", trace, "--like", "mixtral-8x7b")
    assert refused.returncode == 1
    assert (
        "the trace of foreign is not like mixtral-8x7b: it has 24 layers where mixtral-8x7b has 32"
        in refused.stderr
    )
    unknown = moesim("compare", "lru", "--trace", trace, "--like", "gpt-oss-21b")
    assert "did you mean 'gpt-oss-20b'?" in unknown.stderr


def swept(tmp_path: Path, trace: Path, *options: str) -> Any:
    done = moesim(
        "sweep",
        "lru",
        "--slots",
        "8",
        "--trace",
        trace,
        "--out",
        tmp_path / "out.parquet",
        "--restart",
        "--workers",
        "1",
        *options,
    )
    import polars as pl

    frame = pl.read_parquet(tmp_path / "out.parquet") if done.returncode == 0 else None
    (tmp_path / "out.parquet").unlink(missing_ok=True)
    return done, None if frame is None else frame.row(0, named=True)


@pytest.mark.slow
def test_a_sweep_takes_the_same_sizes(tmp_path: Path) -> None:
    trace = imported(tmp_path / "t.parquet")
    done, row = swept(tmp_path, trace, "--like", "gpt-oss-20b")
    assert done.returncode == 0, done.stderr
    one = compared("--trace", trace, "--like", "gpt-oss-20b")
    for name in ("tokens_per_s", "layer_bytes", "token_bytes", "time_is_lower_bound"):
        assert row[name] == one[name]
    assert "unknown" not in done.stdout
    done, row = swept(tmp_path, trace)
    assert done.returncode == 0, done.stderr
    assert (row["tokens_per_s"], row["expert_bytes"], row["status"]) == (None, None, "ok")
    assert row["hit_ratio"] == one["hit_ratio"]
    assert "nothing says how big an expert is, so there are no times" in done.stdout
    done, row = swept(tmp_path, trace, "--expert-bytes", "1000000")
    assert LOWER_BOUND in done.stdout
    assert row["time_is_lower_bound"] is True
    done, _ = swept(tmp_path, trace, "--like", "gpt-oss-120b")
    assert done.returncode == 1
    assert "is not like gpt-oss-120b" in done.stderr


def test_a_sweeps_points_are_kept_under_the_sizes_they_were_run_with(tmp_path: Path) -> None:
    trace = str(imported(tmp_path / "t.parquet"))

    def key(**more: Any) -> str:
        entries = {"policies": ["lru"], "traces": [trace], "slots": [8], "limits": False}
        plan = make_plan(make_grid(entries | {"expert_bytes": [10]} | more))
        return plan.points[0].key

    assert key(dense_layer_bytes=5) == key(dense_layer_bytes=5) != key()
    assert key(dense_token_bytes=5) not in (key(), key(dense_layer_bytes=5))
    assert key(like="gpt-oss-20b") != key()
    unsized = {"policies": ["lru"], "traces": [trace], "memory": ["1GiB"]}
    with pytest.raises(SimulationError, match="and so how many fit a budget"):
        make_plan(make_grid(unsized))


def test_old_imports_with_zero_bytes_are_told_as_unknown(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t.parquet", decoded([[0]], [[1]], [[0]]), 2)
    import polars as pl

    text = json.loads(pl.read_parquet_metadata(path)["moeroute"])
    old = text | {"source": "imported", "layer_bytes": 0, "token_bytes": 0}
    pl.read_parquet(path).write_parquet(path, metadata={"moeroute": json.dumps(old)})
    done = moesim("compare", "lru", "--slots", "1", "--trace", path)
    assert done.returncode == 0, done.stderr
    assert LOWER_BOUND in done.stdout
