"""Commands that write files, and what they read, as small or as long as a campaign needs them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.traces import random_trace

WORDS = ("the", "of", "a", "tale", "two", "cities", "best", "worst", "times", "age", "was", "it")
PROFILE = Path(__file__).parents[2] / "simulator/moesim/machines/t4.toml"


@dataclass(frozen=True)
class Work:
    """A command that writes ``outputs``, in a folder that ``make`` has filled.

    ``again`` are the arguments that take it up after a kill. An output may be a folder. ``grows``
    names outputs that are whole line by line. ``keeps`` are the names of what an unfinished command
    may leave: what it goes on from. ``cache`` is the name of its cache's folder, where it has one
    of its own. ``varies`` names outputs that depend on what threads do when: whole JSON will do.
    ``scratch`` is the name of the folder for what it keeps elsewhere while it runs, if it does.
    Processes that it starts may take ``orphans_s`` to end after it.
    """

    make: Callable[[Path], object]
    command: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    grows: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    cache: str = ""
    varies: tuple[str, ...] = ()
    scratch: str = ""
    orphans_s: float = 10.0

    def env(self, folder: Path, home: Path) -> dict[str, str]:
        """Variables of the command: where its cache is, and its scratch. Ray's own files are where
        they are without us: the names of its sockets must be short."""
        found = {"XDG_CACHE_HOME": str(folder / self.cache if self.cache else home)}
        if self.scratch:
            found |= {"TMPDIR": str(folder / self.scratch), "RAY_TMPDIR": tempfile.gettempdir()}
        return found

    def is_begun(self, folder: Path) -> bool:
        """Whether there is something to take up, by the names of what is there."""
        return bool(self.again) and any((folder / name).exists() for name in self.keeps)

    def is_there(self, folder: Path) -> bool:
        """Whether every output is."""
        return all((folder / name).exists() for name in self.outputs)

    def digests(self, folder: Path) -> dict[str, str]:
        """SHA-256 of the outputs' files, by name."""
        return {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in files_of(folder)
            if self.is_output(name)
        }

    def is_output(self, name: str) -> bool:
        """Whether a file is an output, or in one that is a folder."""
        return any(name == out or name.startswith(f"{out}/") for out in self.outputs)

    def damage(self, folder: Path, whole: Path, before: Path | None = None) -> str:
        """What of the outputs in ``folder`` is neither absent nor as in ``whole``; "": nothing.

        They may also be those in ``before``, which the command replaces. A folder among the outputs
        is there with all its files or not at all.
        """
        right, found = self.digests(whole), self.digests(folder)
        if before is not None and found and found == self.digests(before):
            return ""  # what there was
        for name, digest in found.items():
            if digest == right.get(name):
                continue
            if name in self.varies and _is_json(folder / name):
                continue
            if name in self.grows and name in right and _begins(folder / name, whole / name):
                continue
            return f"{name} has other bytes" if name in right else f"{name} should not be there"
        for out in self.outputs:
            lost = {n for n in right if n.startswith(f"{out}/")} - found.keys()
            if lost and (folder / out).exists():
                return f"{out} is there without {sorted(lost)[0]}"
        return ""


def fresh_folder(root: Path, name: str, work: Work) -> Path:
    """The folder ``NAME.fresh`` below ``root`` with what a work begins with, made once."""
    fresh = root / f"{name}.fresh"
    if not fresh.exists():
        making = root / f"{name}.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        work.make(making)
        making.rename(fresh)
    return fresh


