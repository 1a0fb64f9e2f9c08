"""Finding a checkpoint: the bundled model by name, a local folder, or one of the hub."""

from __future__ import annotations

from pathlib import Path

from moerun.checkpoint.folder import instead_of_config
from moerun.errors import RunError

TINY = "tiny"
_BUNDLED = {TINY: Path(__file__).parents[1] / "models" / "tiny"}
# Everything a checkpoint needs, and no second copy of its weights in another format or folder.
_WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_UNWANTED_FILES = ["*/*", "consolidated*"]


def resolve(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """The local folder that holds a checkpoint, downloaded where it is neither bundled nor local.

    Raises RunError when the folder holds no config.json or the hub cannot give the model.
    """
    name = str(name_or_path)
    local = _BUNDLED.get(name, Path(name).expanduser())
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise RunError(
                f"{local} is no checkpoint: it has no config.json{instead_of_config(local)}"
            )
        return local
    if local.exists():
        what = "a GGUF file, which is not read" if local.suffix == ".gguf" else "a file"
        raise RunError(f"{local} is {what}: give the folder of a checkpoint in safetensors format")
    if name.startswith((".", "/", "~")) or name.endswith("/"):
        raise RunError(f"there is no model {name!r}: there is no such folder")
    if name.count("/") != 1:
        raise RunError(
            f"there is no model {name!r}: give {TINY!r} (bundled), a local folder, "
            "or owner/name of a model on the Hugging Face hub"
        )
    return _download(name, revision)


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
        at = f" at revision {revision!r}" if revision else ""
        raise RunError(
            f"the Hugging Face hub has no model {repository!r}{at}, or gives you no access: "
            "check the name, or log in if the model is gated"
        ) from error
    except Exception as error:  # the hub's transport library, and so its errors, changes by version
        raise RunError(
            f"model {repository!r} is not a local folder and the Hugging Face hub did not give the "
            f"model ({type(error).__name__}): check the network, or download the model elsewhere "
            "and give the folder"
        ) from error
