"""What other recorders write, in their layouts: each file becomes steps worked out by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import moesim
import numpy as np
import polars as pl
import pytest
from moeroute import Trace
from moeroute.importers import FORMATS, ImportOptions, import_foreign
from moeroute.schema import NO_EXPERT
from support.recorders import (
    IDS,
    LATER,
    PROMPT,
    E,
    K,
    L,
    P,
    T,
    cache_eval,
    every_file,
    lines,
    logits,
    saved,
    sglang_record,
    tensor,
    torch,
)

FILES = every_file()


def steps(trace: Trace) -> list[tuple[int, dict[int, int]]]:
    """Each step's layer, and its experts with how many tokens use them."""
    workload = moesim.load_workload(trace)
    found = []
    for step in range(workload.n_steps):
        cut = slice(int(workload.offsets[step]), int(workload.offsets[step + 1]))
        layer = int(workload.layer[step])
        experts = (workload.keys[cut] - layer * trace.meta.n_experts).tolist()
        found.append((layer, dict(zip(experts, workload.routed[cut].tolist(), strict=True))))
    return found


@pytest.mark.parametrize("what", FILES)
def test_a_recorders_file_becomes_its_steps(tmp_path: Path, what: str) -> None:
    known, name, content, expected, options = FILES[what]
    path = tmp_path / name
    path.write_bytes(content)
    trace = import_foreign(path, tmp_path / "t.parquet", options=options)
    trace.validate()
    assert steps(trace) == expected
    assert (trace.meta.n_layers, trace.meta.n_experts, trace.meta.top_k) == (L, E, K)
    named = import_foreign(path, tmp_path / "named.parquet", format=known, options=options)
    assert named.digest == trace.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [name, "named.parquet", "t.parquet"]
    )


def test_there_is_a_fixture_of_every_format() -> None:
    made = {known for known, *_ in FILES.values()}
    assert made | {"bigmoe", "moe-cache-eval"} == {known.name for known in FORMATS}


def test_a_cache_eval_folder_becomes_its_steps(tmp_path: Path) -> None:
    trace = import_foreign(cache_eval(tmp_path / "run"), tmp_path / "t.parquet")
    trace.validate()
    assert steps(trace) == [*PROMPT, (0, {0: 1, 2: 2, 3: 1}), (1, {1: 1, 3: 1, 4: 2})]
    assert "which token of a pass" in trace.meta.notes["tokens"]


def test_dropped_tokens_have_no_row(tmp_path: Path) -> None:
    head: dict[str, Any] = {"record_type": "metadata", "format": "moe-cache-lab.routing-jsonl"}
    stage = {"num_experts": E, "assigned_experts_per_token": 1, "allows_unassigned": True}
    head |= {"format_version": 2, "model_id": "switch"}
    head |= {"routing_stages": [stage | {"routing_stage": s} for s in ("encoder", "decoder")]}

    def event(stage: str, phase: str, t: int, layer: int, experts: list[int]) -> dict[str, Any]:
        state = {"assignment_state": "assigned" if experts else "unassigned"}
        return state | {
            **{"record_type": "routing_selection", "routing_stage": stage, "phase": phase},
            **{"token_position": t, "layer": layer, "selected_experts": experts},
            "selected_probabilities": [],
        }

    (tmp_path / "r.jsonl").write_bytes(
        lines(
            head,
            event("encoder", "encoder", 0, 1, [2]),
            event("encoder", "encoder", 1, 1, []),
            event("decoder", "decoder_prompt", 0, 1, [3]),
            event("decoder", "decoder_generated", 1, 1, [4]),
            event("decoder", "decoder_generated", 2, 1, []),
        )
    )
    trace = import_foreign(tmp_path / "r.jsonl", tmp_path / "t.parquet")
    trace.validate()
    # The encoder's layer 1 is 0 now, the decoder's 1; a decoder's token comes after the encoder's.
    assert trace.array("layer").tolist() == [0, 1, 1]
    assert trace.array("experts").tolist() == [[2], [3], [4]]
    assert trace.array("phase").tolist() == [0, 0, 1]
    assert trace.meta.notes["dropped"].startswith("2 of 5 (token, layer) rows without any expert")


