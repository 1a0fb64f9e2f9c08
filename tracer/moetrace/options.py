"""The options of `moetrace record`: which model, what is recorded of which text, on what device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy.completion import among
from moepolicy.options import formerly
from moerun.commands import names

if TYPE_CHECKING:
    from moetrace.record import Settings


class Prediction(StrEnum):
    """The methods of moerun.offload.gate_predictor, which the help text alone does not import."""

    own_norm = "own-norm"
    gate_input = "gate-input"


class Precision(StrEnum):
    """What to compute in."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which model is recorded."""

    model: Annotated[
        str,
        typer.Option(
            help="The model: tiny (bundled), a checkpoint's folder, or owner/name on the Hugging "
            "Face hub.",
            autocompletion=among(names.models),
        ),
    ] = "tiny"
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a model on the hub.", show_default=False),
    ] = None


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the text is read or continued, and what is recorded of it."""

    horizon: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many layers ahead gates are applied: predictions made 1 to this many "
            "layers early are recorded.",
        ),
    ] = 3
    prediction: Annotated[
        Prediction | None,
        typer.Option(
            help="What later gates are applied to. own-norm: the residual stream under their own "
            "norm. gate-input: the input of this layer's gate. Default: own-norm where the "
            "family has such norms.",
            show_default=False,
        ),
    ] = None
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of a sequence; longer documents are cut. Default: the model's context, "
            "2048 at most.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Stop after this many tokens of text. Default: all.", show_default=False
        ),
        formerly("--max-tokens"),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Mark this many first tokens of each sequence as prompt; the others are decode "
            "steps. With --generate: the length of the prompts.",
            show_default=False,
        ),
    ] = None
    generate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let the model continue each prompt by this many tokens. 0: only read.",
        ),
    ] = 0
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0 takes the likeliest token; values above 0 sample. Default: 0.",
            show_default=False,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of the sampling. Default: 0.", show_default=False),
    ] = None
    field: Annotated[
        str | None,
        typer.Option(help="The field of .jsonl lines that holds the text.", show_default=False),
    ] = None

    def check(self) -> None:
        """Wrong usage where an option of sampling is given and nothing is generated."""
        for name, value in (("--temperature", self.temperature), ("--seed", self.seed)):
            if value is not None and not self.generate:
                raise typer.BadParameter(f"{name} needs --generate: reading text samples nothing")

    def settings(self, batch_tokens: int) -> Settings:
        """The same for the recorder; whole sequences of ``batch_tokens`` share a forward pass."""
        from moetrace.record import Settings

        return Settings(
            horizon=self.horizon,
            prediction=self.prediction.value if self.prediction else None,
            sequence_length=self.sequence_length,
            max_tokens=self.tokens,
            prompt_tokens=self.prompt_tokens,
            generate=self.generate,
            temperature=self.temperature or 0.0,
            seed=self.seed or 0,
            field=self.field,
            batch_tokens=batch_tokens,
        )


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """What the model computes in and on, and how much at once."""

    precision: Annotated[
        Precision,
        typer.Option(
            help="What the model computes in. auto: as stored, but fp16 as fp32 on the CPU."
        ),
        formerly("--dtype"),
    ] = Precision.auto
    device: Annotated[
        str,
        typer.Option(
            help="The device that computes: cpu, cuda, cuda:N, or auto (a GPU where there is one).",
            autocompletion=among(names.devices),
        ),
    ] = "auto"
    batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of whole sequences that share a forward pass.")
    ] = 2048
