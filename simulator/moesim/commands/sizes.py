"""The options by which commands are told the sizes of a trace's model."""

from __future__ import annotations

from typing import Annotated

import typer

Like = Annotated[
    str | None,
    typer.Option(
        help="Take the sizes that the trace lacks from this model: a name such as gpt-oss-20b, a "
        "config.json, or its folder. Layers, experts and top-k must agree with the trace's.",
        show_default=False,
    ),
]
Layers = Annotated[
    int | None,
    typer.Option(help="The trace is of --like's first so many layers alone.", show_default=False),
]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Precision of --like's attention: native, bf16, 4bit, 3bit, 2bit. Default: native.",
        show_default=False,
    ),
]
DenseLayerBytes = Annotated[
    int | None,
    typer.Option(
        help="Bytes of a layer's weights other than routed experts.", show_default=False, min=1
    ),
]
DenseTokenBytes = Annotated[
    int | None,
    typer.Option(
        help="Bytes a token reads outside those layers: last norm, head, layers without experts.",
        show_default=False,
        min=1,
    ),
]
