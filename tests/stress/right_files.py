"""Right files for the campaign of wrong ones: each function writes a case's files into the current
folder, in a process of its own."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moepolicy.console import INTERRUPTED
from support.recorders import FILES
from support.traces import random_trace

from stress.carriers import EVIL, EVIL_CODE

PROFILE = Path(__file__).parents[2] / "simulator/moesim/machines/t4.toml"
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "
GRID = """policies = ["lru", "lru-spec"]
traces = ["t.parquet"]
slots = [1, 2]
scopes = ["layer"]
machines = ["t4"]

[parameters.lru-spec]
n = [1, 2]
"""
CONFIG = """model = "model"
store = "packed"
prompt = "It was"
max-new-tokens = 2
temperature = 0.5
top-p = 0.9
stop = ["x", "y"]
seed = 3
slots = 3
policy = "lru-spec"
scope = "layer"
streams = 2
chunk = "1MiB"
device = "cpu"
threads = 1
direct = false
"""
POLICY = '''"""A policy of one's own."""

import numpy as np
from moepolicy import Policy


class Mine(Policy):
    """Evicts what was used least."""

    requires = frozenset({"weights"})

    def __init__(self, context, n=2):
        self.uses = np.zeros(context.n_keys, np.int64)
        self.n = n

    def on_step(self, step):
        self.uses[step.experts] += 1

    def victim(self, layer, incoming, candidates):
        return int(candidates[np.argmin(self.uses[candidates])])

    def prefetch(self, step, keys):
        keys[:2] = step.experts[:2]
        return min(self.n, 2)
'''


def trace(name: str = "t.parquet") -> Path:
    """A small trace."""
    return random_trace(Path(name), n_tokens=12)


def written(name: str, data: bytes) -> Callable[[], object]:
    """Writes one file."""
    return lambda: Path(name).write_bytes(data)


def profile() -> None:
    """A trace, and a machine's profile."""
    trace()
    shutil.copy(PROFILE, "m.toml")


def grid() -> None:
    """A trace, and a grid of a sweep."""
    trace()
    Path("g.toml").write_text(GRID)


def config() -> None:
    """A model, and options of a run in a file."""
    bundled()
    Path("run.toml").write_text(CONFIG)


def policy() -> None:
    """A trace, and a policy in a file."""
    trace()
    Path("mine.py").write_text(POLICY)


def budget() -> None:
    """A model, and a memory budget in a file."""
    bundled()
    Path("budget.bin").write_text("400MiB\n")


def fitted() -> None:
    """A trace, and what a policy was fitted with."""
    random_trace(Path("t.parquet"), n_tokens=40)
    _run("moesim", "fit", "flashmoe", "--trace", "t.parquet", "--share", "1", "-o", "p.safetensors")


def learned() -> None:
    """A model, and what a policy has learned while it ran."""
    bundled()
    _run("moerun", "generate", "--model", "model", "--store", "packed", "--prompt", TEXT,
         "--policy", "foresight", "--max-new-tokens", "30", "--learned", "l.safetensors",
         "--device", "cpu")  # fmt: skip


def counts() -> None:
    """A trace, and counts of uses as SGLang writes them."""
    trace()
    Path("c.json").write_text(json.dumps({"logical_count": [[[3, 1, 2, 4]] * 2]}))


def foreign_parquet() -> None:
    """A Parquet file of another recorder."""
    from support.recorders import parquet

    Path("r.parquet").write_bytes(parquet())


def cache_eval() -> None:
    """A folder of moe-cache-eval."""
    from support import recorders

    recorders.cache_eval(Path("folder"))


def packed_lines() -> None:
    """JSON lines in a gzip file."""
    Path("r.gz").write_bytes(gzip.compress(FILES["policylang"][2]))


def corpus() -> None:
    """A text, and texts in JSON lines."""
    Path("lines.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(3)))
    Path("text.bin").write_text(TEXT)


def checkpoint() -> None:
    """A checkpoint of two layers in two shards."""
    from support.checkpoints import make_checkpoint, shard

    make_checkpoint("mixtral", Path("model"))
    shard(Path("model"))
    _write_evil()


def published() -> None:
    """A checkpoint whose experts are FP8 blocks."""
    from support.published import formats, publish

    publish(formats()["fp8-block"], Path("model"), Path("plain"))
    shutil.rmtree("plain")
    _write_evil()


def gguf() -> None:
    """A GGUF file with the bundled model's tokenizer."""
    from gguf.constants import GGMLQuantizationType as Kind
    from support.gguf_files import Converter

    bundled()
    Path("model").rename("checkpoint")
    made = Converter(
        Path("checkpoint"), "mixtral", lambda name: Kind.Q8_0 if ".w" in name else Kind.F32
    )
    made.write(Path("m.gguf"))
    shutil.rmtree("checkpoint")


def bundled() -> None:
    """The bundled model, with a file of code in its folder."""
    from support.stores import TINY

    shutil.copytree(TINY, "model")
    _write_evil()


def chatting() -> None:
    """The bundled model with a chat template."""
    bundled()
    Path("model/chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )


def store() -> None:
    """A store of packed experts."""
    from moerun.checkpoint.hub import resolve
    from moerun.store.pack import pack

    bundled()
    pack(resolve("model"), Path("store"), precision="4bit")


def pack_cut_short() -> None:
    """What a pack leaves that was killed when it was nearly done."""
    checkpoint()
    with _cut_short("moerun.store.pack_folder.PartialFolder.become_store"):
        _run("moerun", "pack", "model", "--out", "out", "--precision", "bf16", "--workers", "1",
             ends=INTERRUPTED)  # fmt: skip
    assert Path("out.partial").is_dir()


def record_cut_short() -> None:
    """What a recording leaves that was killed before it was whole."""
    corpus()
    with _cut_short("moeroute.writer.join_parts"):
        _run("moetrace", "record", "lines.jsonl", "--field", "text", "--out", "o.parquet",
             ends=INTERRUPTED)  # fmt: skip
    assert Path("o.parquet.partial").is_dir()


def sweep_cut_short() -> None:
    """What a sweep leaves that was killed before its result was written."""
    grid()
    with _cut_short("moesim.sweep.run.write"):
        _run("moesim", "sweep", "--grid", "g.toml", "--out", "o.csv", "--workers", "1",
             ends=INTERRUPTED)  # fmt: skip
    assert Path("o.csv.partial").is_dir()


def swept() -> None:
    """A sweep's result, to which another sweep adds."""
    grid()
    _run("moesim", "sweep", "--grid", "g.toml", "--out", "o.csv", "--workers", "1")


def perplexities() -> None:
    """Results of `moerun perplexity`, which another run goes on with."""
    bundled()
    Path("text.txt").write_text(TEXT * 3)
    command = "perplexity text.txt --model model --attention native --experts native --context 16"
    _run("moerun", *command.split(), "--tokens", "32", "--out", "p.jsonl")


def _write_evil() -> None:
    Path("model", EVIL).write_text(EVIL_CODE)


def _run(*command: str, ends: int = 0) -> None:
    from stress.files import call

    code, trace = call(command)
    assert code == ends, (command, code, trace)


def _cut_short(function: str) -> Any:
    """Whoever calls ``function`` is interrupted."""
    return patch(function, side_effect=KeyboardInterrupt)
