"""`moetrace import` and `moetrace export` as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moeroute import open_trace
from moeroute.importers import FORMATS

Run = Callable[..., Any]


def write_lines(path: Path) -> Path:
    rows = [
        {"l": layer, "at": token, "top": {"ids": [token % 4, 4 + layer]}}
        for token in range(3)
        for layer in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_map_says_where_fields_are(moetrace: Run, tmp_path: Path) -> None:
    file, out = write_lines(tmp_path / "r.jsonl"), tmp_path / "t.parquet"
    done = moetrace("import", file, "--out", out)
    assert (done.code, out.exists()) == (1, False)
    assert "not a format that is known by its content" in done.err
    done = moetrace(
        *("import", file, "--out", out, "--map", "layer=l,experts=top.ids,position=at"),
        *("--model", "mine", "--prompt-tokens", 1),
    )
    assert done.code == 0, done.err
    assert "mine (imported): 3 tokens x 2 layers, top-2 of 6 experts" in done.out
    assert "note: phase: unknown" in done.err
    trace = open_trace(out)
    assert trace.array("experts").tolist()[:2] == [[0, 4], [0, 5]]
    assert trace.array("phase").tolist() == [0, 0, 1, 1, 1, 1]


def test_the_formats_are_listed(moetrace: Run) -> None:
    done = moetrace("import", "--formats")
    assert done.code == 0
    assert all(known.name in done.out for known in FORMATS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "vlm"), "did you mean 'vllm'"),
        (("--map", "layer"), "give COLUMN=FIELD once each"),
        (("--map", "layer=a,layer=b"), "give COLUMN=FIELD once each"),
        (("--map", "expert=a"), "no column 'expert'; there are layer, experts"),
        (("--weight-rule", "soft"), "not one of the rules"),
        (("--top-k", "0"), "top-k"),
    ],
)
def test_wrong_usage_of_import_is_told(
    moetrace: Run, tmp_path: Path, options: tuple[str, str], message: str
) -> None:
    file, out = write_lines(tmp_path / "r.jsonl"), tmp_path / "t.parquet"
    done = moetrace("import", file, "--out", out, *options)
    assert (done.code, out.exists()) == (2, False)
    assert message in " ".join(done.err.split())


def test_logits_take_top_k_from_the_model_they_are_like(moetrace: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "r.npz", router_logits=rng.normal(size=(3, 24, 32)).astype(np.float32))
    out = tmp_path / "t.parquet"
    done = moetrace("import", tmp_path / "r.npz", "--out", out)
    assert done.code == 1
    assert "give --top-k, or --like MODEL" in done.err
    done = moetrace("import", tmp_path / "r.npz", "--out", out, "--like", "gpt-oss-20b")
    assert done.code == 0, done.err
    assert open_trace(out).meta.top_k == 4


def test_placements_are_worked_out_by_hand(moetrace: Run, tmp_path: Path) -> None:
    """Layer 0: expert 0, then 1 twice, then 2; layer 1: expert 3 each time."""
    rows = [
        {"layer": layer, "token": token, "experts": [3 if layer else expert]}
        for token, expert in enumerate([0, 1, 1, 2])
        for layer in range(2)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trace = tmp_path / "t.parquet"
    assert moetrace("import", tmp_path / "r.jsonl", "--out", trace).code == 0

    def placed(*options: object) -> Any:
        out = tmp_path / "p.json"
        done = moetrace(*("export", trace, "--to", "placement", "--out", out, "--force", *options))
        assert done.code == 0, done.err
        found = json.loads(out.read_text())
        assert found["trace_sha256"] == open_trace(trace).digest
        return found["experts"]

    assert placed("--slots", 2) == [[1, 0], [3, 0]]
    assert placed("--slots", 1, "--scope", "global") == [[1], [3]]
    assert placed("--slots", 2, "--policy", "lru") == [[1, 2], [3]]
    done = moetrace(
        *("export", trace, "--to", "placement", "--out", tmp_path / "q.json"),
        *("--slots", 2, "--policy", "lru-spec"),
    )
    assert done.code == 1
    assert "needs predictions" in done.err
    assert not (tmp_path / "q.json").exists()


@pytest.mark.parametrize(
    ("to", "name", "options", "code", "message"),
    [
        ("counts", "c.txt", (), 2, "there are: .json, .pt"),
        ("jsonl", "c.jsonl", ("--slots", "2"), 2, "--slots is of --to placement"),
        ("npz", "c.npz", ("--dense-layers", "1"), 2, "--dense-layers is of --to counts"),
        ("placement", "c.json", (), 2, "--to placement needs --slots"),
        ("placement", "c.json", ("--slots", "9"), 1, "slots 9: must be 1 to 8"),
        ("placement", "c.json", ("--slots", "2", "--policy", "lruu"), 2, "did you mean 'lru'"),
    ],
)
def test_wrong_usage_of_export_is_told(
    moetrace: Run, tmp_path: Path, to: str, name: str, options: Any, code: int, message: str
) -> None:
    done = moetrace("export", "tiny", "--to", to, "--out", tmp_path / name, *options)
    assert message in " ".join(done.err.split())
    assert done.code == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_exports_of_each_kind_are_written(moetrace: Run, tmp_path: Path) -> None:
    for to, name in (("counts", "c.json"), ("jsonl", "t.jsonl"), ("npz", "t.npz")):
        done = moetrace("export", "tiny", "--to", to, "--out", tmp_path / name)
        assert done.code == 0, done.err
        assert (tmp_path / name).stat().st_size
    counts = json.loads((tmp_path / "c.json").read_text())["logical_count"]
    assert counts == [open_trace("tiny").expert_counts().tolist()]
