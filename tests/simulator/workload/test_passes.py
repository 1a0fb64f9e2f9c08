"""Tokens of several requests that share a forward pass are one step a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moepolicy
import moesim
import numpy as np
import pytest
from moeroute import Rows, Trace, TraceMeta, TraceWriter, open_trace
from moeroute.schema import NO_EXPERT
from moesim.workload import loading
from moesim.workload.steps import Workload

# sequence, position, phase, pass, experts of layer 0; layer 1 always has 2 and 3.
# Pass 2 and 3 decode a token of both requests; pass 4 one of the first alone.
TOKENS = [
    (0, 0, 0, 0, [0, 1]),
    (0, 1, 0, 0, [1, 4]),
    (0, 2, 1, 2, [5]),
    (0, 3, 1, 3, [6, 7]),
    (0, 4, 1, 4, [1, 0]),
    (1, 0, 0, 1, [4, 5]),
    (1, 1, 1, 2, [5, 6]),
    (1, 2, 1, 3, [7, 0]),
    (2, 0, 1, 5, [3, 2]),
]


def write(path: Path, tokens: list[Any] = TOKENS) -> Trace:
    meta = TraceMeta(
        source="imported", model="m", n_layers=2, n_experts=8, top_k=2, variable_top_k=True
    )
    experts = [pair for *_, chosen in tokens for pair in ((*chosen, NO_EXPERT)[:2], (2, 3))]
    columns = np.repeat(np.array([token[:4] for token in tokens], np.uint32), 2, axis=0)
    logits = np.zeros((2 * len(tokens), 8), np.float16)
    logits[:, 0] = np.arange(2 * len(tokens))
    with TraceWriter(path, meta) as writer:
        writer.write(
            Rows(
                sequence=columns[:, 0],
                position=columns[:, 1],
                phase=columns[:, 2].astype(np.uint8),
                token_id=None,
                layer=np.tile([0, 1], len(tokens)).astype(np.uint16),
                experts=np.array(experts, np.uint16),
                weights=None,
                router_logits=logits,
                pass_id=columns[:, 3],
            )
        )
    trace = open_trace(path)
    trace.validate()
    return trace


def steps(workload: Workload) -> list[tuple[int, list[int], list[int], int, bool]]:
    found = []
    for step in range(workload.n_steps):
        demand = slice(int(workload.offsets[step]), int(workload.offsets[step + 1]))
        found.append(
            (
                int(workload.layer[step]),
                sorted(workload.keys[demand].tolist()),
                sorted(workload.routed[demand].tolist()),
                int(workload.tokens[step]),
                bool(workload.decode[step]),
            )
        )
    return found


EXPECTED = [
    (0, [0, 1, 4], [1, 1, 2], 2, False),
    (1, [10, 11], [2, 2], 2, False),
    (0, [4, 5], [1, 1], 1, False),
    (1, [10, 11], [1, 1], 1, False),
    (0, [5, 6], [1, 2], 2, True),
    (1, [10, 11], [2, 2], 2, True),
    (0, [0, 6, 7], [1, 1, 2], 2, True),
    (1, [10, 11], [2, 2], 2, True),
    (0, [0, 1], [1, 1], 1, True),
    (1, [10, 11], [1, 1], 1, True),
    (0, [2, 3], [1, 1], 1, True),
    (1, [10, 11], [1, 1], 1, True),
]


@pytest.mark.parametrize("block_rows", [3, 4, 7, 1000])
def test_a_pass_is_one_step_a_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int
) -> None:
    monkeypatch.setattr(loading, "BLOCK_ROWS", block_rows)
    workload = moesim.load_workload(write(tmp_path / "t.parquet"), logits=True)
    assert steps(workload) == EXPECTED
    # Sequences 0 and 1 share passes: only where both have ended does another begin.
    assert workload.starts.tolist() == [0, 10]
    assert (workload.n_prompt, workload.n_decoded) == (3, 6)
    assert workload.logits is not None  # of the rows in the order of their passes
    assert workload.logits[:, 0].tolist() == [
        0,
        1,
        2,
        3,
        10,
        11,
        4,
        5,
        12,
        13,
        6,
        7,
        14,
        15,
        8,
        9,
        16,
        17,
    ]


def test_passes_in_the_order_of_sequences_need_no_other(tmp_path: Path) -> None:
    alone = [(*token[:3], i, token[4]) for i, token in enumerate(TOKENS)]
    workload = moesim.load_workload(write(tmp_path / "t.parquet", alone))
    assert workload.starts.tolist() == [0, 10, 16]
    assert [step[3] for step in steps(workload)] == [1] * 18


def test_policies_that_route_need_as_many_experts_a_token(tmp_path: Path) -> None:
    with pytest.raises(moesim.SimulationError, match="tokens choose different numbers of experts"):
        moesim.load_workload(write(tmp_path / "t.parquet"), rows=True)


def test_both_engines_count_batches_alike(tmp_path: Path) -> None:
    workload = moesim.load_workload(write(tmp_path / "t.parquet"))
    lru, machine = moepolicy.find_policy("lru"), moesim.load_machine("rtx3060")
    results = [
        moesim.simulate(workload, lru, machine, slots=4, expert_bytes=1000, engine=engine)
        for engine in (moesim.Engine.simpy, moesim.Engine.replay)
    ]
    assert results[0] == results[1]
    assert results[0].requests == sum(len(keys) for _, keys, *_ in EXPECTED)