def test_variable_top_k_stays_what_it_is(tmp_path: Path) -> None:
    rows = [([0, 1, 2], [0.5, 0.3, 0.2]), ([3], [1.0]), ([2, 4], [0.25, 0.75])]
    (tmp_path / "r.jsonl").write_bytes(
        lines(
            *({"layer": 0, "token": t, "experts": e, "weights": w} for t, (e, w) in enumerate(rows))
        )
    )
    trace = import_foreign(tmp_path / "r.jsonl", tmp_path / "t.parquet")
    trace.validate()
    assert trace.meta.variable_top_k
    none = NO_EXPERT
    assert trace.array("experts").tolist() == [[0, 1, 2], [3, none, none], [4, 2, none]]
    assert trace.array("weights")[2].tolist() == [0.75, 0.25, 0]
    assert steps(trace) == [(0, {0: 1, 1: 1, 2: 1}), (0, {3: 1}), (0, {2: 1, 4: 1})]
    assert trace.expert_counts().tolist() == [[1, 1, 2, 1, 1]]
    assert "up to top-3 of 5 experts" in trace.describe()


def test_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    dense = np.zeros((T, 1, K), np.int16)
    np.save(tmp_path / "r.npy", np.concatenate([dense, IDS, dense - 1], axis=1))
    trace = import_foreign(tmp_path / "r.npy", tmp_path / "t.parquet")
    trace.validate()
    assert steps(trace) == LATER
    assert json.loads(trace.meta.notes["model_layers"]) == [1, 2]


def test_shared_experts_are_taken_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    routed = rng.random((20, L, E)).argsort(-1)[..., :K]
    shared = np.full((20, L, 1), E)
    np.save(tmp_path / "r.npy", np.concatenate([routed, shared], axis=-1))
    trace = import_foreign(tmp_path / "r.npy", tmp_path / "t.parquet")
    trace.validate()
    assert (trace.meta.n_experts, trace.meta.top_k, trace.meta.n_shared_experts) == (E, K, 1)
    np.testing.assert_array_equal(trace.array("experts"), routed.reshape(-1, K))


def test_replicas_become_their_logical_experts(tmp_path: Path) -> None:
    """Six physical experts a layer hold five logical ones: 0 twice in layer 0, 4 in layer 1."""
    table = torch.tensor([[3, 0, 1, 2, 4, 0], [0, 1, 2, 3, 4, 4]])
    record = sglang_record(0, 0, P)
    record["topk_ids_of_layer"] = torch.tensor(
        [[[1, 2], [5, 3]], [[5, 0], [4, 3]]], dtype=torch.int32
    )
    (tmp_path / "r.pt").write_bytes(
        saved({"records": [record], "last_physical_to_logical_map": table})
    )
    trace = import_foreign(tmp_path / "r.pt", tmp_path / "t.parquet")
    assert steps(trace) == [(0, {0: 2, 1: 1, 2: 1}), (1, {0: 1, 3: 1, 4: 2})]
    assert trace.meta.physical_to_logical == table.tolist()
    assert trace.meta.notes["replicas"].startswith("6 physical experts a layer hold 5 logical")


def test_requests_decoded_together_are_followed_by_their_positions(tmp_path: Path) -> None:
    def record(mode: int, positions: list[int], lengths: list[int] | None) -> dict[str, Any]:
        ids = (np.array(positions)[None, :, None] + np.arange(2)).repeat(L, axis=0) % E
        return {
            **{"forward_mode": mode, "positions": positions, "extend_seq_lens": lengths},
            **{"input_ids": positions, "topk_ids_of_layer": tensor(ids.astype(np.int32))},
        }

    records = [
        record(1, [0, 1, 0], [2, 1]),  # prompts of two tokens and of one
        record(2, [2, 1], None),  # a token of each
        record(2, [3, 2], None),
    ]
    (tmp_path / "r.pt").write_bytes(saved({"records": records}))
    trace = import_foreign(tmp_path / "r.pt", tmp_path / "t.parquet")
    trace.validate()
    assert trace.array("sequence")[::L].tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert trace.array("position")[::L].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert trace.array("pass_id")[::L].tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert [len(uses) for _, uses in steps(trace)] == [3, 3, 3, 3, 3, 3]


