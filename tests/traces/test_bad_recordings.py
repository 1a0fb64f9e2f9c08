"""Damaged, mislabelled and contradictory recordings: one line says what and where."""

from __future__ import annotations

import base64
import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from moeroute import TraceError
from moeroute.importers import FORMATS, ImportOptions, import_foreign
from support.recorders import IDS, K, cache_eval, every_file, lines, npy, npz, saved, sglang_record

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.numpy")
FILES = every_file()


def refused(path: Path, **how: Any) -> str:
    """The one line that says why a file cannot be imported."""
    before = {p.name for p in path.parent.iterdir()}
    with pytest.raises(TraceError) as caught:
        import_foreign(path, path.parent / "t.parquet", **how)
    assert {p.name for p in path.parent.iterdir()} == before
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    return message


def refused_bytes(folder: Path, name: str, content: bytes, **how: Any) -> str:
    (folder / name).write_bytes(content)
    return refused(folder / name, **how)


def told(path: Path, out: Path, **how: Any) -> str:
    """Why a file cannot be imported; nothing where it can, and the trace holds."""
    try:
        import_foreign(path, out, **how).validate()
    except TraceError as error:
        return str(error)
    return ""


def test_a_number_of_tokens_that_cannot_be_is_told(tmp_path: Path) -> None:
    answer = json.loads(FILES["sglang answer"][2])
    for told in answer if isinstance(answer, list) else [answer]:
        told["meta_info"]["prompt_tokens"] = -1
        told["meta_info"]["completion_tokens"] = 1
    content = json.dumps(answer).encode()
    refused_bytes(tmp_path, "r.json", content, options=ImportOptions(top_k=K))


def test_rows_without_any_expert_are_told(tmp_path: Path) -> None:
    row = {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 1, "rank": 0}
    wrong: list[list[Any]] = [[[]], [[[]]], [[[1]]]]
    for experts in wrong:
        given = row | {"num_tokens": len(experts), "topk": 1, "top_indices": experts}
        refused_bytes(tmp_path, "r.jsonl", lines(given))


@pytest.mark.parametrize("what", FILES)
def test_a_cut_or_changed_file_is_refused_or_read_whole(tmp_path: Path, what: str) -> None:
    """Whatever is done to a file's bytes: a trace that holds, or one line and no file."""
    known, name, content, _, options = FILES[what]
    path, out = tmp_path / name, tmp_path / "t.parquet"
    rng = np.random.default_rng(5)
    cuts = [content[:n] for n in rng.integers(0, len(content), 12)]
    for _ in range(12):
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(0, len(changed), 3)] = rng.integers(0, 256, 3)
        cuts.append(changed.tobytes())
    for damaged in cuts:
        path.write_bytes(damaged)
        for format in (None, known):
            message = told(path, out, options=options, format=format)
            assert len(message.splitlines()) <= 1
            assert out.exists() == (not message)
            out.unlink(missing_ok=True)
            assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("known", [known.name for known in FORMATS])
@pytest.mark.parametrize(
    "content", [b"", b"\n", b"hello\n", b"{}\n", b"[]\n", b"PK\x03\x04", b"\x80\x04N."]
)
def test_no_format_takes_what_is_another_thing(tmp_path: Path, known: str, content: bytes) -> None:
    options = ImportOptions(top_k=K)
    refused_bytes(tmp_path, "r.bin", content, format=known, options=options)


def test_a_pt_that_wants_to_run_code_is_not_run(tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "ran", "code ran"))

    message = refused_bytes(tmp_path, "r.pt", saved({"records": [Run()]}))
    assert "would run code of the file, which is never done" in message
    assert "a Python pickle" in refused_bytes(tmp_path, "r.pkl", pickle.dumps(Run()))
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("ids.npy", npy(np.array([1]))[:10] + pickle.dumps(Run()))
    refused(tmp_path / "r.npz")
    np.savez(tmp_path / "o.npz", ids=np.array([{}], object), seq=[0], pos=[0])
    assert "array ids holds Python objects" in refused(tmp_path / "o.npz")
    assert not (tmp_path / "ran").exists()


