"""From a model's name to its expert store: an existing one, or one packed on first use."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moerun.checkpoint.hub import resolve
from moerun.checkpoint.opening import open_weights
from moerun.errors import RunError, UsageError
from moerun.format.precision import NATIVE, PRECISIONS, Precisions
from moerun.store.expert_store import ExpertStore
from moerun.store.index import FORMAT_VERSION, INDEX_FILE
from moerun.store.pack import pack
from moerun.store.pack_folder import PLAN_FILE
from moerun.store.progress import Notify, RecordProgress


def find_store(
    model: str,
    *,
    precision: str = NATIVE,
    attention: str = NATIVE,
    folder: Path | None = None,
    report: Notify | None = None,
    progress: RecordProgress | None = None,
) -> ExpertStore:
    """The store of ``model`` (a store's folder, or what ``hub.resolve`` takes).

    A checkpoint is packed into ``folder``, or into the user's cache, unless that is done already.
    Files that other stores in its parent folder have in the same form are shared with them.
    ``report`` is told when it must be packed. Raises RunError where there is no such model,
    ``folder`` holds another one, or the pack cannot be made.
    """
    precisions = Precisions.chosen(precision, attention, None)
    if is_store(Path(model).expanduser()):
        return _of_precision(ExpertStore.open(model), precision, attention)
    checkpoint = resolve(model)
    digest = _digest(checkpoint)
    place = folder or cache_folder() / _store_name(model, digest, precisions)
    if is_store(place):  # first without the lock, which a cache that is read-only could not hold
        return _of_precision(_of_model(_reopen(place), checkpoint), precision, attention)
    with _locked(place):
        if is_store(place):
            return _of_precision(_of_model(_reopen(place), checkpoint), precision, attention)
        if report:
            report(
                f"packing {model} ({_described(precisions)}) into {place}; "
                "the next run will find the store there"
            )
        return pack(
            checkpoint,
            place,
            precision=precision,
            attention=attention,
            name=_name(model),
            reuse=stores_in(place.parent),
            report=report,
            progress=progress,
        )


def find_lower_store(
    model: str,
    low: str,
    *,
    report: Notify | None = None,
    progress: RecordProgress | None = None,
) -> ExpertStore:
    """The second store that ``low`` names: ``model`` at that precision, or a store's folder.

    ``report`` and ``progress`` as for `find_store`. Raises UsageError where ``low`` is neither,
    RunError where ``model`` is a store already, which cannot be packed again.
    """
    if low not in PRECISIONS:
        if not is_store(Path(low).expanduser()):
            raise UsageError(
                f"--low {low} is neither a precision ({', '.join(PRECISIONS)}) nor a store's folder"
            )
        return find_store(low)
    if is_store(Path(model).expanduser()):
        raise RunError(
            f"{model} is a packed store, which cannot be packed again at {low}: give --low the "
            "folder of a store packed from the same checkpoint"
        )
    return find_store(model, precision=low, report=report, progress=progress)


def is_store(folder: Path) -> bool:
    """Whether a folder is an expert store, whole or damaged."""
    return (folder / INDEX_FILE).is_file()


def stores_in(folder: Path) -> list[ExpertStore]:
    """The whole stores that lie in a folder; none where it is not there.

    A pack that was killed just before its end has an index, and its files are to move yet.
    """
    found = []
    for index in sorted(folder.glob(f"*/{INDEX_FILE}")):
        if index.with_name(PLAN_FILE).exists():
            continue
        with suppress(RunError):
            found.append(ExpertStore.open(index.parent))
    return found


def cache_folder() -> Path:
    """Where stores are kept that the user named no place for."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moerun" / "stores"


def _name(model: str) -> str:
    """A model's name as one would cite it: a folder's own name, not the way to it."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def _described(precisions: Precisions) -> str:
    """The experts' precision, and attention's where it is not that of the dense weights."""
    if not precisions.packs_attention:
        return precisions.expert
    return f"{precisions.expert}-attention-{precisions.attention}"


def _store_name(model: str, digest: str, precisions: Precisions) -> str:
    name = _name(model).replace("/", "--")
    return f"{name}-{digest[:16]}-{_described(precisions)}-v{FORMAT_VERSION}"


def _digest(checkpoint: Path) -> str:
    opened = open_weights(checkpoint)
    try:
        return opened.digest()
    finally:
        opened.close()


def _reopen(place: Path) -> ExpertStore:
    try:
        return ExpertStore.open(place)
    except RunError as error:
        raise RunError(
            f"{error}; remove {place}, and the next run packs the model again"
        ) from error


def _of_model(store: ExpertStore, checkpoint: Path) -> ExpertStore:
    if _digest(checkpoint) != store.index.source_digest:
        raise RunError(
            f"{store.path} is the store of another model ({store.index.model}), not of "
            f"{checkpoint}: give another --store, or --model {store.path} to run the other model"
        )
    return store


def _of_precision(store: ExpertStore, precision: str, attention: str) -> ExpertStore:
    if precision not in (NATIVE, store.index.precision):
        raise RunError(
            f"the experts in {store.path} are {store.index.precision}, not {precision}: "
            "leave --precision out, or pack the checkpoint again"
        )
    if attention not in (NATIVE, store.index.attention_precision):
        raise RunError(
            f"attention in {store.path} is {store.index.attention_precision}, not {attention}: "
            "leave --attention out, or pack the checkpoint again"
        )
    return store


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Two processes that want the same store pack it once: the second waits and finds it.

    The lock's file goes when the lock does, and with it the folders made for it that stay empty.
    """
    lock = place.with_name(f"{place.name}.lock")
    new = [folder for folder in lock.parents if not folder.exists()]
    try:
        with _lock_file(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    finally:
        for folder in new:
            with suppress(OSError):  # somebody uses it
                folder.rmdir()


@contextmanager
def _lock_file(lock: Path) -> Iterator[None]:
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            if isinstance(error, FileNotFoundError) and lock.parent.is_dir():
                continue  # removed by one that is done, between the two calls
            raise RunError(
                f"nothing can be written to {lock.parent} ({error.strerror}): "
                "name a folder for the packed model with --store"
            ) from error
        with file:
            if _holds(file.fileno(), lock):
                yield
                return


def _holds(fd: int, lock: Path) -> bool:
    """Wait for a lock; False where its holder has removed the file meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return os.path.samestat(os.fstat(fd), lock.stat())
    except FileNotFoundError:
        return False
    except OSError:
        with suppress(OSError):  # it is ours, or nobody can hold it
            lock.unlink()
        raise
