"""The configuration of a model on the Hugging Face hub, without its weights: a few kB."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from moerun.errors import RunError

_CONNECT_S = 10.0
CONFIG = "config.json"


def fetch_config(repository: str, revision: str | None = None) -> Path:
    """The folder, in the hub's cache, with the config.json of a repository, fetched if it is not
    there; no other file is fetched.

    Raises RunError where the hub has no such model, it has no config.json, or there is no network.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every attempt
    offline = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    try:
        return Path(
            hf_hub_download(repository, CONFIG, revision=revision, local_files_only=offline)
        ).parent
    except LocalEntryNotFoundError as error:
        raise _no_answer(repository, error) from error
    except EntryNotFoundError as error:
        raise RunError(
            f"model {repository!r} on the Hugging Face hub has no {CONFIG} (a repository of GGUF "
            "files has none): give the repository of the original model, or a downloaded GGUF file"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise not_on_hub(repository, revision) from error
    except Exception as error:  # the hub's transport library, and so its errors, changes by version
        raise _no_answer(repository, error) from error


def _answers(endpoint: str) -> bool:
    """False where nobody can be reached at the hub's address: its client would try for half a
    minute. A proxy may reach who cannot be reached directly."""
    if getproxies():
        return True
    parts = urlsplit(endpoint)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


def not_on_hub(repository: str, revision: str | None) -> RunError:
    """The error of a model that the hub does not have, or does not show."""
    at = f" at revision {revision!r}" if revision else ""
    return RunError(
        f"the Hugging Face hub has no model {repository!r}{at}, or gives you no access: "
        "check the name, or log in if the model is gated"
    )


def _no_answer(repository: str, error: Exception) -> RunError:
    return RunError(
        f"the Hugging Face hub did not give the {CONFIG} of {repository!r} "
        f"({type(error).__name__}): check the network, or download that file elsewhere and give "
        "its path"
    )
