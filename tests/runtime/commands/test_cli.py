"""The command as a user meets it: its output and its exit codes.

Runs that end by themselves go through the entry point in this process, for each new one imports
torch again; what is about processes (a first run, signals, kills, limits) gets real ones.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from moepolicy.tables import Format
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.live.report import Report, render
from support.commands import Call, Ended, caller
from support.moe_models import random_model, save_checkpoint

PROMPT = "It was the best of times"
PATIENCE_S = 120


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache that the module's runs share, so that the model is packed once."""
    return tmp_path_factory.mktemp("home")


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from moerun.cli import main; main()", *map(str, arguments)]


def process(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(home),
        check=False,
    )


@pytest.fixture
def moerun(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(monkeypatch, capsys, home=home)


def error_line(done: Ended | subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line a failed command ends with; it must not be a traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert "" not in lines
    assert lines[-1].startswith("error: ")
    return lines[-1]


def test_a_first_run_packs_streams_text_and_reports(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, journal = tmp_path / "run.parquet", tmp_path / "run.json"
    options = ("--policy", "lru-spec", "--slots", "3", "--max-new-tokens", "12")
    arguments = (*options, "--prompt", PROMPT, "--link-gbps", "1")
    first = process(tmp_path, *arguments, "--record", trace, "--journal", journal)
    assert first.returncode == 0, first.stderr
    assert "packing tiny (native) into" in first.stderr
    assert len(first.stdout.split()) > 3
    for word in ("lru-spec", "tokens/s decoding", "hits", "late", "misses", "stall", "memory"):
        assert word in first.stderr
    meta = open_trace(trace).meta
    assert (meta.source, meta.horizon) == ("live", 1)
    assert json.loads(journal.read_text())["policy"] == "lru-spec"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = moerun(*arguments)
    assert second.stderr.startswith("policy ")
    assert second.stdout == first.stdout


def test_json_has_the_row_the_text_and_what_made_it(moerun: Call) -> None:
    done = moerun("--format", "json", "--max-new-tokens", "6", "--slots", "2", stdin=f"{PROMPT}\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "measured"
    assert found["new_tokens"] == 6
    assert found["hits"] + found["late"] + found["misses"] == found["requests"]
    assert found["loads"] * 196608 == found["bytes_loaded"]
    assert found["arena_bytes"] == (8 * 2 + 1) * 196608
    assert found["peak_host_bytes"] > found["arena_bytes"]
    assert found["packages"]["torch"]
    assert found["text"]


def test_the_prompt_may_come_from_a_file(moerun: Call, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    texts = [
        moerun("--max-new-tokens", "5", *source).stdout
        for source in (("--prompt-file", path), ("--prompt", PROMPT))
    ]
    assert texts[0] == texts[1] != ""


def test_generate_is_what_options_without_a_command_are_for(moerun: Call) -> None:
    options = ("--policy", "lru-spec", "--slots", "3", "--max-new-tokens", "6", "--prompt", PROMPT)
    named, short = moerun("generate", *options), moerun(*options)
    assert named.returncode == short.returncode == 0, named.stderr
    assert named.stdout == short.stdout != ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slots", "2", "policies"), "options stand before 'policies', which does not see them"),
        (("generate", "Once"), "'Once' belongs to no option: give the prompt as --prompt TEXT"),
        (("--prompt", "a", "b"), "'b' belongs to no option"),
    ],
)
def test_words_that_no_option_takes_are_explained(
    moerun: Call, arguments: tuple[str, ...], says: str
) -> None:
    done = moerun(*arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


def test_the_text_ends_before_a_stop_string(moerun: Call) -> None:
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "30", "--format", "json")
    whole = json.loads(moerun(*arguments).stdout)
    stop = whole["text"].split()[4]
    cut = json.loads(moerun(*arguments, "--stop", stop, "--stop", "@@").stdout)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["new_tokens"] < whole["new_tokens"]
    assert cut["sampling"]["stop_strings"] == [stop, "@@"]


def test_a_text_that_fills_the_context_says_so(moerun: Call) -> None:
    prompt = ("--prompt", "word " * 490)
    done = moerun(*prompt, "--max-new-tokens", "5000", "--slots", "9", "--format", "json")
    assert done.stderr == "the text ends here: the context of 512 tokens is full\n"
    found = json.loads(done.stdout)
    assert found["prompt_tokens"] + found["new_tokens"] == 512
    # A layer has 8 experts: no memory is taken for more.
    assert found["slots"] == 8
    assert found["arena_bytes"] == (8 * 8 + 1) * 196608
    assert "context" not in moerun("--prompt", PROMPT, "--max-new-tokens", "2").stderr


def test_what_has_no_value_yet_is_left_out_of_the_table() -> None:
    nothing: dict[str, Any] = {
        **{field.name: 0 for field in fields(Report)},
        **{"policy": "lru", "disk_reads": None, "peak_device_bytes": None, "interrupted": True},
    }
    idle = render(Report(**nothing), Format.table, "", {}).splitlines()
    assert [line.split()[0] for line in idle] == ["policy", "memory", "tokens"]
    assert idle[-1] == "tokens    0 prompt, 0 new (interrupted)"
    reading = Report(**nothing | {"prompt_tokens": 5, "requests": 4, "hits": 4, "stall_s": 0.5})
    table = render(reading, Format.table, "", {})
    assert "stall     0.50 s waiting for experts\n" in table
    assert "tokens/s" not in table
    spoken = render(replace(reading, prompt_tokens_per_s=2.0), Format.table, "", {})
    assert "speed     2.00 tokens/s reading the prompt\n" in spoken


def test_policies_are_listed(moerun: Call) -> None:
    done = moerun("policies")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "speculative" in lines["lru-spec"]
    assert "not live" not in lines["lru-spec"]
    assert "not live: needs the future" in lines["belady"]


def test_a_second_store_is_packed_and_what_it_changed_is_said(moerun: Call) -> None:
    options = ("--policy", "hobbit", "--prompt", PROMPT, "--slots", "2", "--max-new-tokens", "8")
    done = moerun(*options, "--low", "2bit")
    assert done.returncode == 0, done.stderr
    assert "changed   of the gates' weight" in done.stderr
    assert "% computed at the lower precision" in done.stderr
    row = json.loads(moerun(*options, "--low", "2bit", "--format", "json").stdout)
    assert row["low_loads"] > 0
    assert 0 < row["low_share"] < 1
    assert row["lossy"]


MISTAKES = [
    (("--policy", "hobbit"), "policy 'hobbit' loads experts at a lower precision"),
    (("--policy", "belady"), "policy 'belady' needs the future of a recorded trace"),
    (("--model", "small"), "there is no model 'small'"),
    (("--device", "cuda:7"), "device 'cuda:7' is not there"),
    (("--memory", "100KiB"), "100.00 KiB of memory is too little: the least that works is"),
    (("--prompt", ""), "the prompt is empty"),
    (("--prompt", "word " * 600), "the model's context is 512: shorten it"),
    (("--prompt-file", "/nowhere/prompt"), "/nowhere/prompt: No such file"),
    (("--record", "/nowhere/t.parquet"), "the folder /nowhere does not exist"),
    (("--journal", "/nowhere/j.json"), "the folder /nowhere does not exist"),
    (("--policy", "static", "--calibration", "mixtral-like"), "32 layers"),
]
# What no machine, model or file could make right.
NONSENSE = [
    (("--policy", "hobbit", "--low", "2bits"), "--low 2bits is neither a precision (native"),
    (("--policy", "lur"), "unknown policy 'lur'; did you mean 'lru'?"),
    (("--device", "gpu"), "unknown device 'gpu'; there are: auto, cpu, cuda, cuda:N"),
    (("--slots", "-1"), "slots must be 0 or more, not -1"),
    (("--scope", "model"), "unknown scope 'model'"),
    (("--memory", "lots"), "'lots' is no amount of memory"),
    (("--precision", "1bit"), "there is no precision '1bit'"),
    (("--streams", "9"), "streams must be 1, 2 or 3, not 9"),
    (("--threads", "0"), "threads must be 1 or more, not 0"),
    (("--link-gbps", "0"), "link-gbps must be above 0"),
    (("--temperature", "-1"), "temperature must be 0 or more"),
    (("--top-p", "2"), "top-p must be above 0 and at most 1"),
    (("--stop", ""), "a stop string must not be empty"),
    (("--max-new-tokens", "0"), "max-new-tokens must be 1 or more"),
    (("--horizon", "-2"), "horizon must be 0 or more"),
    (("--policy", "lru-spec:m=1"), "policy 'lru-spec' has no parameter 'm'"),
    (("--policy", "lru-spec:n=0"), "next-gate: n must be 1 to 8, not 0"),
    (("--chunk", "3"), "a chunk must be a multiple of"),
]


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [*((1, *mistake) for mistake in MISTAKES), *((2, *value) for value in NONSENSE)],
)
def test_mistakes_get_one_line_and_values_that_cannot_be_exit_with_2(
    moerun: Call, code: int, arguments: tuple[str, ...], says: str
) -> None:
    prompt = () if any(a.startswith("--prompt") for a in arguments) else ("--prompt", PROMPT)
    assert says in error_line(moerun(*prompt, *arguments), code)


def test_a_refused_prompt_leaves_no_recording(moerun: Call, tmp_path: Path) -> None:
    for prompt in ("", "word " * 600):
        error_line(moerun("--prompt", prompt, "--record", tmp_path / "t.parquet"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "a", "--prompt-file", "b"),
        ("--prompt", "a", "--slots", "2", "--memory", "1GiB"),
        ("--prompt", "a", "--slots", "two"),
        ("--nonsense",),
        ("nonsense",),
        ("profile",),
        ("--slots", "2", "policies"),
        ("--slots", "2", "serve"),
        ("serve", "--port", "70000"),
        ("serve", "--queue", "-1"),
        ("serve", "--api-key", ""),
        ("chat", "--slots", "2", "--memory", "1GiB"),
    ],
)
def test_wrong_usage_exits_with_2(moerun: Call, arguments: tuple[str, ...]) -> None:
    done = moerun(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_packing_by_hand_and_running_the_store(moerun: Call, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    done = moerun("pack", "tiny", "--out", out, "--precision", "4bit")
    assert done.returncode == 0, done.stderr
    assert "8 layers of 8 experts in 4bit" in done.stdout
    again = error_line(moerun("pack", "tiny", "--out", out))
    assert f"{out} exists already" in again
    run = moerun("--model", out, "--prompt", PROMPT, "--max-new-tokens", "4")
    assert run.returncode == 0, run.stderr
    wrong = moerun("--model", out, "--precision", "2bit", "--prompt", PROMPT)
    assert f"the experts in {out} are 4bit, not 2bit" in error_line(wrong)


def test_a_store_of_another_model_is_refused(moerun: Call, tmp_path: Path) -> None:
    other = save_checkpoint(random_model("mixtral"), resolve("tiny"), tmp_path / "other")
    store = tmp_path / "store"
    made = moerun("--store", store, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert made.returncode == 0, made.stderr
    wrong = moerun("--store", store, "--model", other, "--prompt", PROMPT)
    assert "is the store of another model (tiny)" in error_line(wrong)


def test_a_damaged_store_says_which_expert_and_leaves_no_trace(
    moerun: Call, tmp_path: Path
) -> None:
    store, trace = tmp_path / "store", tmp_path / "t.parquet"
    moerun("pack", "tiny", "--out", store)
    victim = store / "experts-00003.safetensors"
    content = bytearray(victim.read_bytes())
    content[-150_000:] = bytes(150_000)
    victim.write_bytes(content)
    done = moerun("--model", store, "--prompt", PROMPT, "--slots", "0", "--record", trace)
    line = error_line(done)
    assert "expert 7 of layer 3 is damaged" in line
    assert str(victim) in line
    assert not trace.exists()
    victim.write_bytes(content[:-1000])
    line = error_line(moerun("--model", store, "--prompt", PROMPT))
    assert f"{victim} has" in line


def test_no_space_for_the_pack_is_said_before_anything_is_written(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = error_line(moerun("--prompt", PROMPT))
    assert "0.00 GB free" in line
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_ctrl_c_ends_with_the_statistics_and_the_files(home: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.parquet"
    arguments = ("--prompt", PROMPT, "--max-new-tokens", "400", "--slots", "1")
    process = subprocess.Popen(
        command(*arguments, "--link-gbps", "0.02", "--record", trace),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(home),
    )
    assert process.stdout is not None
    process.stdout.read(5)  # it is generating
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "tokens/s decoding" in errors
    assert "(interrupted)" in errors
    opened = open_trace(trace)
    opened.validate()
    assert rest.endswith("\n")
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_a_profile_is_what_moesim_reads(moerun: Call, tmp_path: Path) -> None:
    from moesim.machine.profile import load_machine

    out = tmp_path / "here.toml"
    done = moerun("profile", "--out", out, "--link-gbps", "0.5", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    machine = load_machine(str(out))
    assert (machine.name, machine.source) == ("here", "measured")
    assert machine.link.bytes_per_s == 0.5e9
    assert machine.link.back_to_back
    # Only what no other program can bring down to nothing; test_profile.py has the arithmetic.
    assert machine.compute.expert_s > 0
    assert machine.cpu is not None
    assert machine.cpu.expert_s > 0
    assert "tiny" in machine.description


@pytest.mark.slow
def test_fidelity_puts_live_beside_simulated(moerun: Call, tmp_path: Path) -> None:
    done = moerun(
        *("fidelity", "lru", "lru-spec", "static", "--rounds", "1", "--max-new-tokens", "16"),
        *("--link-gbps", "0.5", "--slots", "3", "--format", "json"),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [row["policy"] for row in rows] == ["lru", "lru-spec", "static"]
    lru, spec, static = rows
    for row in (lru, static):  # without prefetching the decisions do not depend on the clock
        assert row["live_hits"] == row["simulated_hits"]
        assert row["live_misses"] == row["simulated_misses"]
    for row in rows:
        assert row["live_tokens_per_s"] > 0
        assert row["simulated_tokens_per_s"] > 0
    total = spec["live_hits"] + spec["live_late"] + spec["live_misses"]
    assert total == pytest.approx(1)
    named = moerun(
        *("fidelity", "lru", "--rounds", "1", "--max-new-tokens", "4", "--machine", "t4"),
        *("--slots", "3", "--format", "json"),
    )
    assert named.returncode == 0, named.stderr
    assert json.loads(named.stdout)[0]["simulated_tokens_per_s"] > 0
    refused = moerun("fidelity", "belady", "--rounds", "1")
    assert "needs the future" in error_line(refused)


def test_a_killed_first_run_leaves_a_cache_that_works(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = subprocess.Popen(
        command("--prompt", PROMPT, "--max-new-tokens", "3"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(tmp_path),
    )
    stores = tmp_path / "moerun" / "stores"
    deadline_s = time.monotonic() + PATIENCE_S
    while not list(stores.glob("*.partial/*.safetensors")) and killed.poll() is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = moerun("--prompt", PROMPT, "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_help_needs_no_model_libraries(home: Path) -> None:
    program = (
        "import sys; from moerun.cli import app; "
        "app(['generate', '--help'], standalone_mode=False); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'polars')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment(home),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--policy", "--prompt", "--slots", "--memory", "--link-gbps", "--record"):
        assert option in done.stdout
