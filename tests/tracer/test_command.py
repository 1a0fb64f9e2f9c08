"""The command as a user meets it: what it prints, how it fails, what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from moeroute import Trace, open_trace
from moerun.checkpoint.hub import resolve
from moetrace.cli import app
from support.checkpoints import change_config, change_weights, quantise_float8
from support.gguf_files import Converter
from support.moe_models import random_model, save_checkpoint
from support.published import formats, publish
from typer.testing import CliRunner

Run = Callable[..., "tuple[int, str, str]"]
# Makes each batch of rows durable at once, and the files no larger than a limit, if there is one.
_PROCESS = """
import resource, sys
import moeroute.writer as writer
writer.PART_BYTES = 1
if limit := int(sys.argv.pop(1)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
import torch
torch.set_num_threads(1)
from moetrace.cli import main
main()
"""


def start(folder: Path, *arguments: object, file_bytes: int = 0) -> subprocess.Popen[str]:
    """The command in a process of its own; no file it writes may exceed `file_bytes` (0: any)."""
    command = [sys.executable, "-c", _PROCESS, str(file_bytes), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def checkpoint_copy(folder: Path) -> Path:
    copy = folder / "model"
    shutil.copytree(resolve("tiny"), copy)
    return copy


def test_a_recording_is_described(moetrace: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    code, printed, told = moetrace("record", corpus, "--out", out, "--horizon", 2)
    assert code == 0
    assert "tokens/s" in told
    tokens = open_trace(out).n_rows // 8
    assert printed.startswith(f"tiny: {tokens} tokens x 8 layers, top-2 of 8 experts")
    assert [path.name for path in tmp_path.glob("t.parquet*")] == ["t.parquet"]


def test_a_kill_leaves_no_trace_and_resume_finishes_it(moetrace: Run, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 500)
    out, whole = tmp_path / "t.parquet", tmp_path / "whole.parquet"
    settings = ("record", text, "--sequence-length", 64, "--batch-tokens", 128, "--horizon", 1)
    process = start(tmp_path, *settings, "--out", out)
    parts = out.with_name("t.parquet.partial")
    deadline = time.monotonic() + 100
    while len(list(parts.glob("part-*"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()

    code, _, told = moetrace(*settings, "--out", out, "--resume")
    assert code == 0, told
    assert not parts.exists()
    assert moetrace(*settings, "--out", whole)[0] == 0
    resumed, straight = open_trace(out), open_trace(whole)
    assert resumed.meta == straight.meta
    for name in straight.columns:
        np.testing.assert_array_equal(resumed.array(name), straight.array(name), err_msg=name)


@pytest.mark.slow
def test_an_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 500)
    process = start(tmp_path, "record", text, "--batch-tokens", 64, "--out", "t.parquet")
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("t.parquet.partial/part-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate()
    assert process.returncode == 130
    assert "t.parquet is unfinished: the same command with --resume goes on" in told
    assert "Traceback" not in told
    assert [path.name for path in tmp_path.glob("t.parquet*")] == ["t.parquet.partial"]


def test_resuming_a_whole_trace_is_refused(moetrace: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    assert moetrace("record", corpus, "--out", out)[0] == 0
    code, _, told = moetrace("record", corpus, "--out", out, "--resume")
    assert code == 1
    assert "t.parquet" in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    process = start(tmp_path, "record", text, "--out", "t.parquet", file_bytes=60_000)
    _, told = process.communicate(timeout=100)
    assert process.returncode == 1, told
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1].startswith("error: t.parquet")
    assert not (tmp_path / "t.parquet").exists()


def test_wrong_models_are_named(moetrace: Run, corpus: Path, tmp_path: Path) -> None:
    dense = save_checkpoint(random_model("llama"), resolve("tiny"), tmp_path / "dense")
    cases = {
        str(corpus): "it has no config.json",
        str(dense): "LlamaForCausalLM is no mixture of experts",
    }
    out = tmp_path / "t.parquet"
    for model, message in cases.items():
        assert_fails(moetrace("record", corpus, "--model", model, "--out", out), message)
    code, printed, told = moetrace("record", corpus, "--model", "mixtrl", "--out", out)
    assert (code, printed) == (2, "")
    assert "there is no model 'mixtrl'" in told
    assert not (tmp_path / "t.parquet").exists()


def test_undeclared_quantisation_is_not_recorded(
    moetrace: Run, corpus: Path, tmp_path: Path
) -> None:
    copy = change_weights(checkpoint_copy(tmp_path), partial(quantise_float8, scale="_scale_inv"))
    told = "is quantised (FP8 with scales of blocks) and config.json does not say so"
    assert_fails(moetrace("record", corpus, "--model", copy, "--out", tmp_path / "t.parquet"), told)


def test_a_quantised_checkpoint_counts_experts_in_their_own_bits(
    moetrace: Run, corpus: Path, tmp_path: Path
) -> None:
    copy = change_weights(checkpoint_copy(tmp_path), partial(quantise_float8, scale="_scale_inv"))
    change_config(copy, quantization_config={"quant_method": "fp8"})
    out = tmp_path / "t.parquet"
    code, *_ = moetrace("record", corpus, "--model", copy, "--out", out, "--max-tokens", 40)
    assert code == 0
    sizes = open_trace(out).meta.expert_bytes
    assert next(iter(sizes)) == "fp8"
    assert sizes["fp8"] < 0.6 * sizes["fp16"]


def test_gguf_is_recorded_like_the_checkpoint_that_it_was_made_of(
    moetrace: Run, corpus: Path, tmp_path: Path
) -> None:
    model = Converter(checkpoint_copy(tmp_path), "mixtral", lambda _: Kind.F16)
    file = model.write(tmp_path / "tiny.gguf")
    arguments = ("--max-tokens", 60, "--dtype", "fp32")
    found: list[Trace] = []
    for name in ("tiny", str(file)):
        out = tmp_path / f"{len(found)}.parquet"
        code, *_ = moetrace("record", corpus, "--model", name, "--out", out, *arguments)
        assert code == 0
        found.append(open_trace(out))
    for column in ("token_id", "experts", "router_logits"):
        ours, theirs = (trace.array(column) for trace in found)
        assert np.array_equal(ours, theirs)
    digests = [trace.meta.revision for trace in found]
    assert all(digest and digest.startswith("sha256:") for digest in digests)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    told = f"{cut} is cut off"
    assert_fails(moetrace("record", corpus, "--model", cut, "--out", tmp_path / "c.parquet"), told)


def test_a_format_that_transformers_needs_a_package_for_is_recorded(
    moetrace: Run, corpus: Path, tmp_path: Path
) -> None:
    awq = publish(formats()["awq"], tmp_path / "awq", tmp_path / "plain", vocab_size=5000)
    found: list[Trace] = []
    for folder in (awq, tmp_path / "plain"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(resolve("tiny") / name, folder)
        out = tmp_path / f"{folder.name}.parquet"
        arguments = ("--model", folder, "--out", out, "--max-tokens", 40)
        code, _, told = moetrace("record", corpus, *arguments)
        assert code == 0, told
        found.append(open_trace(out))
    packed, plain = found
    assert np.array_equal(packed.array("experts"), plain.array("experts"))
    logits = [trace.array("router_logits").astype(np.float32) for trace in found]
    assert np.allclose(logits[0], logits[1], atol=1e-2)


def test_damaged_checkpoints_are_named(moetrace: Run, corpus: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    copy = checkpoint_copy(tmp_path)
    weights = copy / "model.safetensors"
    arguments = ("record", corpus, "--model", copy, "--out", tmp_path / "t.parquet")
    whole = load_file(weights)
    save_file({k: v for k, v in whole.items() if "layers.3" not in k}, weights, {"format": "pt"})
    assert_fails(moetrace(*arguments), "has no weights for model.layers.3")
    save_file(whole, weights, {"format": "pt"})
    os.truncate(weights, weights.stat().st_size // 2)
    assert_fails(moetrace(*arguments), f"{weights} is no whole safetensors file")
    weights.write_bytes(b"not safetensors at all")
    assert_fails(moetrace(*arguments), f"{weights} is no whole safetensors file")
    (copy / "config.json").write_text("{")
    assert_fails(moetrace(*arguments), "config.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "corpus nowhere: there is no such file or folder"),
        (["empty.txt"], "the corpus is empty"),
        (["a.jsonl"], "line 1: say with --field which field is the text; there are: q"),
        (["a.jsonl", "--field", "text"], "line 1: has no text under 'text'"),
        (["a.txt", "--sequence-length", "9999"], "the model was made for 512 at most"),
        (
            ["a.txt", "--out", "no/such/folder/t.parquet"],
            "the folder no/such/folder does not exist",
        ),
        (["a.txt", "--device", "cuda:7"], "cuda:7"),
    ],
)
def test_mistakes_are_one_line(
    moetrace: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "a.jsonl").write_text(json.dumps({"q": "hello"}) + "\n")
    out = [] if "--out" in arguments else ["--out", "t.parquet"]
    assert_fails(moetrace("record", *arguments, *out), message)
    assert not list(tmp_path.glob("t.parquet*"))


def assert_fails(outcome: tuple[int, str, str], message: str) -> None:
    code, printed, told = outcome
    assert code == 1
    assert not printed
    assert message in told
    last = told.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


@pytest.mark.parametrize(
    "arguments",
    [
        ["record", "a.txt"],
        ["record", "a.txt", "--out", "t.parquet", "--horizon", "-1"],
        ["record", "a.txt", "--out", "t.parquet", "--prediction", "guesswork"],
        ["record", "a.txt", "--out", "t.parquet", "--seed", "3"],
        ["import", "a.npz"],
        ["stats", "tiny", "--slots", "two"],
        ["stats", "tiny", "--slots", "4,9"],
        ["stats", "tiny", "--slots", "1"],
        ["replay"],
    ],
)
def test_wrong_usage_is_two(moetrace: Run, arguments: list[str]) -> None:
    code, _, told = moetrace(*arguments)
    assert code == 2
    assert "Traceback" not in told


def test_a_foreign_recording_is_imported(moetrace: Run, tmp_path: Path) -> None:
    foreign, out = tmp_path / "routing.npz", tmp_path / "t.parquet"
    rng = np.random.default_rng(0)
    ids = rng.random((20, 3, 8)).argsort(axis=-1)[..., :2]
    np.savez(
        foreign,
        ids=ids.astype(np.uint8),
        weights=np.full(ids.shape, 0.5, np.float16),
        seq=np.zeros(20, np.int32),
        pos=np.arange(20, dtype=np.int32),
        phase=np.ones(20, np.uint8),
        n_experts=8,
        top_k=2,
    )
    code, printed, told = moetrace("import", foreign, "--out", out)
    assert code == 0, told
    assert "20 tokens x 3 layers, top-2 of 8 experts" in printed
    assert told.splitlines() == [
        "note: phase: no prompt is recorded: every token is decode",
        "note: sizes: unknown: bytes of an expert, dense weights of a layer and a token "
        "(--like gives them)",
        "note: absent: token ids, router logits, predictions of later gates",
    ]
    np.testing.assert_array_equal(open_trace(out).array("experts"), ids.reshape(-1, 2))
    code, _, told = moetrace("import", tmp_path / "none.npz", "--out", out)
    assert (code, told.startswith("error: ")) == (1, True)


def test_an_import_takes_the_sizes_it_is_told(moetrace: Run, tmp_path: Path) -> None:
    foreign, out = tmp_path / "routing.npz", tmp_path / "t.parquet"
    ids = np.tile(np.arange(4, dtype=np.uint8), (2, 24, 1))
    arrays: dict[str, Any] = {
        "seq": np.zeros(2, np.int32),
        "pos": np.arange(2),
        "phase": np.ones(2, np.uint8),
    }
    np.savez(foreign, ids=ids, n_experts=32, **arrays)
    code, printed, told = moetrace("import", foreign, "--out", out)
    assert code == 0, told
    unknown = "sizes: bytes of an expert unknown; dense weights of a layer and a token unknown"
    assert unknown in printed.splitlines()
    meta = open_trace(out).meta
    assert (meta.expert_bytes, meta.layer_bytes, meta.token_bytes) == ({}, None, None)
    out.unlink()

    code, printed, told = moetrace("import", foreign, "--out", out, "--like", "gpt-oss-20b")
    assert code == 0, told
    assert "sizes: an expert 13,236,480 bytes in mxfp4" in printed
    assert (open_trace(out).meta.layer_bytes, open_trace(out).meta.token_bytes) == (
        53_296_192,
        1_158_278_400,
    )
    out.unlink()

    numbers = ["--expert-bytes", "4bit=13,bf16=0.05KB", "--dense-layer-bytes", 7]
    code, printed, told = moetrace("import", foreign, "--out", out, *numbers)
    assert code == 0, told
    meta = open_trace(out).meta
    assert (meta.expert_bytes, meta.layer_bytes) == ({"4bit": 13, "bf16": 50}, 7)
    assert meta.token_bytes is None
    out.unlink()

    code, _, told = moetrace("import", foreign, "--out", out, "--like", "gpt-oss-120b")
    assert code == 1
    assert "24 layers where gpt-oss-120b has 36" in told
    code, _, told = moetrace("import", foreign, "--out", out, "--expert-bytes", "4bit=0")
    assert code == 2
    assert "give PRECISION=BYTES" in told
    assert not list(tmp_path.glob("t.parquet*"))


def test_statistics_in_three_formats(moetrace: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.parquet"
    assert moetrace("record", corpus, "--out", out)[0] == 0
    code, table, _ = moetrace("stats", out, "--slots", "2,4")
    assert code == 0
    assert "hit_ratio_lru" in table
    rows = json.loads(moetrace("stats", out, "--slots", "2,4", "--format", "json")[1])["statistics"]
    lines = moetrace("stats", out, "--slots", "2,4", "--format", "csv")[1].splitlines()
    assert lines[0] == "statistic,parameter,value,shuffled"
    assert len(lines) == len(rows) + 1
    hits = {row["parameter"]: row["value"] for row in rows if row["statistic"] == "hit_ratio_lru"}
    assert 0 < hits["slots=2"] < hits["slots=4"] <= 1


def test_what_a_killed_import_left_goes_with_the_next(tmp_path: Path) -> None:
    recording, left = tmp_path / "r.npz", tmp_path / ".t.parquet.abcd.partial"
    np.savez(recording, ids=np.tile(np.arange(2), (6, 2, 1)), seq=np.zeros(6, int),
             pos=np.arange(6), phase=np.ones(6, int))  # fmt: skip
    left.mkdir()
    (left / "experts").write_bytes(b"half")
    done = CliRunner().invoke(app, ["import", str(recording), "--out", str(tmp_path / "t.parquet")])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.npz", "t.parquet"]


def test_statistics_are_said_in_words_before_the_numbers(moetrace: Run) -> None:
    code, printed, _ = moetrace("stats", "tiny", "--slots", "4")
    assert code == 0
    said, _, table = " ".join(printed.split()).partition("statistic of")
    assert "locality: 40 % of a token's experts were among those of the token before it" in said
    assert "and 26 % with the tokens shuffled: experts come back soon" in said
    assert "applied a layer early, finds 80 % of the experts" in said
    assert "LRU hits 69 % and no policy without prefetching could hit more than 84 %" in said
    assert "hit_ratio_lru slots=4 0.689" in table
