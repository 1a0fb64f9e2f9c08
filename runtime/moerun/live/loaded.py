"""`moerun.load`: a stock transformers model whose experts come from slots, for others' code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moepolicy import PolicySpec

from moerun.format.precision import NATIVE
from moerun.live.assembly import check_lower
from moerun.live.options import budget_bytes, read_settings
from moerun.live.runner import Runner
from moerun.live.totals import Totals
from moerun.store.expert_store import ExpertStore
from moerun.store.find import find_lower_store, find_store


class Offloaded:
    """What `moerun.load` adds to a transformers model, which keeps its own class, too.

    A context manager. After ``close`` the model's experts are gone and it can run no more.
    """

    _runner: Runner

    @property
    def runner(self) -> Runner:
        """The run behind the model: its store, settings, memory plan, session and tokenizer."""
        return self._runner

    @property
    def tokenizer(self) -> Any:
        """The tokenizer in the folder of the weights; None where the folder has none."""
        return self._runner.tokenizer

    @property
    def totals(self) -> Totals:
        """Steps, hits, misses, loads, bytes over the link, seconds waited: since loading."""
        return self._runner.session.totals

    def set_memory(self, budget: str | int) -> None:
        """Change the budget, as "6GiB" or in bytes, also while text is generated.

        No token changes. Raises RunError, and changes nothing, where the budget cannot be kept.
        """
        self._runner.set_memory(budget_bytes(budget, self._runner.settings.device))

    def close(self) -> None:
        """End the run: threads, hooks, slots. Closing twice does no harm."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(
    model: str | Path | ExpertStore,
    *,
    policy: str | PolicySpec = "lru-spec",
    slots: int | None = None,
    memory: str | int | None = None,
    precision: str = NATIVE,
    attention: str = NATIVE,
    low: str | Path | ExpertStore | None = None,
    store: str | Path | None = None,
    device: str = "auto",
    scope: str = "layer",
    context: int | None = None,
    host_memory: str | int | None = None,
    chunk: str | int = 0,
    streams: int = 1,
    link_gbps: float | None = None,
    calibration: str | None = None,
    machine: str | Path | None = None,
    learned: str | Path | None = None,
    on_policy_error: str = "fallback",
) -> Any:
    """A transformers model, ready for ``generate()``, that keeps some of its experts in memory.

    ``model`` is "tiny", a checkpoint's folder or hub id, or a packed store; a checkpoint is packed
    on first use, at ``precision`` (experts) and ``attention``, into ``store`` or the user's cache.
    ``slots`` experts a layer are cached, or as many as ``memory`` ("9GiB", "auto", or bytes) leaves
    room for besides weights and the KV cache of ``context`` tokens; half of a layer's experts
    where neither is given. ``low`` is a lower precision, or its store, for policies that load some
    misses lighter; ``machine`` is a profile of this machine, for policies that ask how fast it is;
    ``learned`` is a file that keeps what a policy learns from one run to the next.
    Sizes are texts with a unit or bytes; ``link_gbps`` caps the link at so many 10^9 bytes/s.
    ``on_policy_error``: when the policy fails, "fallback" warns (RuntimeWarning) and goes on under
    LRU, "stop" raises the PolicyError from ``generate()``.

    Returns the model: an instance of its own transformers class, and of `Offloaded`, which gives it
    ``totals``, ``tokenizer``, ``set_memory`` and ``close``. Raises RunError or PolicyError where it
    cannot run, before anything big is loaded.

        with moerun.load("tiny", policy="lru-spec", slots=4) as model:
            ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids
            print(model.tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))
            print(model.totals.hit_ratio)
    """
    settings = read_settings(
        policy=policy,
        slots=slots,
        memory=memory,
        context=context,
        scope=scope,
        device=device,
        host_memory=host_memory,
        chunk=chunk,
        streams=streams,
        link_gbps=link_gbps,
        calibration=calibration,
        machine=None if machine is None else str(machine),
        learned=None if learned is None else Path(learned),
        on_policy_error=on_policy_error,
    )
    found = model if isinstance(model, ExpertStore) else _store(model, precision, attention, store)
    if low is not None:
        lower = low if isinstance(low, ExpertStore) else _lower_store(model, low)
        check_lower(found, lower)
        settings = replace(settings, low=lower)
    return _offloaded(Runner(found, settings))


def _offloaded(runner: Runner) -> Any:
    """The runner's model, made an `Offloaded` too. Its class keeps the name, which transformers
    looks things up by."""
    model = runner.model
    stock = type(model)
    model.__class__ = type(stock.__name__, (Offloaded, stock), {"__module__": stock.__module__})
    model._runner = runner
    # Experts are loaded between the layers, by code that no compiled graph can hold.
    model.generation_config.disable_compile = True
    return model


def _store(
    model: str | Path, precision: str, attention: str, folder: str | Path | None
) -> ExpertStore:
    place = None if folder is None else Path(folder)
    return find_store(str(model), precision=precision, attention=attention, folder=place)


def _lower_store(model: str | Path | ExpertStore, low: str | Path) -> ExpertStore:
    return find_lower_store(str(model.path if isinstance(model, ExpertStore) else model), str(low))
