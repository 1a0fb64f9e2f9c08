"""What an import says it changed or cannot know, and how it reads files as people save them."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from moeroute import Trace, TraceError, open_trace
from moeroute.importers import import_foreign

L, K, E = 3, 2, 8
HEADER = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"
COMMENTS = """\
# route_trace v1
# model=some-Q4_0.gguf arch=some n_layer=2 n_expert=8 n_expert_used=2
# layer=0 expert_bytes=100 dense_bytes=30
# layer=1 expert_bytes=100 dense_bytes=30
"""
LINES = [
    f"0,{int(step > 0)},{step},{layer},{slot},{(step + layer + 3 * slot) % E},{weight},0,9"
    for step in range(3)
    for layer in range(2)
    for slot, weight in enumerate((0.6, 0.4))
]
CSV = COMMENTS + HEADER + "\n" + "".join(f"{line}\n" for line in LINES)


def arrays(tokens: int = 40) -> dict[str, Any]:
    """Two sequences of distinct experts; the first token of each is a prompt."""
    ids = np.random.default_rng(0).random((tokens, L, E)).argsort(axis=-1)[..., :K]
    ids[0, 0] = [E - 1, 0]
    position = np.arange(tokens) % (tokens // 2)
    return {
        "ids": ids.astype(np.int16),
        "weights": np.full((tokens, L, K), [0.75, 0.25], np.float32),
        "seq": np.arange(tokens) // (tokens // 2),
        "pos": position,
        "phase": (position > 0).astype(np.uint8),
        "n_experts": np.array(E),
    }


def bring(tmp_path: Path, **changes: Any) -> tuple[Trace, dict[str, str]]:
    """Import changed `arrays` and return the trace and what was said, by name."""
    path = tmp_path / "r.npz"
    np.savez(path, **{n: a for n, a in (arrays() | changes).items() if a is not None})
    return bring_file(path)


def bring_file(path: Path) -> tuple[Trace, dict[str, str]]:
    said: list[str] = []
    trace = import_foreign(path, path.with_name("t.parquet"), tell=said.append)
    trace.validate()
    found = dict(line.split(": ", 1) for line in said)
    assert found.items() <= trace.meta.notes.items()
    return trace, found


ALWAYS = {
    "sizes": "unknown: bytes of an expert, dense weights of a layer and a token "
    "(--like gives them)",
    "absent": "token ids, router logits, predictions of later gates",
}


def test_only_what_is_unknown_is_said_of_a_whole_recording(tmp_path: Path) -> None:
    assert bring(tmp_path)[1] == ALWAYS


def changed(name: str, at: Any, value: Any) -> dict[str, Any]:
    array = arrays()[name]
    array[at] = value
    return {name: array}


def shuffled() -> dict[str, Any]:
    return {name: array[::-1] if array.shape else array for name, array in arrays().items()}


def lost() -> dict[str, Any]:
    valid = np.ones((40, L), bool)
    valid[3] = False
    valid[5, 1] = valid[6, :2] = False
    return {"valid": valid}


def layer_lost() -> dict[str, Any]:
    valid = np.ones((40, L), bool)
    valid[:, 1] = False
    return {"valid": valid}


def repeated() -> dict[str, Any]:
    at = [*range(40), 7, 9]
    return {name: array[at] if array.shape else array for name, array in arrays().items()}


def shared() -> dict[str, Any]:
    ids = np.concatenate([arrays()["ids"], np.full((40, L, 1), E)], axis=-1)
    return {"ids": ids, "weights": None, "n_experts": np.array(E + 1)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            shuffled(),
            {
                "order": "120 of 120 rows stood elsewhere: sorted by sequence, position, layer",
                "sequences": "order changed: by number now, in the file 1, 0, ... come first",
            },
        ),
        (
            changed("weights", (slice(2, 4), 0), [0.25, 0.75]),
            {
                "weights": "2 of 120 rows had experts in another order: put in descending order "
                "of weight"
            },
        ),
        (
            changed("weights", (5, 1), [0.75, 0.5]),
            {"weights": "1 of 120 rows do not sum to 1: kept as recorded, not renormalised"},
        ),
        ({"weights": None}, {"absent": "weights, " + ALWAYS["absent"]}),
        (
            {"n_experts": None},
            {"n_experts": "unknown (no array n_experts): 8 guessed from the largest id"},
        ),
        ({"phase": None}, {"phase": "unknown (no array phase): all 40 tokens are decode"}),
        (
            {"phase": np.ones(40, int)},
            {"phase": "no prompt is recorded: every token is decode"},
        ),
        (
            {"phase": np.zeros(40, int)},
            {"phase": "no decode step is recorded: every token is prompt"},
        ),
        (
            changed("phase", 9, 0),
            {
                "phase": "1 of 2 sequences have prompt tokens after decode (a second turn, or a "
                "prompt in parts)"
            },
        ),
        (
            lost(),
            {
                "lost_tokens": "1 of 40 tokens dropped: the recorder kept no layer of them",
                "positions": "gaps between tokens: 1, in 1 of 2 sequences",
                "incomplete": "2 of 39 tokens lack layers: 3 (token, layer) rows are missing",
            },
        ),
        (
            layer_lost(),
            {
                "incomplete": "40 of 40 tokens lack layers: 40 (token, layer) rows are missing",
                "layers": "1 of 3 layers never have a row: 1",
            },
        ),
        ({"pos": arrays()["pos"] + 4}, {"positions": "2 of 2 sequences do not begin at 0"}),
        (repeated(), {"duplicates": "6 rows that repeat another: dropped"}),
        (
            shared(),
            {
                "shared": "expert 8 is in every row: a shared expert, taken out",
                "absent": "weights, " + ALWAYS["absent"],
            },
        ),
        (
            {"token": np.arange(40), "names": np.array([{}], dtype=object)},
            {"not_imported": "arrays names, token"},
        ),
    ],
)
def test_what_an_import_changes_or_misses_is_said(
    tmp_path: Path, changes: dict[str, Any], said: dict[str, str]
) -> None:
    found = bring(tmp_path, **changes)[1]
    assert found == ALWAYS | said


def test_experts_move_with_their_weights(tmp_path: Path) -> None:
    trace, _ = bring(tmp_path, weights=arrays()["weights"][..., ::-1])
    np.testing.assert_array_equal(trace.array("experts"), arrays()["ids"].reshape(-1, K)[:, ::-1])
    assert trace.array("weights").tolist() == [[0.75, 0.25]] * (40 * L)


def quoted(text: str) -> str:
    rows = text.splitlines()
    return "\n".join(row if row[0] == "#" else '"' + row.replace(",", '","') + '"' for row in rows)


def zstd(text: str) -> bytes:
    packed = io.BytesIO()
    pl.DataFrame({"line": text.split("\n")}).write_csv(
        packed, include_header=False, separator="\x1f", quote_style="never", compression="zstd"
    )
    return packed.getvalue()


def other_order(text: str) -> str:
    rows = [row.split(",") for row in text.splitlines() if row[0] != "#"]
    return COMMENTS + "".join(",".join(reversed(row)) + "\n" for row in rows)


WRITTEN: dict[str, Callable[[str], bytes]] = {
    "crlf": lambda t: t.replace("\n", "\r\n").encode(),
    "utf-8-sig": lambda t: t.encode("utf-8-sig"),
    "utf-16": lambda t: t.encode("utf-16"),
    "gz": lambda t: gzip.compress(t.encode()),
    "bz2": lambda t: bz2.compress(t.encode()),
    "xz": lambda t: lzma.compress(t.encode()),
    "zstd": zstd,
    "zstd with blank lines": lambda t: zstd("\n".join([t, "", ""])),
    "gz of utf-16": lambda t: gzip.compress(t.encode("utf-16")),
    "trailing blank lines": lambda t: (t + "\n  \n\n").encode(),
    "a blank line inside": lambda t: t.replace("\n0,1,1,0", "\n\n0,1,1,0", 1).encode(),
    "no end of line": lambda t: t.rstrip().encode(),
    "quoted": lambda t: quoted(t).encode(),
    "another order": lambda t: other_order(t).encode(),
    "capitals": lambda t: t.replace(HEADER, HEADER.title()).encode(),
    "spaces": lambda t: t.replace(",", ", ").encode(),
    "semicolons": lambda t: t.replace(",", ";").encode(),
    "whole floats": lambda t: t.replace("\n0,", "\n0.0,").encode(),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_text_is_read_as_people_save_it(tmp_path: Path, written: str) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(WRITTEN[written](CSV))
    trace, said = bring_file(path)
    assert set(said) == {"residency", "sizes", "absent"}
    assert trace.array("experts").tolist() == [[i, (i + 3) % E] for i in (0, 1, 1, 2, 2, 3)]
    assert trace.array("position").tolist() == [0, 0, 1, 1, 2, 2]


def test_repeated_unsorted_and_strange_lines_are_said(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    lines = [*LINES[4:], *LINES[:4], *LINES[:3]]
    lines[0] = lines[0].replace(",0,9", ",7,9")
    text = COMMENTS + HEADER + ",free\n" + "".join(f"{line},x\n" for line in lines)
    path.write_bytes(text.encode() + "# caf\u00e9".encode("latin-1"))
    _, said = bring_file(path)
    assert said["duplicates"] == "3 lines that repeat another: dropped"
    assert said["order"] == "6 of 6 rows stood elsewhere: sorted by sequence, position, layer"
    assert said["not_imported"] == "columns free"
    assert said["residency"].endswith("; 1 codes of unknown meaning: 7")
    assert said["encoding"] == "1 characters are no utf-8: replaced"


def test_layers_and_sizes_of_a_csv_are_said(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    text = CSV.replace("layer=1 expert_bytes=100", "layer=5 expert_bytes=120")
    text = re.sub(r"^(0,\d,\d),1,", r"\1,5,", text, flags=re.MULTILINE)
    path.write_text(text)
    _, said = bring_file(path)
    assert said["renumbered"].startswith("layers 0 to 5 of the file, 2 of which have experts, are")
    assert said["expert_bytes"].startswith("experts differ in size by layer (100 to 120)")
    path.write_text(CSV.replace("# layer=1 expert_bytes=100 dense_bytes=30\n", ""))
    _, said = bring_file(path)
    assert said["expert_bytes"].startswith("1 of 2 layers' sizes are unknown")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    def refused(name: str, content: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(TraceError) as caught:
            import_foreign(path, tmp_path / "t.parquet")
        assert str(caught.value).startswith(f"{path}: ")
        assert not list(tmp_path.glob("t.parquet*"))
        return str(caught.value)

    assert "text that starts with 'layer;expert': not a format" in refused("a", b"layer;expert\n")
    assert "holds no routing: there is no row" in refused("a.csv", b"layer,expert\n")
    assert "empty: not a format" in refused("b.csv", b"")
    assert "has no rows" in refused("c.csv", (COMMENTS + HEADER + "\n").encode())
    assert "has no rows and no column names" in refused("d.csv", COMMENTS.encode())
    assert "cannot be unpacked" in refused("e.csv.gz", gzip.compress(CSV.encode())[:-20])
    assert "a Python pickle: not a format" in refused("f.pkl", b"\x80\x04N.")
    for name, held, kind in (
        ("g.pt", "archive/data.pkl", "cannot be read as a PyTorch file"),
        ("h.zip", "run/route.csv", "a zip archive (it holds run/route.csv): unpack it first"),
    ):
        with zipfile.ZipFile(tmp_path / "made", "w") as archive:
            archive.writestr(held, CSV)
        assert kind in refused(name, (tmp_path / "made").read_bytes())


def test_a_folder_is_no_file_and_only_our_parquet_needs_no_import(tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    with pytest.raises(TraceError, match="is a folder, not a file; it holds nothing"):
        import_foreign(tmp_path, out)
    trace, _ = bring(tmp_path)
    with pytest.raises(TraceError, match="is a trace already and needs no import"):
        import_foreign(trace.path, tmp_path / "u.parquet")
    foreign = tmp_path / "foreign.parquet"
    pl.DataFrame({"expert": [1]}).write_parquet(foreign)
    with pytest.raises(TraceError, match="Parquet: not a format that is known by its content"):
        import_foreign(foreign, tmp_path / "u.parquet")
    with pytest.raises(TraceError, match="is a folder; give a file's name"):
        import_foreign(tmp_path / "r.npz", tmp_path)
    with pytest.raises(TraceError, match="is the file to import"):
        import_foreign(tmp_path / "r.npz", tmp_path / "r.npz")


def test_opening_a_foreign_file_says_how_to_import_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("r.npz", **arrays())
    Path("r.csv").write_text(CSV)
    for name, kind in (("r.npz", "an .npz archive"), ("r.csv", "text that starts with '# route_")):
        with pytest.raises(TraceError) as caught:
            open_trace(name)
        assert f"not a Parquet file, but {kind}" in str(caught.value)
        assert f"moetrace import {name} --out" in str(caught.value)
    for folder in (".", "..", "/", ""):
        with pytest.raises(TraceError, match="is a folder, not a trace; it holds"):
            open_trace(folder)


@pytest.mark.parametrize("fails", ["moeroute.writer.write_part", "pathlib.Path.write_text"])
def test_a_full_disk_leaves_nothing_of_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "part")

    np.savez(tmp_path / "r.npz", **arrays())
    monkeypatch.setattr(fails, full)
    with pytest.raises(OSError, match="No space left"):
        import_foreign(tmp_path / "r.npz", tmp_path / "t.parquet")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.npz"]


def test_a_token_that_changes_phase_between_layers_is_said(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(CSV.replace("\n0,1,1,1,", "\n0,0,1,1,"))
    assert bring_file(path)[1]["phase"] == "1 tokens change phase between layers"
