"""A recommendation as a table, as the line to run, and as a file that `moerun --config` reads."""

from __future__ import annotations

import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moepolicy import PolicySpec, find_policy
from moepolicy.amounts import format_bytes
from moepolicy.tables import Table, html_table, wrapped
from moeroute.models import NATIVE, PACKED

from moesim.machine.profile import Machine
from moesim.recommend.model import ModelToRun
from moesim.recommend.search import Options, OptionStep, Search, Trial, bits

# WikiText-2 perplexity of Mixtral-8x7B with HQQ, by the bits of its experts and of its attention
# (arXiv 2312.17238, Table 1).
PERPLEXITY = {16: 3.59, 4: 3.67, 3: 3.96, 2: 4.52}
MORE_MEMORY = 1.25


@dataclass(frozen=True, repr=False)
class Recommendation:
    """What was found, and for what; a notebook shows it as a table."""

    wanted: ModelToRun
    machine: Machine
    machine_name: str  # that --machine takes: a shipped one's, or a file
    machine_how: str  # the same, or how this machine was found
    memory_bytes: int
    context_tokens: int | None  # None: the model's own, or what moerun takes
    context_note: str
    host_memory_bytes: int | None  # None: all experts are in it, or there is no such tier
    steps: Sequence[OptionStep]
    final: Trial
    others: Sequence[tuple[str, Trial]]

    @property
    def options(self) -> dict[str, Any]:
        """The options of `moerun` by name, in the order of its help."""
        chosen = self.final.options
        found: dict[str, Any] = {"model": self.wanted.run_as or "MODEL"}
        if chosen.precision in PACKED:
            found["precision"] = chosen.precision
        if chosen.attention != NATIVE:
            found["attention"] = chosen.attention
        found |= {"policy": chosen.policy, "memory": _amount(self.memory_bytes)}
        if chosen.scope != "layer":
            found["scope"] = chosen.scope
        if self.context_tokens is not None:
            found["context"] = self.context_tokens
        if self.host_memory_bytes is not None:
            found["host-memory"] = _amount(self.host_memory_bytes)
        if chosen.prompt_chunk is not None:
            found["prompt-chunk"] = chosen.prompt_chunk
        if chosen.streams != 1:
            found["streams"] = chosen.streams
        if "speed" in self._policy.requires | self._policy.welcomes:
            found["machine"] = self.machine_name
        return found

    @property
    def _policy(self) -> PolicySpec:
        return find_policy(self.final.options.policy)

    @property
    def line(self) -> str:
        """The command to run."""
        words = [part for name, value in self.options.items() for part in (f"--{name}", str(value))]
        return shlex.join(["moerun", "generate", *words]) + ' --prompt "..."'

    def toml(self) -> str:
        """The options as a file for `moerun --config`."""
        lines = [
            "# Made by moesim recommend; read by moerun --config FILE.",
            f"# Predicted: {self.final.speed:.2f} tokens/s on {self.machine.name} "
            f"({self.machine.source} constants), {self.wanted.how_sure}.",
        ]
        for name, value in self.options.items():
            quoted = value if isinstance(value, int) else '"' + _escaped(str(value)) + '"'
            lines.append(f"{name} = {quoted}")
        return "\n".join(lines) + "\n"

    def rows(self) -> list[dict[str, Any]]:
        """A row a step, for programs."""
        return [
            {
                "step": step.what,
                "chosen": step.chosen,
                "slots": step.after.slots,
                "tokens_per_s": step.after.speed or None,
                "gain": step.gain,
                "kind": "simulated",
            }
            for step in self.steps
        ]

    def document(self) -> dict[str, Any]:
        """All of it, for programs."""
        result = self.final.result
        return {
            "model": self.wanted.name,
            "machine": self.machine.name,
            "machine_source": self.machine.source,
            "memory_bytes": self.memory_bytes,
            "options": self.options,
            "line": self.line,
            "slots": self.final.slots,
            "tokens_per_s": self.final.speed or None,
            "limit_tokens_per_s": result and result.limit_tokens_per_s,
            "hit_ratio": result and result.hit_ratio,
            "how_sure": self.wanted.how_sure,
            "steps": self.rows(),
            "others": [
                {"change": what, "slots": each.slots, "tokens_per_s": each.speed or None}
                for what, each in self.others
            ],
        }

    def table(self) -> str:
        """For people."""
        tokens = self.context_tokens
        context = "" if tokens is None else f", {tokens:,} tokens of context"
        lines = [
            f"{self.wanted.name} on {self.machine.name} ({self.machine.source} constants), "
            f"{format_bytes(self.memory_bytes)} of memory{context}. All tokens/s are simulated."
        ]
        text = wrapped(lines) + "\n" + self._steps()
        return text + wrapped(self._conclusion()) + "\n    " + self.line + "\n"

    def __repr__(self) -> str:
        chosen = self.final.options
        return (
            f"Recommendation({self.wanted.name} on {self.machine.name}: {_in_words(chosen)}, "
            f"{self.final.speed:.2f} tokens/s simulated)"
        )

    def _repr_html_(self) -> str:
        headings = ("option", "chosen", "slots", "tokens/s", "worth")
        begin = ("to begin with", _in_words(self.steps[0].before.options))
        rows = [(*begin, *_figures(self.steps[0].before), "")]
        for step in self.steps:
            gain = "" if step.gain is None else f"{100 * step.gain:+.1f} %"
            rows.append((step.what, step.chosen, *_figures(step.after), gain))
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._conclusion()[:-1])
        line = html.escape(self.line)
        return f"{html_table(headings, rows)}<ul>{notes}</ul><pre>{line}</pre>"

    def _steps(self) -> str:
        shown = Table(["option", "chosen"], ["slots", "tokens/s", "worth"], right=["slots"])
        begin = self.steps[0].before
        shown.add_row("to begin with", _in_words(begin.options), *_figures(begin), "")
        for step in self.steps:
            gain = "" if step.gain is None else f"{100 * step.gain:+.1f} %"
            if step.before.speed == 0 and step.after.speed:
                gain = "makes it fit"
            shown.add_row(step.what, step.chosen, *_figures(step.after), gain)
        shown.end_section()
        for what, trial in self.others:
            gain = f"{100 * (trial.speed / self.final.speed - 1):+.1f} %" if trial.speed else ""
            shown.add_row("instead", what, *_figures(trial), gain)
        return shown.render()

    def _conclusion(self) -> list[str]:
        result = self.final.result
        assert result is not None
        notes = [
            f"predicted: {self.final.speed:.2f} tokens/s under {self.final.options.policy}, with "
            f"about {self.final.slots} of "
            f"{self.wanted.trace.meta.n_experts} experts a layer in memory "
            f"({100 * result.hit_ratio:.0f} % hits)"
        ]
        if result.limit_tokens_per_s:
            notes.append(
                f"limit: {result.limit_tokens_per_s:.2f} tokens/s is the most that any policy "
                "could reach with these slots, knowing the future"
            )
        notes.append(f"routing: {self.wanted.how_sure}")
        meta = self.wanted.trace.meta
        if meta.source == "synthetic" and "predictions" in self._policy.requires:
            notes.append(
                "fetching ahead: what it is worth rests on generated predictions "
                f"({meta.prediction}), and a model's own gates may guess better or worse"
            )
        notes += [self.context_note] if self.context_note else []
        notes.append(f"machine: {self.machine_how}{_constants(self.machine)}")
        if any(bits(each.options.precision) < 4 for _, each in self.others):
            by_bits = ", ".join(f"{ppl} at {n}" for n, ppl in PERPLEXITY.items())
            notes.append(
                "fewer bits: WikiText-2 perplexity of Mixtral-8x7B by bits of its experts is "
                f"{by_bits} (published, arXiv 2312.17238)"
            )
        run_as = self.wanted.run_as
        if run_as is None:
            notes.append("MODEL: the trace does not say where its model's weights are")
        notes.append("memory: an estimate; the line below with --plan says what moerun plans")
        return [*notes, "to run:"]


