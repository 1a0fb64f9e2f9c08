"""Every command and snippet of README.md, run as it stands in a scratch folder.

A command that the README gains needs a line in RUNS.
"""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import moerun.cli
import moesim.cli
import moetrace.cli
import numpy as np
import pytest
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.store.pack import pack

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = r"(?:moetrace|moesim|moerun|make|curl|python) "
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
# What stands for the reader's own files and models.
PLACEHOLDERS = {"CORPUS": "text.txt", "T.parquet": "t.parquet", "M": "tiny"}
PLACEHOLDERS |= {"CHECKPOINT": "tiny", "TEXT": "text.txt"}


Mains = dict[str, Callable[[], object]]


class Run(NamedTuple):
    """How a command of the README is run, and what it must leave or print."""

    given: tuple[str, ...] = ()  # files of the kit that lie in the folder
    leaves: str | None = None  # a file that is there afterwards
    prints: str | None = None
    stdin: str = ""
    slow: bool = False


SERVED = Run(slow=True)  # in test_the_server_answers
RUNS = {
    "moetrace record CORPUS --model M --out T.parquet": Run(("text.txt",), "t.parquet"),
    "moesim compare lru lfu belady --trace T.parquet": Run(("t.parquet",), prints="belady"),
    'moerun --policy lru-spec --model M --prompt "..."': Run(),
    "make demo": Run(),
    "make test": Run(),
    "moetrace record text.txt folder/ lines.jsonl --field text --model tiny --out t.parquet": Run(
        ("text.txt", "folder", "lines.jsonl"), "t.parquet"
    ),
    "moetrace import recording.npz --out t.parquet": Run(("recording.npz",), "t.parquet"),
    "moetrace stats t.parquet": Run(("t.parquet",), prints="locality"),
    "moesim compare lru lfu belady": Run(prints="belady"),
    "moesim compare lru lru-spec:n=1 my_policy.py:Mine --trace mixtral-like --slots 2,4,6 "
    "--precision 2bit --machine t4": Run(("my_policy.py",), prints="my_policy.py:Mine", slow=True),
    "moesim compare lru lfu --trace mixtral-like --precision 2bit --slots 4 --cold": Run(
        prints="cold at every sequence", slow=True
    ),
    "moesim compare lru lru-spec --machine t4 --tokens 50 --slots 4 --timeline out.json.gz": Run(
        leaves="out.json.gz"
    ),
    "moesim machines": Run(prints="rtx3060"),
    "moesim policies": Run(prints="lru-spec"),
    "moesim compare lru lru-spec --trace mixtral-like --precision 2bit --slots 4": Run(
        prints="lru-spec", slow=True
    ),
    "python -m moeroute.synthetic --tokens 2048 --seed 0 --out mixtral-like.parquet": Run(
        leaves="mixtral-like.parquet", prints="published", slow=True
    ),
    "moesim compare lru lfu belady lru-spec clairvoyant --trace mixtral-like --precision 2bit "
    "--slots 4 --tokens 300": Run(prints="clairvoyant", slow=True),
    "moesim curve lru lfu belady": Run(prints="shuffled"),
    "moesim sweep lru lru-spec --slots 2,4,6 --machine t4,rtx3060 --out sweep.parquet": Run(
        leaves="sweep.parquet", prints="best policy", slow=True
    ),
    "moesim table2": Run(prints="Left unexplained", slow=True),
    'moerun generate --policy lru-spec --slots 4 --prompt "The house was quiet, and"': Run(),
    "moerun pack CHECKPOINT --precision 2bit --out store/": Run(leaves="store/index.json"),
    "moerun generate --model store/ --policy lru-spec --memory 9GiB --prompt-file prompt.txt": Run(
        ("store", "prompt.txt")
    ),
    'moerun generate --link-gbps 0.5 --policy lru --record live.parquet --prompt "..."': Run(
        leaves="live.parquet", slow=True
    ),
    "moerun profile --out this-machine.toml": Run(leaves="this-machine.toml", slow=True),
    "moerun fidelity lru lfu lru-spec --slots 4 --link-gbps 0.5": Run(
        prints="live tok/s", slow=True
    ),
    'moerun generate --policy hobbit --low 2bit --slots 3 --prompt "..."': Run(slow=True),
    'moerun generate --memory 60MiB --max-new-tokens 20 --plan --prompt "Once upon a time"': Run(
        prints="KV cache"
    ),
    "moerun pack CHECKPOINT --precision 2bit --attention 4bit --out store/": Run(
        leaves="store/attention.safetensors", slow=True
    ),
    "moerun perplexity TEXT --model M --attention native,4bit --experts 4bit,3bit,2bit": Run(
        ("text.txt",), prints="bits/byte", slow=True
    ),
    "moerun perplexity --attention native --experts native --policy lru --policy hobbit "
    "--low 2bit --slots 3 --tokens 1000": Run(prints="hobbit", slow=True),
    "moerun bench --shape mixtral-8x7b --layers 4 --policy lru --policy lru-spec --baseline "
    "released --tokens 16 --warm-up 4 --rounds 1": Run(prints="released", slow=True),
    "moerun chat --policy lru-spec --slots 4": Run(stdin="Hello\n"),
    "moerun serve --policy lru-spec --slots 4 --port 8000": SERVED,
    "curl -s http://127.0.0.1:8000/v1/chat/completions -d "
    """'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'""": SERVED,
    "curl -s http://127.0.0.1:8000/metrics": SERVED,
    "moesim compare lru mine.py:Mine mine.py:Mine:half_life=200": Run(
        ("mine.py",), prints="mine.py:Mine:half_life=200"
    ),
    'moerun generate --policy mine.py:Mine --prompt "..."': Run(("mine.py",)),
    "moesim compare lru hobbit adapmoe-skip --trace mixtral-like --precision 4bit "
    "--low 2bit --slots 3": Run(prints="* changes what the model computes", slow=True),
    'moerun generate --policy fiddler --slots 3 --prompt "..."': Run(slow=True),
}