def test_a_field_is_where_the_map_says(tmp_path: Path) -> None:
    rows = [
        {"l": layer, "at": {"n": t}, "topk": {"ids": IDS[t, layer].tolist(), "w": [0.75, 0.25]}}
        for t in range(T)
        for layer in range(L)
    ]
    (tmp_path / "r.jsonl").write_bytes(lines(*rows))
    fields = {"layer": "l", "experts": "topk.ids", "position": "at.n", "weights": "topk.w"}
    trace = import_foreign(
        tmp_path / "r.jsonl", tmp_path / "t.parquet", options=ImportOptions(fields=fields)
    )
    assert steps(trace) == LATER
    assert set(trace.array("weights").ravel().tolist()) == {0.75, 0.25}
    file = io.BytesIO()
    pl.DataFrame(rows).write_parquet(file)
    (tmp_path / "r.parquet").write_bytes(file.getvalue())
    again = import_foreign(
        tmp_path / "r.parquet", tmp_path / "u.parquet", options=ImportOptions(fields=fields)
    )
    assert steps(again) == LATER


def test_sequences_keep_the_files_order(tmp_path: Path) -> None:
    """Request b comes first, and then its tokens and a's alternate."""
    order = [("b", 0), ("b", 1), ("a", 0), ("b", 2), ("a", 1)]
    rows = [
        {"request": name, "position": at, "layer": layer, "experts": [i % E]}
        for i, (name, at) in enumerate(order)
        for layer in range(L)
    ]
    (tmp_path / "r.jsonl").write_bytes(lines(*rows))
    trace = import_foreign(tmp_path / "r.jsonl", tmp_path / "t.parquet")
    trace.validate()
    assert steps(trace) == [(layer, {i % E: 1}) for i in range(5) for layer in range(L)]
    assert trace.array("pass_id")[::L].tolist() == [0, 1, 3, 2, 4]
    assert "alternate in the file" in trace.meta.notes["passes"]
    numbered = [
        dict(row, request=9 if row["request"] == "b" else 4) for row in rows if row["position"] == 0
    ]
    (tmp_path / "n.jsonl").write_bytes(lines(*numbered))
    trace = import_foreign(tmp_path / "n.jsonl", tmp_path / "n.parquet")
    assert trace.array("sequence").tolist() == [0, 0, 1, 1]
    assert trace.array("experts").ravel().tolist() == [0, 0, 2, 2]
    assert trace.meta.notes["sequences"].startswith("9, 4 of the file, in its order, are 0 to 1")


def test_weights_by_a_rule_and_probabilities_as_logits(tmp_path: Path) -> None:
    probabilities = np.exp(logits()) / np.exp(logits()).sum(-1, keepdims=True)
    np.savez(tmp_path / "r.npz", router_logits=probabilities.astype(np.float32))
    trace = import_foreign(
        tmp_path / "r.npz",
        tmp_path / "t.parquet",
        options=ImportOptions(top_k=K, weight_rule="softmax"),
    )
    trace.validate()
    assert trace.meta.notes["logits"].startswith("were probabilities")
    assert trace.meta.weight_rule == "softmax"
    top = np.sort(probabilities, axis=-1)[..., : -K - 1 : -1].reshape(-1, K)
    np.testing.assert_allclose(trace.array("weights"), top, rtol=1e-3)


@pytest.mark.parametrize("what", [what for what in FILES if FILES[what][1].endswith(("l", "csv"))])
def test_where_blocks_of_text_end_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    _, name, content, _, options = FILES[what]
    path = tmp_path / name
    path.write_bytes(content)
    whole = import_foreign(path, tmp_path / "whole.parquet", options=options)
    for size in (1, 7, 50):
        monkeypatch.setattr("moeroute.foreign._BLOCK_CHARS", size)
        cut = import_foreign(path, tmp_path / "cut.parquet", options=options)
        assert cut.digest == whole.digest


def test_later_rows_may_choose_more_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"layer": 0, "token": t, "experts": list(range(1 + t % 5))} for t in range(40)]
    (tmp_path / "r.jsonl").write_bytes(lines(*rows))
    monkeypatch.setattr("moeroute.foreign._BLOCK_CHARS", 120)  # two or three lines
    trace = import_foreign(tmp_path / "r.jsonl", tmp_path / "t.parquet")
    trace.validate()
    chosen = [[e for e in row if e != NO_EXPERT] for row in trace.array("experts").tolist()]
    assert chosen == [row["experts"] for row in rows]
