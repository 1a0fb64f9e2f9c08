"""Folders that are no checkpoint in safetensors, or not a whole one: what is there is said."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from moerun.checkpoint.families import read_config
from moerun.checkpoint.hub import resolve
from moerun.checkpoint.weights import Checkpoint
from moerun.errors import RunError
from moerun.offload.load import load_offloaded, load_tokenizer
from moerun.store.find import find_store
from moerun.store.pack import pack
from safetensors.torch import load_file, save_file
from support import checkpoints as made
from support.runs import ResidentProvider


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made.make_checkpoint("mixtral", tmp_path / "model")


def refusal(folder: Path) -> str:
    with pytest.raises(RunError) as caught:
        pack(resolve(folder), folder.parent / "out")
    assert not list(folder.parent.glob("out*"))
    return str(caught.value)


def only(folder: Path, name: str) -> None:
    """The weights under another name, or junk where it is no safetensors file."""
    weights = folder / made.WEIGHTS
    if name.endswith(".safetensors"):
        weights.rename(folder / name)
    else:
        weights.unlink()
        (folder / name).write_bytes(b"junk")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("consolidated.safetensors", "their maker's own format (consolidated.safetensors)"),
        ("consolidated.00.pth", "their maker's own format"),
        ("model.fp16.safetensors", "only the variant 'fp16'"),
        ("model.bf16-00001-of-00002.safetensors", "only the variant 'bf16'"),
        ("pytorch_model.bin", "only as pickles (pytorch_model.bin)"),
        ("weights.gguf", "weights.gguf is no GGUF file"),
        ("model.safetensors.incomplete", "download is not complete"),
        ("diffusion.safetensors", "only diffusion.safetensors"),
        ("tf_model.h5", "only tf_model.h5"),
    ],
)
def test_weights_in_other_files_are_named(folder: Path, name: str, wanted: str) -> None:
    only(folder, name)
    assert wanted in refusal(folder)


def test_shards_without_an_index_are_counted(folder: Path) -> None:
    made.shard(folder, index=False)[1].unlink()
    said = refusal(folder)
    assert "has 1 of 2 files model-*-of-00002.safetensors, but not the index" in said
    assert "download model.safetensors.index.json" in said


def test_missing_shards_are_counted(folder: Path) -> None:
    files = made.shard(folder)
    files[1].unlink()
    assert f"{files[1]} is missing (1 of the 2 files" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "a shard", "tokenizer.json", "vocab.txt"]
)
def test_broken_links_of_a_cache_are_told(folder: Path, name: str) -> None:
    file = made.shard(folder)[0] if name == "a shard" else folder / name
    file.unlink(missing_ok=True)
    file.symlink_to("../../blobs/0123")
    said = refusal(folder)
    assert "broken link" in said
    assert "blobs/0123" in said


def test_a_tokenizer_that_cannot_be_looked_at_is_not_taken_for_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads text by another of the folder's files then, into other tokens."""
    look_at = Path.stat

    def failing(file: Path, **options: Any) -> os.stat_result:
        if file.name == "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return look_at(file, **options)

    folder = shutil.copytree(resolve("tiny"), tmp_path / "tiny")
    assert load_tokenizer(folder) is not None
    monkeypatch.setattr(Path, "stat", failing)
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        load_tokenizer(folder)


def test_a_git_lfs_pointer_is_told(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4983008904\n"
    (folder / made.WEIGHTS).write_text(pointer)
    assert "Git LFS pointer" in refusal(folder)


def test_a_folder_in_place_of_a_file_is_told(folder: Path) -> None:
    file = made.shard(folder)[0]
    file.unlink()
    file.mkdir()
    assert f"{file} cannot be read" in refusal(folder)


@pytest.mark.parametrize("held", [{}, {"a": 1}, []])
def test_an_index_that_names_no_files_is_damaged(folder: Path, held: object) -> None:
    made.shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    assert "index.json is damaged" in refusal(folder)


def test_where_there_is_one_file_and_an_index_stock_takes_the_file(folder: Path) -> None:
    whole = load_file(folder / made.WEIGHTS)
    made.shard(folder)
    save_file({n: t + 1 for n, t in whole.items()}, folder / made.WEIGHTS, {"format": "pt"})
    stock = tf.AutoModelForCausalLM.from_pretrained(folder)
    opened = Checkpoint(folder)
    assert torch.equal(opened.read("lm_head.weight"), stock.lm_head.weight)
    opened.close()


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "a/b"}'}, "a/b"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "their maker's own format"),
        ({"snapshots/abc/config.json": "{}"}, "give "),
        ({"notes.txt": ""}, "it has no config.json"),
    ],
)
def test_a_folder_without_a_config_says_what_it_is(
    tmp_path: Path, files: dict[str, str], wanted: str
) -> None:
    for name, text in files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(text)
    said = refusal(tmp_path / "model")
    assert "it has no config.json" in said
    assert wanted in said