def commands() -> list[str]:
    """The commands of the README: indented lines, and code in sentences that has options."""
    found = []
    for line in README.splitlines():
        if re.match(f"    {PROGRAM}", line):
            # What follows several blanks or a # explains the command.
            for command in re.split(r" {2,}|;|  #", line.strip()):
                if re.match(PROGRAM, command.strip()):
                    found.append(command.strip())
    for code in re.findall(f"`({PROGRAM}[^`]*--[^`]*)`", README):
        found.append(" ".join(code.split()))
    return list(dict.fromkeys(found))


def snippet(first: str) -> str:
    """The indented block that begins with the line ``first``, up to the first command after it."""
    block = README[README.index(f"    {first}\n") :]
    lines = []
    for line in block.splitlines():
        if re.match(f"    {PROGRAM}", line) or (line and not line.startswith("    ")):
            break
        lines.append(line.removeprefix("    "))
    return "\n".join(lines).strip() + "\n"


def printed_under(command: str) -> list[list[str]]:
    """The cells of the table that the README shows after ``command`` in a sentence."""
    text = re.sub(r"[ \n]+", " ", command)
    place = re.search(re.escape(text).replace(r"\ ", r"\s+"), README)
    assert place is not None
    rows = []
    for line in README[place.end() :].splitlines()[1:]:
        if line.startswith("    "):
            rows.append(line.split())
        elif rows:
            break
    return rows


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's own files."""
    folder = tmp_path_factory.mktemp("kit")
    (folder / "text.txt").write_text(TEXT * 20)
    (folder / "prompt.txt").write_text("Once upon a time")
    (folder / "folder").mkdir()
    (folder / "folder" / "more.txt").write_text(TEXT[::-1] * 10)
    (folder / "lines.jsonl").write_text(json.dumps({"text": TEXT * 5}) + "\n")
    for name in ("mine.py", "my_policy.py"):
        (folder / name).write_text(snippet("# mine.py"))
    ids = np.random.default_rng(0).random((40, 3, 8)).argsort(axis=-1)[..., :2].astype(np.uint8)
    np.savez(
        folder / "recording.npz",
        ids=ids,
        weights=np.full(ids.shape, 0.5, np.float16),
        seq=np.zeros(40, np.int32),
        pos=np.arange(40, dtype=np.int32),
        phase=np.ones(40, np.uint8),
        n_experts=8,
    )
    pack(resolve("tiny"), folder / "store", precision="2bit")
    shutil.copyfile(open_trace("tiny").path, folder / "t.parquet")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache: what one command packs the next one finds."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def scratch(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder with files of the kit, which becomes the current one."""

    def make(*given: str) -> Path:
        for name in given:
            source = kit / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def test_every_command_of_the_readme_is_run() -> None:
    assert set(commands()) == set(RUNS)