def test_files_that_unpack_to_absurdly_much_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeroute.foreign._BOMB_BYTES", 1 << 20)
    zeros = b"0," * (1 << 21)
    assert "a zip bomb?" in refused_bytes(tmp_path, "r.csv.gz", gzip.compress(zeros))
    file = io.BytesIO()
    ids = np.zeros((1 << 20, 2, 2), np.int8)
    np.savez_compressed(file, ids=ids, seq=np.zeros(1 << 20), pos=np.zeros(1 << 20))
    assert "a zip bomb?" in refused_bytes(tmp_path, "r.npz", file.getvalue())
    with zipfile.ZipFile(tmp_path / "r.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", zeros)
    assert "a zip bomb?" in refused(tmp_path / "r.pt")
    frame = pl.DataFrame({"a": ["0" * (1 << 22)]})
    file = io.BytesIO()
    frame.write_csv(file, compression="zstd")
    head = bytes(file.getvalue())
    # A frame header that says 4 GiB, as a single segment with 8 bytes of size.
    bomb = head[:4] + bytes([0xE0]) + struct.pack("<Q", 1 << 32) + head[5:]
    assert "a zip bomb?" in refused_bytes(tmp_path, "r.csv.zst", bomb)


def test_a_number_that_is_a_nest_of_lists_is_named(tmp_path: Path) -> None:
    """NumPy takes no more than 64 dimensions."""
    nest: Any = 4
    for _ in range(70):
        nest = [nest]
    header = {"format": "moe-cache-lab.routing-jsonl", "format_version": 1, "num_experts": nest}
    said = refused_bytes(tmp_path, "r.jsonl", lines(header, {"record_type": "other"}))
    assert "line 1, field num_experts is [[[" in said
    content = saved({"records": [sglang_record(0, 0, 2) | {"positions": nest}]})
    assert "positions is not 2 whole numbers" in refused_bytes(tmp_path, "r.pt", content)


def test_a_header_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    """NumPy makes room for as much as a header of version 2 says of itself: up to 4 GiB."""
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 3 << 30) + b"{'descr': '<i4'"
    assert "a header of 3221225472 bytes" in refused_bytes(tmp_path, "r.npy", content)
    answer = {"choices": [{"routed_experts": base64.b64encode(content).decode()}]}
    said = refused_bytes(tmp_path, "r.json", json.dumps(answer).encode())
    assert "a header of 3221225472 bytes" in said


def test_an_array_that_says_it_is_huge_is_not_waited_for(tmp_path: Path) -> None:
    header = np.lib.format.header_data_from_array_1_0(IDS) | {"shape": (1 << 40, 2, 2)}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, header)
    file.write(IDS.tobytes())
    assert "array in the file cannot be read" in refused_bytes(tmp_path, "r.npy", file.getvalue())
    with zipfile.ZipFile(tmp_path / "r.npz", "w") as archive:
        archive.writestr("ids.npy", file.getvalue())
        for name in ("seq", "pos"):
            archive.writestr(f"{name}.npy", npy(np.zeros(1 << 4, int)))
    assert "its header says" in refused(tmp_path / "r.npz")


GOOD = {"layer": 0, "token": 0, "experts": [1, 2], "weights": [0.5, 0.5]}
WRONG_LINES: list[tuple[str, Any, str]] = [
    ("no experts", {"layer": 0, "token": 1}, "line 2: no field experts; it has layer, token"),
    ("text", GOOD | {"token": "x"}, "line 2, column position: 'x' is text, not a whole number"),
    ("half", GOOD | {"layer": 0.5}, "line 2, column layer: 0.5 is a number, not a whole number"),
    ("true", GOOD | {"layer": True}, "line 2, column layer: True is true or false"),
    ("null", GOOD | {"token": None}, "line 2, column position: None is null"),
    ("number", GOOD | {"experts": 3}, "line 2, column experts: 3 is a number, not a list"),
    ("words", GOOD | {"experts": [1, "b"]}, "line 2, column experts: 'b' is text in a list"),
    ("half expert", GOOD | {"experts": [1, 2.5]}, "line 2, column experts: 2.5 is a number in a"),
    ("huge", GOOD | {"experts": [1, 1 << 70]}, "line 2, column experts: 1180591620717411303424"),
    (
        "large",
        GOOD | {"token": 1, "experts": [1, 70000]},
        "line 2, column experts: 70000 is",
    ),
    ("negative", GOOD | {"token": -1}, "line 2, column position: -1 is out of range"),
    ("weights", GOOD | {"weights": [1.0]}, "line 2, column weights: 1 weights for 2 experts"),
    ("weight", GOOD | {"weights": [1, "x"]}, "line 2, column weights: 'x' is text in a list"),
    ("twice", GOOD | {"token": 1, "experts": [1, 1]}, "line 2, column experts: expert 1 is there"),
    ("other", GOOD | {"experts": [0, 3]}, "line 1 and line 2 are both sequence 0, position 0, lay"),
    ("list", [1], "line 2: is a list, not a JSON object"),
    ("nan", GOOD | {"token": 1, "weights": [float("nan"), 1]}, "line 2, column weights: [nan, 1]"),
]


