"""The reader's own files, which the commands of the pages name: each made when first asked for."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind
from moepolicy import find_policy
from moepolicy.fitted import write_fitted
from moeroute import open_trace
from moerun.checkpoint.hub import resolve
from moerun.store.pack import pack
from moesim.fitting import fit
from moesim.sweep.grid import make_grid
from moesim.sweep.run import run_sweep
from transformers import AutoModelForImageTextToText

from support import published
from support.families import small_config
from support.gguf_files import Converter
from support.moe_models import save_checkpoint
from support.pages import pages, snippet
from support.recorders import IDS, P, T, npz, sglang_answer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. "
# What stands for the reader's own files and models.
PLACEHOLDERS = {
    **{"CORPUS": "text.txt", "TEXT": "text.txt", "M": "tiny", "CHECKPOINT": "tiny"},
    **{"T": "t.parquet", "T.parquet": "t.parquet", "TRACE.parquet": "trace.parquet"},
    **{"mistralai/Mixtral-8x7B-Instruct-v0.1": "tiny", "Qwen/Qwen3.6-35B-A3B": "qwen36-published"},
    **{"openai/gpt-oss-20b": "gpt-oss-published", "OWNER/NAME": "tiny", "my-texts/": "folder/"},
    **{"FILE": "recording.json", "MODEL.gguf": "tiny.gguf", "OUT.parquet": "out.parquet"},
}


def _text(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT * 20)


def _prompt(folder: Path) -> None:
    (folder / "prompt.txt").write_text("Once upon a time")


def _folder(folder: Path) -> None:
    (folder / "folder").mkdir()
    (folder / "folder" / "more.txt").write_text(TEXT[::-1] * 10)


def _lines(folder: Path) -> None:
    (folder / "lines.jsonl").write_text(json.dumps({"text": TEXT * 5}) + "\n")


def _policy(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        page = pages()["docs/policy-interface.md"]
        (folder / name).write_text(snippet(page, "# mine.py"))

    return make


def _answer(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).write_text(json.dumps(sglang_answer()))

    return make


def _qwen_answer(folder: Path) -> None:
    """SGLang's answer of a model of Qwen3-30B-A3B's shape."""
    ids = np.random.default_rng(0).random((8, 48, 128)).argsort(-1)[..., :8].astype("<i4")
    answer = sglang_answer()
    answer["meta_info"] = {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "routed_experts": base64.b64encode(ids.tobytes()).decode(),
    }
    (folder / "qwen.json").write_text(json.dumps(answer))


def _arrays(folder: Path) -> None:
    phase = np.array([0] * P + [1] * (T - P))
    made = npz(ids=IDS, seq=np.zeros(T, int), pos=np.arange(T), phase=phase)
    (folder / "run.npz").write_bytes(made)


def _options(folder: Path) -> None:
    (folder / "run.toml").write_text('model = "tiny"\nmemory = "300MiB"\nmax-new-tokens = 20\n')


def _fitted(folder: Path) -> None:
    fitting = fit(find_policy("promoe"), open_trace("tiny"))
    write_fitted(folder / "promoe.safetensors", fitting.arrays, fitting.of)


def _store(folder: Path) -> None:
    pack(resolve("tiny"), folder / "store", precision="2bit")


def _mixtral(folder: Path) -> None:
    """The bundled model as the guide packs Mixtral-8x7B: published in the same layout."""
    pack(resolve("tiny"), folder / "mixtral", precision="3bit", attention="4bit")


def _recommended(name: str, **options: str) -> Callable[[Path], None]:
    """What `moesim recommend --config` writes for the guide's model."""

    def make(folder: Path) -> None:
        options_of_all = {"policy": "class-lru", "memory": "10GiB"} | options
        lines = [f'{option} = "{value}"' for option, value in options_of_all.items()]
        (folder / name).write_text("\n".join([*lines, "context = 4096", ""]))

    return make


def _qwen_published(folder: Path) -> None:
    """A small checkpoint of the family, in the layout of Qwen/Qwen3.6-35B-A3B: text and images."""
    config = small_config("qwen3_5_moe")
    config.text_config.vocab_size = 4096
    config.text_config.moe_intermediate_size = 64  # a group of 4 bits
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    save_checkpoint(model, resolve("tiny"), folder / "qwen36-published")


def _qwen(folder: Path) -> None:
    if not (folder / "qwen36-published").exists():
        _qwen_published(folder)
    pack(folder / "qwen36-published", folder / "qwen36", precision="4bit")


def _gpt_oss_published(folder: Path) -> None:
    """In the layout of openai/gpt-oss-20b: experts in MXFP4."""
    made = published.publish_gpt_oss(
        folder / "gpt-oss-published", folder / "plain", vocab_size=4096
    )
    for file in resolve("tiny").glob("*token*.json"):
        shutil.copy(file, made)


def _gpt_oss(folder: Path) -> None:
    if not (folder / "gpt-oss-published").exists():
        _gpt_oss_published(folder)
    pack(folder / "gpt-oss-published", folder / "gpt-oss")


def _sweep(folder: Path) -> None:
    run_sweep(make_grid({"policies": ["lru"], "slots": [2, 4]}), str(folder / "sweep.parquet"))


def _trace(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        shutil.copyfile(open_trace("tiny").path, folder / name)

    return make


def _grid(folder: Path) -> None:
    """A grid of a few points, in place of the page's, which has every entry there is."""
    (folder / "grid.toml").write_text('policies = ["lru", "lfu"]\nslots = [2, 4]\n')


def _gguf(folder: Path) -> None:
    shutil.copytree(resolve("tiny"), folder / "tiny-hf")
    converter = Converter(folder / "tiny-hf", "mixtral", lambda _name: Kind.F16)
    converter.write(folder / "tiny.gguf")


MAKERS: dict[str, Callable[[Path], None]] = {
    "answers.json": _answer("answers.json"),
    "folder": _folder,
    "grid.toml": _grid,
    "lines.jsonl": _lines,
    "mine.py": _policy("mine.py"),
    "mixtral": _mixtral,
    "gpt-oss": _gpt_oss,
    "gpt-oss-published": _gpt_oss_published,
    "mixtral.toml": _recommended("mixtral.toml", precision="3bit", attention="4bit"),
    "my_policy.py": _policy("my_policy.py"),
    "promoe.safetensors": _fitted,
    "prompt.txt": _prompt,
    "qwen.json": _qwen_answer,
    "qwen.toml": _recommended("qwen.toml", precision="4bit", machine="rtx4070"),
    "qwen36": _qwen,
    "qwen36-published": _qwen_published,
    "recording.json": _answer("recording.json"),
    "run.npz": _arrays,
    "run.toml": _options,
    "store": _store,
    "sweep.parquet": _sweep,
    "t.parquet": _trace("t.parquet"),
    "text.txt": _text,
    "tiny.gguf": _gguf,
    "trace.parquet": _trace("trace.parquet"),
}


def lay_out(kit: Path, into: Path, names: tuple[str, ...]) -> None:
    """Copies files of the kit into a folder; what is not in the kit yet is made."""
    for name in names:
        source = kit / name
        if not source.exists():
            MAKERS[name](kit)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, into / name)
