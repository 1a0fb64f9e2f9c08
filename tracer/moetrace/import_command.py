"""The command `moetrace import`: files of other recorders become traces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from moepolicy import console
from moepolicy.amounts import NoAmountError, parse_bytes
from moepolicy.apps import Force
from moepolicy.outputs import own_folder
from moepolicy.tables import described, wrapped
from moeroute.families import WEIGHT_RULES
from moeroute.options import SizeOptions

from moetrace.outputs import check_out

if TYPE_CHECKING:
    from moeroute.importers import ImportOptions


def _complete_formats(incomplete: str) -> list[str]:
    from moeroute.importers import FORMATS

    return [known.name for known in FORMATS if known.name.startswith(incomplete)]


def _show_formats(wanted: bool) -> None:
    if wanted:
        from moeroute.importers import FORMATS

        console.emit(described({known.name: known.title for known in FORMATS}))
        raise typer.Exit


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """What a file does not say of itself."""

    format: Annotated[
        str | None,
        typer.Option(
            help="The file's format, where its content does not tell it; a name of --formats.",
            show_default=False,
            autocompletion=_complete_formats,
        ),
    ] = None
    map: Annotated[
        str | None,
        typer.Option(
            "--map",
            metavar="COLUMN=FIELD,...",
            help="Where the fields of JSON lines or Parquet are: layer=l,experts=topk.ids. Columns "
            "are layer, experts, weights, position, sequence, phase, pass_id, token_id, "
            "router_logits.",
            show_default=False,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="The model's name. Default: what the file says, or the file's name.",
            show_default=False,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Experts that a token chooses in a layer, where the file does not tell it. "
            "Default: that of --like.",
            show_default=False,
        ),
    ] = None
    experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Routed experts of a layer, where the file does not say. Default: that of --like, "
            "else one more than the largest id.",
            show_default=False,
        ),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First tokens of each sequence that are prompt, where the file does not tell it.",
            show_default=False,
        ),
    ] = None
    weight_rule: Annotated[
        str | None,
        typer.Option(
            help="How the model makes weights of logits, for a file of logits alone: "
            f"{', '.join(WEIGHT_RULES)}.",
            show_default=False,
        ),
    ] = None

    def checked(self) -> ImportOptions:
        """The same for the importers. Raises BadParameter for names that there are not."""
        from moeroute import TraceError
        from moeroute.importers import ImportOptions, find_format
        from moeroute.importers.fields import check_map

        fields = _pairs(self.map)
        try:
            if self.format is not None:
                find_format(self.format)
            check_map(fields)
        except TraceError as error:
            raise typer.BadParameter(str(error)) from None
        if self.weight_rule not in (None, *WEIGHT_RULES):
            raise typer.BadParameter(
                f"--weight-rule {self.weight_rule}: not one of the rules of --help"
            )
        return ImportOptions(
            model=self.model,
            top_k=self.top_k,
            n_experts=self.experts,
            prompt_tokens=self.prompt_tokens,
            fields=fields,
            weight_rule=self.weight_rule,
        )


def import_trace(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="The recording: a file of vLLM, SGLang, llama.cpp, Hugging Face and others "
            "(see --formats), or a folder of moe-cache-eval.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="The trace to write.")],
    force: Force = False,
    formats: Annotated[
        bool,
        typer.Option(
            "--formats",
            help="List the formats that can be imported, and stop.",
            is_eager=True,
            callback=_show_formats,
        ),
    ] = False,
    expert_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION=BYTES,...",
            help="Bytes of one expert by precision, such as 4bit=27.5MB; that of the recording "
            "first.",
            show_default=False,
            rich_help_panel=SizeOptions.panel,
        ),
    ] = None,
    reading: ReadingOptions,
    sizes: SizeOptions,
) -> None:
    """Turn a foreign recording into a trace.

    What the recording lacks is left out and noted. Times are simulated from the model's sizes.
    Few recordings have the sizes: without --like or numbers they stay unknown, and every number
    that needs them says so.
    """
    assert not formats  # its callback stops the command
    from moeroute.importers import import_foreign

    known, options = _expert_bytes(expert_bytes), reading.checked()
    check_out(out, resume=False, force=force)
    with own_folder(out) as scratch:
        made = import_foreign(
            file,
            out,
            format=reading.format,
            options=options,
            sizes=sizes.given(known),
            tell=lambda line: console.say(f"note: {line}"),
            scratch=scratch,
        )
    console.emit(wrapped(made.describe(notes=False).splitlines()))


def _expert_bytes(text: str | None) -> dict[str, int]:
    """The sizes of 4bit=13MB,bf16=50000000 by name."""
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        try:
            n_bytes = parse_bytes(size)
        except NoAmountError:
            n_bytes = 0
        if not name.strip() or not n_bytes:
            raise typer.BadParameter(
                f"--expert-bytes {text!r}: give PRECISION=BYTES, as in 4bit=13MB,bf16=50000000"
            )
        found[name.strip()] = n_bytes
    return found


def _pairs(text: str | None) -> dict[str, str]:
    """The names of layer=l,experts=topk.ids."""
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, _, field = part.partition("=")
        if not name.strip() or not field.strip() or name.strip() in found:
            raise typer.BadParameter(
                f"--map {text!r}: give COLUMN=FIELD once each, as in layer=l,experts=topk.ids"
            )
        found[name.strip()] = field.strip()
    return found