def files_of(folder: Path) -> list[str]:
    """The names of the files below a folder."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _begins(part: Path, whole: Path) -> bool:
    """Whether a file of lines is the first lines of another."""
    lines = part.read_bytes().splitlines(keepends=True)
    return lines == whole.read_bytes().splitlines(keepends=True)[: len(lines)]


def _text(n_words: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        words = random.Random(1).choices(WORDS, k=n_words)
        (folder / "corpus.txt").write_text(" ".join(words))

    return make


def _numbers(n: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        rng = np.random.default_rng(1)
        np.savez(
            folder / "r.npz",
            ids=rng.permuted(np.tile(np.arange(8, dtype=np.int16), (n, 4, 1)), axis=2)[:, :, :2],
            seq=np.zeros(n, int),
            pos=np.arange(n),
            phase=np.ones(n, int),
        )

    return make


def _nothing(folder: Path) -> None:
    pass


def _longer_trace(folder: Path) -> None:
    random_trace(folder / "t.parquet", n_tokens=400, n_experts=8)
    (folder / "scratch").mkdir()


def _trace(folder: Path) -> None:
    random_trace(folder / "t.parquet", n_tokens=40)
    shutil.copy(PROFILE, folder / "m.toml")


def small_model(folder: Path) -> None:
    """A Mixtral of 2 layers of 4 experts, with the bundled model's tokenizer."""
    from moerun.checkpoint.hub import resolve
    from support.moe_models import random_model, save_checkpoint

    sizes = {
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "vocab_size": 5000,
        "intermediate_size": 128,
    }
    tiny = resolve("tiny")
    save_checkpoint(random_model("mixtral", **sizes), tiny, folder / "model")


def _model_and_text(folder: Path) -> None:
    small_model(folder)
    _text(200)(folder)


def _store(folder: Path, name: str = "store", precision: str = "4bit") -> None:
    from moerun.store.pack import pack

    small_model(folder)
    pack(folder / "model", folder / name, precision=precision).close()
    shutil.rmtree(folder / "model")


def _old_store(folder: Path) -> None:
    _store(folder, "out", "3bit")
    small_model(folder)


def _fitted(folder: Path) -> None:
    from moesim.cli import app

    _trace(folder)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        app(["fit", "flashmoe", "--trace", "t.parquet", "--share", "1", "-o", "p.safetensors"],
            standalone_mode=False)  # fmt: skip


PACK = ("moerun", "pack", "model", "--out", "out", "--workers", "1", "--precision")
SAY = ("moerun", "generate", "--prompt", "It was", "--max-new-tokens", "3", "--device", "cpu",
       "--slots", "2", "--format", "json")  # fmt: skip
SWEEP = ("moesim", "sweep", "lru", "lfu", "--trace", "t.parquet", "--slots", "2,3", "--machine",
         "m.toml", "--engine", "simpy", "--workers", "1", "--out")  # fmt: skip
RECORD = ("moetrace", "record", "corpus.txt", "--model", "model", "--out", "t.parquet",
          "--tokens", "96", "--sequence-length", "32", "--batch-tokens", "32")  # fmt: skip
PERPLEXITY = ("moerun", "perplexity", "corpus.txt", "--model", "model", "--attention", "native",
              "--experts", "native,4bit", "--context", "32", "--tokens", "96", "--out",
              "p.jsonl")  # fmt: skip