@pytest.mark.parametrize(
    ("bad", "message"), [case[1:] for case in WRONG_LINES], ids=[c[0] for c in WRONG_LINES]
)
def test_a_wrong_line_is_named(tmp_path: Path, bad: Any, message: str) -> None:
    content = lines(GOOD, bad, GOOD | {"token": 5})
    assert message in refused_bytes(tmp_path, "r.jsonl", content)


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    for bad in ("{", '{"a":1},{"b":2}', "[" * 100_000):
        message = refused_bytes(tmp_path, "r.jsonl", f"{good}\n{bad}\n".encode())
        assert "line 2: is no JSON" in message
    assert "no phase" in refused_bytes(
        tmp_path, "p.csv", b"phase,token,layer,rank,expert\nwhat,0,0,0,1\n"
    )
    options = ImportOptions(fields={"expert": "e"})
    with pytest.raises(TraceError, match="map: no column 'expert'; there are layer, experts"):
        import_foreign(tmp_path / "r.jsonl", tmp_path / "t", format="jsonl", options=options)
    message = refused_bytes(tmp_path, "m.jsonl", lines({"a": 1, "b": [2]}), format="jsonl")
    assert "no field for layer among a, b: name it with --map layer=FIELD" in message


def test_formats_are_known_by_name(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(b"layer,expert\n0,1\n")
    with pytest.raises(TraceError, match="no format 'llama-use': did you mean 'llama-uses'"):
        import_foreign(tmp_path / "r.csv", tmp_path / "t.parquet", format="llama-use")


def test_contradictions_of_each_layout_are_named(tmp_path: Path) -> None:
    def csv(*rows: str) -> bytes:
        return "".join(f"{row}\n" for row in rows).encode()

    header = "phase,token,layer,rank,expert"
    cases: list[tuple[str, bytes, str]] = [
        ("a.csv", csv(header, "decode,0,0,0,1", "decode,0,0,2,3"), "line 3, column rank"),
        ("b.csv", csv(header, "decode,0,0,1,1"), "line 2, column rank"),
        ("c.csv", csv(header, "decode,0,x,0,1"), "line 2, column layer: 'x' is no number"),
        ("d.csv", csv("-1,0,3,2", "0,0,3"), "line 2, column id1"),
        ("e.csv", csv("-1,0,3,2", "0,0,3,3"), "line 2, column experts: expert 3 is there more"),
        (
            "f.csv",
            csv("layer,expert", "0,1", "0,2", "1,1", "1,2", "1,0", "0,1", "0,3"),
            "line 4: 3 l",
        ),
        ("g.bin", struct.pack("<6i", 0, 1, 1, 3, 1, 1), "record 1: is cut"),
        (
            "x.bin",
            struct.pack("<7i", 0, 1, 1, 3, 1, 1 << 30, 9),
            "record 1: is cut: 0 of 38654705664",
        ),
        ("h.bin", struct.pack("<9i", 0, 1, 1, 3, 1, 2, 1, 4, 5), "record 1: 2 tokens in layer 1"),
        (
            "i.jsonl",
            lines(
                {"step": 0, "layer": 0, "top_indices": [[0, 1], [1, 2]]},
                {"step": 0, "layer": 1, "top_indices": [[0, 1]]},
            ),
            "line 2: 1 tokens, where another layer of forward pass 0 has 2",
        ),
        (
            "y.jsonl",
            lines(
                {"step": 0, "layer": 0, "top_indices": [[0, 1]]},
                {"step": 0, "layer": 1} | {"top_indices": 7},
            ),
            "line 2, column experts: 7 is a number, not a list",
        ),
        (
            "z.jsonl",
            lines({"step": 0, "layer": 0, "experts": [[0, 1]], "weights": 3}),
            "line 1, column weights: 3 is a number, not a list",
        ),
        ("j.json", b'{"choices": [{"routed_experts": [[[1, 2]], [[1]]]}]}', "tokens differ in lay"),
        (
            "k.json",
            b'{"choices": [{"routed_experts": "###"}]}',
            "choice 0, field routed_experts",
        ),
        ("l.json", b'{"choices": [{"routed_experts": null}]}', "no routed_experts: was the server"),
        (
            "m.json",
            b'{"prompt_routed_experts": [[[1, 2]]], "choices": [{"routed_experts": [[[1]]]}]}',
            "not of the same layers and top-k",
        ),
        ("n.json", b'{"meta_info": {"routed_experts": "AAAA"}}', "3 bytes are not whole int32"),
        ("o.json", b'{"meta_info": {"routed_experts": "AAAAAA=="}}', "no prompt_tokens and comp"),
        ("p.json", b"[[0, 1], [0, 2, 3], [1]]", "entry 2: is not a layer and its experts"),
        ("q.npz", npz(router_logits=np.zeros((3, 2))), "array router_logits is [3, 2], not real"),
        (
            "r.jsonl",
            lines({"format": "moe-cache-lab.routing-jsonl", "format_version": 3}),
            "line 1: format_version is 3, not 1 or 2",
        ),
        (
            "s.jsonl",
            lines(
                {"format": "moe-cache-lab.routing-jsonl", "format_version": 1, "num_experts": 4},
                {"record_type": "other"},
            ),
            "line 2: record_type is 'other', not 'routing_selection'",
        ),
        (
            "t.pt",
            saved({"records": [sglang_record(0, 0, 2) | {"positions": [0]}]}),
            "record 0: positions is not 2 whole numbers, one a token",
        ),
        (
            "u.pt",
            saved({"records": [sglang_record(0, 0, 2) | {"extend_seq_lens": [3]}]}),
            "record 0: extend_seq_lens add up to 3, and there are 2 tokens",
        ),
        (
            "v.pt",
            saved(
                {
                    "records": [sglang_record(0, 0, 2)],
                    "last_physical_to_logical_map": torch.zeros((3, 8), dtype=torch.int64),
                }
            ),
            "record 0: topk_ids_of_layer [2, 2, 2] has ids up to 4, and last_physical",
        ),
        (
            "w.safetensors",
            safetensors.save(
                {"layer_0": np.zeros((2, 3), np.float32), "layer_1": np.zeros((1, 3))}
            ),
            "the layers' tensors are not all of one [tokens, experts]",
        ),
    ]
    for name, content, message in cases:
        options = ImportOptions(top_k=2 if name[0] in "qwf" else None)
        assert message in refused_bytes(tmp_path, name, content, options=options), name


def test_logits_need_a_top_k(tmp_path: Path) -> None:
    content = npz(router_logits=np.zeros((3, 2, 4), np.float32))
    assert "give --top-k, or --like MODEL" in refused_bytes(tmp_path, "r.npz", content)
    message = refused_bytes(tmp_path, "r.npz", content, options=ImportOptions(top_k=5))
    assert "top-5 of 4 experts cannot be" in message


def test_a_cache_eval_folder_that_is_wrong_is_named(tmp_path: Path) -> None:
    folder = cache_eval(tmp_path / "run")
    out = tmp_path / "t.parquet"

    def told() -> str:
        with pytest.raises(TraceError) as caught:
            import_foreign(folder, out)
        assert not list(tmp_path.glob("*t.parquet*"))
        return str(caught.value)

    manifest = json.loads((folder / "manifest.json").read_text())
    arrays = safetensors.load_file(folder / "events.safetensors")
    for changed, message in (
        ({"offsets": arrays["offsets"][:-1]}, "tensor offsets is int64"),
        ({"offsets": arrays["offsets"][::-1].copy()}, "tensor "),
        ({"assignment_counts": arrays["assignment_counts"] + 5}, "event 0: counts"),
        ({"layer_ids": arrays["layer_ids"].astype(np.float32)}, "tensor layer_ids is float32"),
    ):
        safetensors.save_file(arrays | changed, folder / "events.safetensors")
        assert message in told()
    (folder / "events.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      rest")
    assert "tensor" in told()
    manifest["artifacts"]["events"]["path"] = "../../etc/passwd"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "leads out of the folder" in told()
    (folder / "manifest.json").write_text("{")
    assert "manifest.json: is no JSON" in told()


def test_counts_are_told_from_traces(tmp_path: Path) -> None:
    counts = np.ones((1, 2, 5))
    for name, content in (
        ("a.npy", npy(counts)),
        ("b.npy", npy(counts[0].astype(np.int64))),
        ("c.json", json.dumps({"logical_count": counts.tolist()}).encode()),
        ("d.pt", saved({"logical_count": torch.ones(1, 2, 5)})),
        ("e.pt", saved({"records": [{"global_physical_count": torch.ones(2, 5)}]})),
        ("f.pt", saved({"expert_load_window": torch.ones(1, 2, 5)})),
    ):
        message = refused_bytes(tmp_path, name, content)
        assert "give it to --calibration of moesim or moerun" in message