def cases() -> list[Any]:
    shown = []
    for command, run in RUNS.items():
        if run is SERVED or command.startswith("make "):
            continue
        marks = [pytest.mark.slow] if run.slow else []
        shown.append(pytest.param(command, marks=marks, id=command))
    return shown


@pytest.mark.parametrize("command", cases())
def test_a_command_of_the_readme(
    command: str,
    scratch: Callable[..., Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RUNS[command]
    folder = scratch(*run.given)
    program, *arguments = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(run.stdin))
    mains: Mains = {
        "moesim": moesim.cli.main,
        "moerun": moerun.cli.main,
        "moetrace": moetrace.cli.main,
    }
    main = mains.get(program)
    if main is None:  # python -m MODULE
        monkeypatch.setattr(sys, "argv", arguments[1:])
        monkeypatch.delitem(sys.modules, arguments[1], raising=False)
        main = partial(runpy.run_module, arguments[1], run_name="__main__")
    elif program == "moerun":
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr()
    assert not end.value.code, shown.err
    assert "Traceback" not in shown.err
    assert shown.out.strip()
    if run.leaves is not None:
        assert (folder / run.leaves).stat().st_size > 0
    if run.prints is not None:
        assert run.prints in " ".join(shown.out.split())
    if command.endswith("--tokens 300"):  # the same on every machine: compared with the README's
        printed = [line.split() for line in shown.out.splitlines()]
        for row in printed_under(command):
            assert row in printed


def test_the_readme_shows_a_table_to_compare_with() -> None:
    rows = printed_under(next(command for command in RUNS if command.endswith("--tokens 300")))
    assert [row[0] for row in rows] == [
        *("policy", "lru", "lfu", "belady", "lru-spec", "clairvoyant", "limit")
    ]


@pytest.mark.parametrize("command", [name for name in RUNS if name.startswith("make ")])
def test_what_make_is_asked_for_is_there(command: str) -> None:
    """The targets are this suite and what demo.sh runs: make says what it would do."""
    done = subprocess.run(
        [*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_python_of_the_readme_runs(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    exec(compile(snippet("import moerun, moesim"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "share_of_limit" in printed
    assert "Once upon a time" in printed


def test_the_profile_of_a_machine_is_one_that_moesim_reads(tmp_path: Path) -> None:
    from moesim.machine.profile import load_machine

    profile = tmp_path / "mine.toml"
    profile.write_text(snippet('name = "mine"'))
    machine = load_machine(str(profile))
    assert (machine.name, machine.source) == ("mine", "measured")
    assert machine.link.bytes_per_s == 12e9
    assert machine.disk is not None
    assert machine.cpu is not None


@pytest.mark.slow
def test_the_server_answers(scratch: Callable[..., Path]) -> None:
    served, *asked = [command for command, run in RUNS.items() if run is SERVED]
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    folder = scratch()
    _, *arguments = shlex.split(served.replace("8000", port))
    command = [sys.executable, "-c", "from moerun.cli import main; main()", *arguments]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            deadline = time.monotonic() + 120
            while "serving " not in server.stderr.readline():
                assert server.poll() is None
                assert time.monotonic() < deadline
            answers = [
                subprocess.run(
                    shlex.split(one.replace("8000", port)), capture_output=True, check=True
                ).stdout
                for one in asked
            ]
        finally:
            server.terminate()
    assert json.loads(answers[0])["choices"][0]["message"]["role"] == "assistant"
    assert b"# HELP" in answers[1]
