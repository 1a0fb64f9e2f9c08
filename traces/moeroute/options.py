"""The options that name a trace and give the sizes of the trace's model.

This is the only module of the package that imports typer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    from moeroute.sizes import GivenSizes


def complete_traces(incomplete: str) -> list[str]:
    """The samples whose names begin with ``incomplete``. The shell completes files itself."""
    from moeroute.trace import sample_names

    return [name for name in sample_names() if name.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """The known models whose names begin with ``incomplete``."""
    from moeroute.models import published

    return [name for name in published() if name.startswith(incomplete)]


def complete_precisions(incomplete: str) -> list[str]:
    """The precisions of attention whose names begin with ``incomplete``."""
    from moeroute.models import ATTENTION

    return [name for name in ATTENTION if name.startswith(incomplete)]


TRACE_HELP = "A trace file, or the name of a sample: tiny, mixtral-like."
TraceName = Annotated[str, typer.Option(help=TRACE_HELP, autocompletion=complete_traces)]


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """Sizes that a trace lacks."""

    panel: ClassVar[str] = "Sizes of the model"

    like: Annotated[
        str | None,
        typer.Option(
            help="Take the sizes that the trace lacks from this model: a name such as "
            "gpt-oss-20b, a config.json, or the folder of one. Layers, experts and top-k must "
            "agree with the trace's.",
            show_default=False,
            autocompletion=complete_models,
        ),
    ] = None
    layers: Annotated[
        int | None,
        typer.Option(
            help="The trace is of this many of the first layers of --like alone.",
            show_default=False,
        ),
    ] = None
    attention: Annotated[
        str | None,
        typer.Option(
            help="Precision of attention in --like: native, fp32, fp16, bf16, 4bit, 3bit, 2bit. "
            "Default: native.",
            show_default=False,
            autocompletion=complete_precisions,
        ),
    ] = None
    dense_layer_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes of a layer's weights other than routed experts.",
            show_default=False,
            min=1,
        ),
    ] = None
    dense_token_bytes: Annotated[
        int | None,
        typer.Option(
            help="Bytes that a token reads outside those layers: last norm, head, layers without "
            "experts.",
            show_default=False,
            min=1,
        ),
    ] = None

    def given(self, expert_bytes: dict[str, int] | None = None) -> GivenSizes:
        """These sizes for the trace format, and bytes of an expert by precision.

        Wrong usage for an option that is about --like where that is not given.
        """
        from moeroute.sizes import GivenSizes

        for option, value in (("--layers", self.layers), ("--attention", self.attention)):
            if value is not None and self.like is None:
                raise typer.BadParameter(f"{option} is of the model that --like names: give --like")
        return GivenSizes(**asdict(self), expert_bytes=expert_bytes or {})
