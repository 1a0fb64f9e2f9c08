"""Whether a model's name can mean anything, known before a library is imported."""

from __future__ import annotations

from pathlib import Path

from moeroute.models import published

from moerun.checkpoint.folder import instead_of_config
from moerun.errors import RunError, UsageError

TINY = "tiny"
BUNDLED = {TINY: Path(__file__).parents[1] / "models" / "tiny"}


def find_local(name_or_path: str | Path) -> Path | None:
    """The folder or file of a model that is bundled or local; None for a name on the hub.

    Raises RunError where there is no such folder, UsageError for a name that is no model's.
    """
    name = str(name_or_path)
    local = BUNDLED.get(name, Path(name).expanduser())
    if local.exists():
        return local
    if name.startswith((".", "/", "~")) or name.endswith(("/", ".gguf")):
        what = "file" if name.endswith(".gguf") else "folder"
        raise RunError(f"there is no model {name!r}: there is no such {what}")
    if name in published():
        raise RunError(
            f"there are no weights of {name!r} here: the name serves --plan and 'moerun bench' "
            "alone; give a local folder, a GGUF file, or owner/name on the Hugging Face hub"
        )
    if name.count("/") != 1:
        raise (RunError if "/" in name else UsageError)(
            f"there is no model {name!r}: give {TINY!r} (bundled), a local folder, a GGUF file, "
            "or owner/name of a model on the Hugging Face hub"
        )
    return None


def check_there(name_or_path: str | Path) -> None:
    """RunError where there is no such model, or its folder is no checkpoint: before a library is
    imported, which takes seconds."""
    local = find_local(name_or_path)
    if local is not None and local.is_dir():
        check_folder(local)


def check_folder(folder: Path) -> None:
    """RunError where a folder has nothing that a checkpoint or a store has."""
    if any((folder / name).is_file() for name in ("config.json", "index.json")):
        return
    if not any(folder.glob("*.gguf")):
        raise RunError(
            f"{folder} is no checkpoint: it has no config.json{instead_of_config(folder)}"
        )
