"""The files of a folder that hold a checkpoint's weights, and what a folder without weights
holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from moeroute.jsontext import parse_json

from moerun.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_SMALL = (".json", ".txt", ".model", ".jinja")
_OTHERS = (".h5", ".msgpack", ".onnx", ".npz")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_VARIANT = re.compile(
    r"model\.(\w+)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.(\w+)\.json"
)


def check_small_files(folder: Path) -> None:
    """Look at each file of configuration, tokenizer and template: transformers takes one that it
    cannot look at for absent, and does without it.

    Raises RunError that names a broken link, and OSError that names a file that cannot be read.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in _SMALL:
            if file.is_symlink() and not file.exists():
                raise _broken(file)
            file.stat()


def _broken(link: Path) -> RunError:
    return RunError(f"{link} is a broken link: {link.readlink()} is not there; download it again")


def weight_files(path: Path) -> list[str]:
    """The safetensors files of a checkpoint, sorted: those that stock transformers would choose.

    Raises RunError where there are none, that says what is there instead, or where some are
    missing, that names them.
    """
    check_small_files(path)
    single, index = path / SINGLE, path / INDEX
    if single.is_file():
        return [SINGLE]
    for file in (single, index):
        if file.is_symlink():
            raise _broken(file)
    if not index.is_file():
        raise RunError(f"{path} has no weights to read: {_instead_of_weights(path)}")
    shards = sorted(set(weight_map(path).values()))
    if missing := [name for name in shards if not (path / name).exists()]:
        raise RunError(_absent(path, shards, missing))
    return shards


def has_weights(path: Path) -> bool:
    """Whether a folder has weights in transformers' safetensors format, whole or not."""
    return any((path / name).is_file() for name in (SINGLE, INDEX))


def weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor according to the index; empty where there is no index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    try:
        named: dict[str, str] = parse_json(index.read_bytes())["weight_map"]
        whole = bool(named) and all(isinstance(file, str) for file in named.values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise RunError(f"{index} is damaged: download it again") from error
    if not whole:
        raise RunError(f"{index} is damaged (it names no files): download it again")
    return named


def _absent(path: Path, shards: list[str], missing: list[str]) -> str:
    first = path / missing[0]
    of = f"{len(missing)} of the {len(shards)} files that {INDEX} names are not there"
    if first.is_symlink():
        return f"{first} is a broken link to {first.readlink()} ({of}): download it again"
    return f"{first} is missing ({of}): the checkpoint is not complete, download it again"


def instead_of_config(path: Path) -> str:
    """What a folder without config.json seems to be, as the end of a message; empty if unknown."""
    names = _names(path)
    if (path / "config.json").is_symlink():
        return f", only a broken link to {(path / 'config.json').readlink()}: download it again"
    if "snapshots" in names:
        revisions = sorted(f.name for f in (path / "snapshots").iterdir())
        example = path / "snapshots" / (revisions[0] if revisions else "REVISION")
        return f"; it is a folder of the hub's cache: give {example}"
    found = _known_kind(path, names) or _consolidated(names)
    return f"; {found}" if found else ""


def _instead_of_weights(path: Path) -> str:
    names = _names(path)
    if shards := [match for name in names if (match := _SHARD.fullmatch(name))]:
        of = int(shards[0][2])
        return (
            f"it has {len(shards)} of {of} files model-*-of-{shards[0][2]}.safetensors, but not "
            f"the index that says what they hold: download {INDEX} as well"
        )
    if variants := [match for name in names if (match := _VARIANT.fullmatch(name))]:
        named = variants[0][1] or variants[0][3]
        return (
            f"it has only the variant {named!r} ({variants[0][0]}): download the files without "
            f"{named!r} in their names, or link each of these under its name without it"
        )
    found = _known_kind(path, names) or _consolidated(names)
    if found:
        return found
    if pickles := [name for name in names if name.endswith(_PICKLED)]:
        return (
            f"it has its weights only as pickles ({pickles[0]}), which can run code when read: "
            "give a checkpoint in safetensors format"
        )
    wanted = f"there is neither {SINGLE} nor {INDEX}"
    if others := [name for name in names if name.endswith((".safetensors", *_OTHERS))]:
        return f"{wanted}, only {others[0]}: give a checkpoint in transformers' safetensors format"
    return wanted


def _known_kind(path: Path, names: list[str]) -> str | None:
    if "adapter_config.json" in names:
        adapter = _read(path / "adapter_config.json")
        kind, base = adapter.get("peft_type", "PEFT"), adapter.get("base_model_name_or_path")
        return (
            f"it is a {kind} adapter of {base or 'another model'}, not a whole model: merge it "
            "into that model (PEFT's merge_and_unload) and give the result"
        )
    if files := [name for name in names if name.endswith((".incomplete", ".part", ".aria2"))]:
        return f"its download is not complete ({files[0]}): finish it"
    return None


def _consolidated(names: list[str]) -> str | None:
    files = [
        n for n in names if n.startswith("consolidated") and n.endswith((".safetensors", ".pth"))
    ]
    if not files:
        return None
    return (
        f"it has its weights in their maker's own format ({files[0]}): download the model-*."
        f"safetensors files and {INDEX} of transformers' format instead"
    )


def _names(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def _read(file: Path) -> dict[str, Any]:
    try:
        described = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return described if isinstance(described, dict) else {}
