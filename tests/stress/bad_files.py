"""The files that the commands read, each with a command that reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.recorders import FILES

from stress import right_files as right
from stress.carriers import names_code, pickled, repacked, template
from stress.gguf_header import gguf_number
from stress.mutations import (
    BYTES,
    Mutator,
    fields,
    json_lines,
    json_text,
    npy_header,
    npy_values,
    npz_members,
    parquet_columns,
    safetensors_header,
    toml_line,
)

BY_SUFFIX: dict[str, tuple[Mutator, ...]] = {
    ".parquet": (parquet_columns, parquet_columns, *BYTES),
    ".npz": (npz_members, npz_members, pickled, *BYTES),
    ".npy": (npy_header, npy_values, pickled, *BYTES),
    ".pt": (pickled, *BYTES),
    ".safetensors": (safetensors_header, safetensors_header, pickled, *BYTES),
    ".json": (json_text, json_text, json_text, *BYTES),
    ".jsonl": (json_lines, json_lines, json_lines, *BYTES),
    ".csv": (fields, fields, *BYTES),
    ".toml": (toml_line, toml_line, toml_line, fields, *BYTES),
    ".gguf": (gguf_number, gguf_number, gguf_number, gguf_number, *BYTES),
    ".gz": (repacked, repacked, *BYTES),
    ".py": (fields, fields, *BYTES),
    ".jinja": (template, template, *BYTES),
    ".arrow": BYTES,
    ".bin": BYTES,
}


@dataclass(frozen=True)
class Case:
    """A file and the command that reads it.

    ``make`` writes the command's files into the current folder; ``target`` is the one that is
    changed, a pattern where its name is not known before; ``command`` begins with the program.
    ``said`` is on the command's stdin.
    """

    make: Callable[[], object]
    target: str
    command: tuple[str, ...]
    share: int = 1
    keeps: tuple[str, ...] = ()
    """Names of what a command that fails may leave: work that a resumed run goes on from."""
    codes: bool = False
    """Whether the target may name classes in a file of code beside it."""
    said: str = ""

    @property
    def mutators(self) -> tuple[Mutator, ...]:
        """What can be done to the target."""
        return BY_SUFFIX[Path(self.target).suffix] + (names_code,) * (3 * self.codes)

    def target_in(self, folder: Path) -> Path:
        """The file that is changed."""
        return sorted(folder.glob(self.target))[0]


PACKED = ("packed", "packed.partial")
COMPARE = ("moesim", "compare", "lru", "--slots", "2", "--engine", "simpy")
PACK = ("moerun", "pack", "model", "--out", "out", "--precision", "bf16", "--workers", "1")
RUN = ("moerun", "generate", "--prompt", "It was", "--max-new-tokens", "2", "--device", "cpu")
SAY = (*RUN, "--model", "model", "--store", "packed")
CHAT = ("moerun", "chat", "--max-new-tokens", "2", "--device", "cpu", "--model", "model",
        "--store", "packed")  # fmt: skip
SWEEP = ("moesim", "sweep", "--grid", "g.toml", "--out", "o.csv", "--workers", "1")


def _imports() -> dict[str, Case]:
    found = {}
    for what, (_, name, data, _, options) in FILES.items():
        given = []
        if options.top_k:
            given += ["--top-k", str(options.top_k)]
        if options.prompt_tokens:
            given += ["--prompt-tokens", str(options.prompt_tokens)]
        command = ("moetrace", "import", name, "--out", "out.parquet", *given)
        found[f"import {what}"] = Case(right.written(name, data), name, command, share=3)
    return found


TRACES = {
    "trace": Case(right.trace, "t.parquet", ("moetrace", "stats", "t.parquet"), share=10),
    "trace compared": Case(right.trace, "t.parquet", (*COMPARE, "--trace", "t.parquet"), share=8),
    "trace exported": Case(
        right.trace,
        "t.parquet",
        ("moetrace", "export", "t.parquet", "--to", "npz", "--out", "o.npz"),
        share=3,
    ),
    "counts": Case(
        right.counts,
        "c.json",
        ("moesim", "compare", "static", "--slots", "2", "--trace", "t.parquet", "--engine",
         "simpy", "--calibration", "c.json"),
        share=5,
    ),
    **_imports(),
    "import parquet": Case(
        right.foreign_parquet,
        "r.parquet",
        ("moetrace", "import", "r.parquet", "--out", "out.parquet"),
        share=6,
    ),
    "import folder's manifest": Case(
        right.cache_eval,
        "folder/manifest.json",
        ("moetrace", "import", "folder", "--out", "out.parquet"),
        share=2,
    ),
    "import folder's events": Case(
        right.cache_eval,
        "folder/events.safetensors",
        ("moetrace", "import", "folder", "--out", "out.parquet"),
        share=2,
    ),
    "import packed lines": Case(
        right.packed_lines, "r.gz", ("moetrace", "import", "r.gz", "--out", "out.parquet"), share=2
    ),
}  # fmt: skip

SETTINGS = {
    "machine": Case(
        right.profile,
        "m.toml",
        (*COMPARE, "--trace", "t.parquet", "--machine", "m.toml"),
        share=8,
    ),
    "grid": Case(right.grid, "g.toml", SWEEP, share=1, keeps=("o.csv.partial",)),
    "run's options": Case(
        right.config, "run.toml", (*RUN[:2], "--config", "run.toml"), share=5, keeps=PACKED
    ),
    "memory budget": Case(
        right.budget, "budget.bin", (*SAY, "--memory-file", "budget.bin"), keeps=PACKED
    ),
    "params": Case(
        right.fitted,
        "p.safetensors",
        ("moesim", "compare", "flashmoe:params=p.safetensors", "--slots", "2", "--fitted-too",
         "--trace", "t.parquet", "--engine", "simpy"),
        share=8,
    ),
    "learned": Case(
        right.learned,
        "l.safetensors",
        (*SAY, "--policy", "foresight", "--learned", "l.safetensors"),
        share=3,
        keeps=PACKED,
    ),
    "policy's file": Case(
        right.policy,
        "mine.py",
        ("moesim", "compare", "mine.py:Mine", "--slots", "2", "--engine", "simpy", "--trace",
         "t.parquet"),
        share=3,
    ),
}  # fmt: skip

UNFINISHED = {
    "pack's journal": Case(
        right.pack_cut_short, "out.partial/*.jsonl", PACK, share=2, keeps=("out.partial",)
    ),
    "pack's plan": Case(
        right.pack_cut_short, "out.partial/*.json", PACK, share=2, keeps=("out.partial",)
    ),
    "recording's description": Case(
        right.record_cut_short,
        "o.parquet.partial/meta.json",
        ("moetrace", "record", "lines.jsonl", "--field", "text", "--out", "o.parquet",
         "--resume"),
        share=2,
        keeps=("o.parquet.partial",),
    ),
    "recording's part": Case(
        right.record_cut_short,
        "o.parquet.partial/*.arrow",
        ("moetrace", "record", "lines.jsonl", "--field", "text", "--out", "o.parquet",
         "--resume"),
        share=2,
        keeps=("o.parquet.partial",),
    ),
    "sweep's journal": Case(
        right.sweep_cut_short,
        "o.csv.partial/points.jsonl",
        (*SWEEP, "--resume"),
        keeps=("o.csv.partial",),
    ),
    "sweep's result": Case(
        right.swept, "o.csv", (*SWEEP, "--resume"), keeps=("o.csv.partial",)
    ),
    "perplexity's results": Case(
        right.perplexities,
        "p.jsonl",
        ("moerun", "perplexity", "text.txt", "--model", "model", "--attention", "native",
         "--experts", "native", "--context", "16", "--tokens", "32", "--out", "p.jsonl"),
        share=2,
    ),
}  # fmt: skip

MODELS = {
    "config to pack": Case(
        right.checkpoint, "model/config.json", PACK, share=4, keeps=("out.partial",), codes=True
    ),
    "index to pack": Case(
        right.checkpoint,
        "model/model.safetensors.index.json",
        PACK,
        share=4,
        keeps=("out.partial",),
    ),
    "shard to pack": Case(
        right.checkpoint,
        "model/model-00001-of-00002.safetensors",
        PACK,
        share=6,
        keeps=("out.partial",),
    ),
    "quantised config": Case(
        right.published, "model/config.json", PACK, share=3, keeps=("out.partial",)
    ),
    "quantised weights": Case(
        right.published, "model/model.safetensors", PACK, share=2, keeps=("out.partial",)
    ),
    "gguf to pack": Case(
        right.gguf,
        "m.gguf",
        ("moerun", "pack", "m.gguf", "--out", "out", "--workers", "1"),
        share=6,
        keeps=("out.partial",),
    ),
    "gguf to plan": Case(
        right.gguf, "m.gguf", ("moerun", "generate", "--model", "m.gguf", "--plan"), share=6
    ),
    "gguf to run": Case(
        right.gguf, "m.gguf", (*RUN, "--model", "m.gguf", "--store", "packed"), 3, keeps=PACKED
    ),
    "config to run": Case(
        right.bundled, "model/config.json", SAY, share=3, keeps=PACKED, codes=True
    ),
    "config to plan": Case(
        right.bundled,
        "model/config.json",
        ("moerun", "generate", "--model", "model", "--plan"),
        share=3,
        codes=True,
    ),
    "config of sizes": Case(
        right.bundled, "model/config.json", (*COMPARE, "--like", "model/config.json"), share=3
    ),
    "tokenizer": Case(
        right.bundled, "model/tokenizer.json", SAY, share=2, keeps=PACKED, codes=True
    ),
    "tokenizer's config": Case(
        right.bundled, "model/tokenizer_config.json", SAY, share=2, keeps=PACKED, codes=True
    ),
    "generation's config": Case(
        right.bundled, "model/generation_config.json", SAY, share=2, keeps=PACKED, codes=True
    ),
    "chat template": Case(
        right.chatting, "model/chat_template.jinja", CHAT, share=2, keeps=PACKED, said="Hello\n"
    ),
    "texts in JSON lines": Case(
        right.corpus,
        "lines.jsonl",
        ("moetrace", "record", "lines.jsonl", "--field", "text", "--out", "o.parquet"),
        share=2,
        keeps=("o.parquet.partial",),
    ),
    "text of any bytes": Case(
        right.corpus,
        "text.bin",
        ("moetrace", "record", "text.bin", "--out", "o.parquet"),
        keeps=("o.parquet.partial",),
    ),
    "store's index": Case(
        right.store, "store/index.json", (*RUN, "--model", "store"), share=3
    ),
    "store's records": Case(
        right.store, "store/*.safetensors", (*RUN, "--model", "store"), share=3
    ),
}  # fmt: skip

CASES: dict[str, Case] = {**TRACES, **SETTINGS, **UNFINISHED, **MODELS}

SHARES = {name: case.share for name, case in CASES.items()}