def test_bytes_that_belong_to_no_tensor_or_two_are_damage(folder: Path) -> None:
    data = (folder / made.WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first, second = [n for n in header if n.endswith("w1.weight")][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    start = len(text).to_bytes(8, "little") + text
    (folder / made.WEIGHTS).write_bytes(start + data[8 + length :])
    assert "no whole safetensors file" in refusal(folder)


def test_a_number_too_large_for_any_file_is_damage(folder: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}'
    (folder / made.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "tensor 'a' is not described" in refusal(folder)


@pytest.mark.parametrize(
    ("model_type", "fields", "wanted"),
    [
        ("jamba", {}, "a mixture of experts (num_local_experts 8), but of a family"),
        ("marvin", {"auto_map": {"AutoConfig": "x.Y"}}, "a 'marvin' model, which is a mixture"),
        (
            "mllama",
            {"num_local_experts": None, "text_config": {"num_local_experts": 16}},
            "a mixture of experts (num_local_experts 16)",
        ),
        ("llama", {"num_local_experts": None}, "'llama' model, which is no mixture of experts"),
        (None, {}, "it has no model_type"),
    ],
)
def test_an_unsupported_family_is_told_from_a_dense_model(
    folder: Path, model_type: str | None, fields: dict[str, object], wanted: str
) -> None:
    made.change_config(folder, model_type=model_type, **fields)
    said = refusal(folder)
    assert wanted in said
    assert said.endswith("'moerun families' lists those that are supported")
    assert len(said) < 400


def test_a_config_that_transformers_cannot_build_is_one_line(folder: Path) -> None:
    made.change_config(folder, hidden_act="no-such-thing")
    said = refusal(folder)
    assert "cannot be built (KeyError: 'no-such-thing')" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "flash_attention_3"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"": "flash_attention_2"}},
        {"experts_implementation": "deepgemm"},
    ],
)
def test_what_only_other_machines_have_is_replaced(folder: Path, fields: dict[str, object]) -> None:
    stock = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    made.change_config(folder, **fields)
    notes: list[str] = []
    store = pack(folder, folder.parent / "out", report=notes.append)
    ours, _ = load_offloaded(store, "cpu", ResidentProvider(store))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock(ids).logits)
    asked = "experts_implementation" not in fields
    assert any("torch's own is used" in note for note in notes) == asked


def test_eager_attention_stays(folder: Path) -> None:
    made.change_config(folder, attn_implementation="eager")
    assert read_config(folder)._attn_implementation == "eager"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_refused_checkpoint_leaves_nothing_in_the_cache(folder: Path, cache: Path) -> None:
    made.change_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(RunError, match=r"no weights for model\.norm"):
        find_store(str(folder))
    assert not cache.exists()


def test_a_packed_one_leaves_its_store_and_no_lock(folder: Path, cache: Path) -> None:
    path = find_store(str(folder)).path
    assert list((cache / "moerun" / "stores").iterdir()) == [path]


def test_a_lock_that_cannot_be_had_leaves_nothing(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="No locks available"):
        find_store(str(folder))
    assert not cache.exists()


def deny(monkeypatch: pytest.MonkeyPatch, under: Path) -> None:
    """Nothing can be made or opened for writing under a folder (root may write anywhere)."""

    def denied(real: Callable[..., object]) -> Callable[..., object]:
        def call(self: Path, *arguments: object, **named: object) -> object:
            writes = not arguments or arguments[0] != "r"
            if writes and self.is_relative_to(under):
                raise PermissionError(13, os.strerror(13), str(self))
            return real(self, *arguments, **named)

        return call

    for name in ("mkdir", "open"):
        monkeypatch.setattr(Path, name, denied(getattr(Path, name)))


def test_a_cache_that_is_read_only_says_store(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deny(monkeypatch, cache)
    with pytest.raises(RunError, match=r"cache/moerun/stores \(Permission denied\).*--store"):
        find_store(str(folder))


def test_a_store_in_a_cache_that_is_read_only_is_used(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = find_store(str(folder)).path
    monkeypatch.setattr("moerun.store.find._locked", None)
    assert find_store(str(folder)).path == path