def alternatives(search: Search, final: Trial, memory_bytes: int) -> list[tuple[str, Trial]]:
    """What other choices would give: fewer bits than were allowed, and more memory."""
    found = []
    for precision in PACKED:
        if precision in search.sizes and bits(precision) < search.least_bits:
            options = replace(final.options, precision=precision)
            found.append((f"experts at {precision}", search.trial(options)))
    more = int(MORE_MEMORY * memory_bytes)
    card = search.machine.memory_bytes
    if search.machine.experts_in == "host" and card is not None and memory_bytes < card:
        more = min(more, card)
    what = f"{format_bytes(more)} of memory"
    if card is not None and more > card:
        what += ", a larger card" if search.machine.device == "gpu" else ", which it has not"
    found.append((what, search.with_memory(final.options, more)))
    return found


def _constants(machine: Machine) -> str:
    if machine.source == "measured":
        return "; its constants were measured"
    return (
        "; its constants are from data sheets: the order of the options is surer than the "
        "tokens/s. 'moerun profile' measures a machine, and --machine takes what it wrote"
    )


def _in_words(options: Options) -> str:
    return f"{options.policy}, {options.precision}"


def _figures(trial: Trial) -> tuple[str, str]:
    if trial.result is None:
        return "-", "does not fit"
    return str(trial.slots), f"{trial.speed:.2f}"


def _amount(n_bytes: int) -> str:
    """An amount as an option's value: in the largest unit that it is whole ones of, as a user would
    type it, or rounded down."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if n_bytes >= 1 << power and not n_bytes % (1 << power):
            return f"{n_bytes >> power}{unit}"
    return f"{n_bytes >> 20}MiB" if n_bytes >= 1 << 30 else f"{n_bytes >> 10}KiB"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
