"""The model that is to run: its sizes, a trace to replay for it, and how sure that makes a
prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from moeroute import Trace, TraceError, open_trace
from moeroute.models import ModelShape, find_model, published, repositories
from moeroute.sizes import check_like
from moeroute.trace import sample_names

from moesim.errors import UsageError
from moesim.recommend.routing import write_routing

TOKENS = 256  # of a generated trace
MIXTRAL_LIKE = "mixtral-like"
PLANNED_CONTEXT = 4096


@dataclass(frozen=True)
class ModelToRun:
    """A model that a recommendation is for.

    run_as  what `moerun --model` is given; None: a shape alone, which cannot run
    shape   None: only the trace's sizes are known, and no size of attention in other precisions
    how_sure  whose routing is replayed
    """

    name: str
    run_as: str | None
    shape: ModelShape | None
    trace: Trace
    how_sure: str

    def context(self, asked: int | None) -> tuple[int | None, str]:
        """Tokens of context to have memory for, and what there is to say of them: no more than
        the model's own context. None where nothing was asked and nothing says how big keys and
        values are."""
        if self.shape is None:
            unknown = (
                "context: the trace does not say how big keys and values are: none are counted"
            )
            return asked, unknown
        own = self.shape.context_tokens
        tokens = PLANNED_CONTEXT if asked is None else asked
        if own is None or tokens <= own:
            return tokens, ""
        said = (
            "" if asked is None else f"context: {asked:,} tokens are more than the model's {own:,}"
        )
        return own, said


def find_wanted(model: str, trace: str | None, scratch: Path) -> ModelToRun:
    """``model`` is a name of the table, a repository of the hub, a config.json or checkpoint, or a
    trace; ``trace`` has its routing (None: the best there is without one).

    Nothing is downloaded: of a repository that is neither in the table nor in the hub's cache
    nothing is known. Generated routing lies in the folder ``scratch``. Raises TraceError.
    """
    if _is_trace(model):
        if trace is not None:
            raise UsageError(f"{model} is a trace already: give it or --trace, not both")
        opened = open_trace(model)
        run_as = "tiny" if model == "tiny" else None
        return ModelToRun(opened.meta.model, run_as, None, opened, _sure(opened, own=True))
    shape, run_as = _shape(model)
    if trace is not None:
        opened = open_trace(trace)
        check_like(opened.meta, shape)
        own = opened.meta.model.lower() in (model.lower(), shape.name.lower(), run_as.lower())
        return ModelToRun(shape.name, run_as, shape, opened, _sure(opened, own=own))
    mixtral = (shape.n_layers, shape.n_experts, shape.top_k) == (32, 8, 2)
    if mixtral:
        opened = open_trace(MIXTRAL_LIKE)
    else:
        opened = write_routing(scratch / "routing.parquet", shape, tokens=TOKENS)
    return ModelToRun(shape.name, run_as, shape, opened, _sure(opened, own=mixtral))


def _sure(trace: Trace, *, own: bool) -> str:
    if trace.meta.source == "synthetic":
        made = "with Mixtral-8x7B's published statistics" if own else "with a typical locality"
        return (
            f"synthetic: generated routing of this shape, {made}; record the model "
            "(moetrace record) for its own"
        )
    if own:
        return f"{trace.meta.source} routing of this model"
    return f"{trace.meta.source} routing of another model ({trace.meta.model}) of the same shape"


def _is_trace(model: str) -> bool:
    return model in sample_names() or (model.endswith(".parquet") and Path(model).is_file())


def _shape(model: str) -> tuple[ModelShape, str]:
    """The sizes of a model, and what `moerun` calls it."""
    named = {repository.lower(): name for name, repository in repositories().items()}
    if model in published():
        return find_model(model), repositories()[model]
    if model.lower() in named:
        return find_model(named[model.lower()]), model
    if model.count("/") == 1 and not Path(model).exists():
        cached = _in_hub_cache(model)
        if cached is None:
            raise TraceError(
                f"of {model!r} nothing is known here: give the path of its config.json, or one of "
                f"{', '.join(published())}"
            )
        return find_model(str(cached)), model
    shape = find_model(model)
    folder = Path(model) if Path(model).is_dir() else Path(model).parent
    return shape, str(folder)


def _in_hub_cache(repository: str) -> Path | None:
    """The config.json of a repository that was downloaded once."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    folder = hub / f"models--{repository.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None