SMALL: dict[str, Work] = {
    "record": Work(_model_and_text, RECORD, ("t.parquet",), ("--resume",),
                   keeps=("t.parquet.partial",)),
    "import npz": Work(_numbers(60), ("moetrace", "import", "r.npz", "--out", "t.parquet"),
                       ("t.parquet",), keeps=("t.parquet.partial",)),
    "export": Work(_trace, ("moetrace", "export", "t.parquet", "--to", "npz", "--out", "t.npz"),
                   ("t.npz",)),
    "stats": Work(_trace, ("moetrace", "stats", "t.parquet")),
    "compare": Work(_trace, ("moesim", "compare", "lru", "belady", "--slots", "2,3", "--engine",
                             "simpy", "--trace", "t.parquet", "--machine", "m.toml",
                             "--out", "c.parquet"), ("c.parquet",)),
    "compare fitted": Work(_fitted, ("moesim", "compare", "flashmoe:params=p.safetensors",
                                     "--slots", "2", "--fitted-too", "--trace", "t.parquet",
                                     "--engine", "simpy", "--out", "c.csv"), ("c.csv",)),
    "sweep": Work(_trace, (*SWEEP, "s.parquet"), ("s.parquet",), ("--resume",),
                  keeps=("s.parquet.partial",)),
    "fit": Work(_trace, ("moesim", "fit", "flashmoe", "--trace", "t.parquet", "--share", "1",
                         "--out", "p.safetensors"), ("p.safetensors",)),
    "pack": Work(small_model, (*PACK, "4bit"), ("out",), keeps=("out.partial",)),
    "pack attention": Work(small_model, (*PACK, "native", "--attention", "4bit"), ("out",),
                           keeps=("out.partial",)),
    "pack anew": Work(_old_store, (*PACK, "4bit", "--force"), ("out",),
                      keeps=("out.partial",)),
    "generate": Work(_store, (*SAY, "--model", "store", "--record", "t.parquet",
                              "--journal", "j.json"), ("t.parquet", "j.json"),
                     keeps=("t.parquet.partial",), varies=("j.json",)),
    "generate packing": Work(small_model, (*SAY, "--model", "model", "--store", "packed",
                                           "--precision", "3bit"), ("packed",),
                             keeps=("packed.partial",)),
    "perplexity": Work(_model_and_text, PERPLEXITY, ("p.jsonl",), grows=("p.jsonl",),
                       keeps=("p.jsonl.windows", "cache"), cache="cache"),
}  # fmt: skip

MANY_POINTS = ("moesim", "sweep", "lru", "lfu", "arc", "--trace", "t.parquet", "--slots",
               "1,2,3,4,5,6", "--machine", "t4,a100", "--engine", "simpy", "--workers", "2",
               "--out", "s.parquet")  # fmt: skip

LONG: dict[str, Work] = {
    "record": Work(
        _text(4000),
        ("moetrace", "record", "corpus.txt", "--model", "tiny", "--out", "t.parquet",
         "--tokens", "1200", "--sequence-length", "64", "--batch-tokens", "128"),
        ("t.parquet",), ("--resume",), keeps=("t.parquet.partial",)),
    "import": Work(_numbers(60_000), ("moetrace", "import", "r.npz", "--out", "t.parquet"),
                   ("t.parquet",), keeps=("t.parquet.partial",)),
    "export": Work(_nothing, ("moetrace", "export", "tiny", "--to", "npz", "--out", "t.npz"),
                   ("t.npz",)),
    "pack": Work(
        _nothing,
        ("moerun", "pack", "tiny", "--out", "store", "--precision", "3bit", "--workers", "2"),
        ("store",), keeps=("store.partial",)),
    "fit": Work(
        _nothing, ("moesim", "fit", "moe-infinity", "--trace", "tiny", "--out", "p.safetensors"),
        ("p.safetensors",)),
    "sweep": Work(_longer_trace, MANY_POINTS, ("s.parquet",), ("--resume",),
                  keeps=("s.parquet.partial",)),
    # A Ray of its own, whose processes its driver ends (CLEAN_S twice) when it finds itself alone.
    "sweep on ray": Work(_longer_trace, (*MANY_POINTS, "--on", "ray"), ("s.parquet",),
                         ("--resume",), keeps=("s.parquet.partial",), scratch="scratch",
                         orphans_s=60.0),
    "perplexity": Work(
        _text(4000),
        ("moerun", "perplexity", "corpus.txt", "--attention", "native", "--experts", "native,4bit",
         "--context", "128", "--tokens", "1500", "--out", "p.jsonl"),
        ("p.jsonl",), grows=("p.jsonl",), keeps=("p.jsonl.windows",)),
    "generate": Work(
        _nothing,
        ("moerun", "generate", "--prompt", "It was the best of times", "--max-new-tokens", "60",
         "--slots", "2", "--seed", "3", "--record", "t.parquet", "--journal", "j.json"),
        ("t.parquet", "j.json"), keeps=("t.parquet.partial",), varies=("j.json",)),
}  # fmt: skip
"""The same as in use: seconds long, mostly on the bundled model."""
