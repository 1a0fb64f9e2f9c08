"""Finds a checkpoint: the bundled model by name, a local folder, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from moerun.checkpoint.folder import has_weights, instead_of_config
from moerun.checkpoint.gguf.files import find_gguf, model_headers
from moerun.checkpoint.gguf.header import is_gguf
from moerun.checkpoint.hub_config import not_on_hub
from moerun.checkpoint.local import find_local
from moerun.errors import RunError

# Everything a checkpoint needs, and no second copy of its weights in another format or folder.
_WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_UNWANTED_FILES = ["*/*", "consolidated*"]


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint, which is downloaded if it is neither bundled nor local; or
    its GGUF file, the first of those that it is split into.

    A folder whose weights are GGUF stands for that file. Raises RunError where the folder holds no
    checkpoint, or the hub cannot provide the model.
    """
    local = find_local(name_or_path)
    if local is None:
        return _download(str(name_or_path), revision)
    if local.is_dir():
        if not has_weights(local) and (gguf := find_gguf(local)) is not None:
            return gguf
        if not (local / "config.json").is_file():
            raise RunError(
                f"{local} is no checkpoint: it has no config.json{instead_of_config(local)}"
            )
        return local
    if is_gguf(local):
        return model_headers(local)[0].path
    raise RunError(
        f"{local} is a file: give the folder of a checkpoint in safetensors format, or a GGUF file"
    )


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=_WANTED_FILES,
                ignore_patterns=_UNWANTED_FILES,
            )
        )
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise not_on_hub(repository, revision) from error
    except Exception as error:  # the hub's transport library, and so its errors, changes by version
        raise RunError(
            f"model {repository!r} is not a local folder and the Hugging Face hub did not give the "
            f"model ({type(error).__name__}): check the network, or download the model elsewhere "
            "and give the folder"
        ) from error
