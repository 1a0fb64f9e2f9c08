"""A conversation on the terminal, or read line by line from a pipe: what `moerun chat` holds."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from moepolicy import PolicyError
from moepolicy.console import emit, note, say
from moepolicy.tables import Format, described
from rich.console import Console

from moerun.errors import RunError
from moerun.live.generate import Generation
from moerun.live.prompt import check_length
from moerun.live.report import render, report_of
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.turn import turn_of
from moerun.live.work import NO_WORK, Generated
from moerun.memory.budget import parse_budget
from moerun.serving.chat import Conversation, Lead, stops_of

COMMANDS = {
    "/help": "these commands",
    "/reset": "forget the conversation",
    "/stats": "statistics until now",
    "/memory": "how memory is spent; /memory 6GiB: another budget from now on",
    "/quit": "leave",
}


class TerminalChat:
    """One conversation: lines in, answers out, statistics at the end."""

    def __init__(self, runner: Runner, sampling: Sampling, system: str | None) -> None:
        self._runner = runner
        stops = (*sampling.stop_strings, *stops_of(runner.tokenizer))
        turn = turn_of(runner.tokenizer)
        self._sampling = replace(sampling, stop_strings=stops, turn=turn)
        self._conversation = Conversation(runner.tokenizer, runner.settings.device, system)
        self._limit = runner.limit_tokens
        self._work = NO_WORK
        self._asked = 0
        self._said_dropped = False
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._terminal = sys.stdin.isatty()

    def hold(self) -> bool:
        """Answer until the input ends; True when the user interrupted the conversation."""
        interrupted = False
        if self._terminal:
            model = self._runner.store.index.model
            note(f"{model}: one message a line; /help has the commands")
        try:
            for line in self._lines():
                if not self._command(line):
                    self._reply(line)
        except KeyboardInterrupt:
            interrupted = True
            if self._terminal:  # its cursor is behind a prompt or an answer
                self._err.print()
        finally:
            self._statistics(interrupted)
        return interrupted

    def _lines(self) -> Iterator[str]:
        """Messages and commands up to /quit or the end of the input."""
        if self._terminal:
            import readline  # noqa: F401  input() then edits lines and remembers them
        while (line := self._line()) is not None and line.strip() != "/quit":
            if line.strip():
                yield line.strip()

    def _line(self) -> str | None:
        try:
            if not self._terminal:
                return sys.stdin.readline() or None
            if sys.stdout.isatty():
                return input("> ")
            self._err.print("> ", end="")
            return input()
        except EOFError:
            self._err.print()
            return None
        except UnicodeDecodeError as error:
            raise RunError("stdin is no UTF-8 text") from error

    def _command(self, line: str) -> bool:
        """Do what a line of one word with a slash asks for, or /memory with an amount."""
        name, *arguments = line.split()
        if name == "/memory" and len(arguments) < 2:
            self._memory(*arguments)
            return True
        if not line.startswith("/") or arguments:
            return False
        if line == "/reset":
            self._conversation.turns.clear()
            self._asked = 0
            self._said_dropped = False
            self._note("the conversation is forgotten")
        elif line == "/stats":
            self._statistics()
        elif line == "/help":
            note(described(COMMANDS).rstrip())
        else:
            self._note(f"unknown command '{line}'; there are: {', '.join(COMMANDS)}")
        return True

    def _memory(self, amount: str | None = None) -> None:
        runner = self._runner
        try:
            if amount is not None:
                runner.set_memory(parse_budget(amount, runner.settings.device))
            sys.stderr.write(runner.plan.table())
        except RunError as error:
            self._note(f"memory unchanged: {error}")

    def _reply(self, line: str) -> None:
        """Answer; at a terminal an error ends the turn, not the conversation."""
        self._conversation.ask(line)
        try:
            prompt_ids = self._prompt()
            try:
                self._conversation.answer(self._answer(prompt_ids).text)
            except Exception:
                self._runner.kept.drop()
                self._runner.session.reset()
                raise
        except (RunError, PolicyError, OSError) as error:
            if not self._terminal:
                raise
            del self._conversation.turns[-1:]
            say(f"error: {error}")

    def _prompt(self) -> torch.Tensor:
        """The conversation as int64[1, tokens]; RunError where even its last turn is too long."""
        prompt = self._conversation.prompt(self._room())
        check_length(self._runner.model, prompt.ids.shape[1], self._runner.context_tokens)
        if prompt.dropped and not self._said_dropped:
            self._said_dropped = True
            self._note(f"the context of {self._limit} tokens is full: oldest turns are dropped")
        return prompt.ids

    def _answer(self, prompt_ids: torch.Tensor) -> Generated:
        seed = (self._sampling.seed + self._asked) % 2**32  # or each answer draws alike
        self._asked += 1
        printer = AnswerPrinter(self._err)
        generation = self._runner.generation(Lead(printer.answer), printer.reasoning, reuse=True)
        try:
            with _stopped_by_ctrl_c(generation):
                generation.run(prompt_ids, replace(self._sampling, seed=seed))
        finally:
            generation.end_text()
            printer.end()
            outcome = generation.outcome()
            self._work += outcome
        cut = ", stopped" if outcome.ending == "cancelled" else ""
        self._note(
            f"{outcome.new_tokens:,} tokens{cut}, {outcome.tokens_per_s:.2f} tokens/s, "
            f"{100 * outcome.totals.hit_ratio:.1f} % hits"
        )
        return outcome

    def _room(self) -> int | None:
        """Tokens that the conversation may fill: an answer needs some, but not all."""
        if self._limit is None:
            return None
        return self._limit - min(self._sampling.max_new_tokens, self._limit // 2)

    def _statistics(self, interrupted: bool = False) -> None:
        report = report_of(self._runner, self._work, interrupted=interrupted)
        sys.stderr.write(render(report, Format.table, "", {}))

    def _note(self, text: str) -> None:
        note(f"({text})")


@contextmanager
def _stopped_by_ctrl_c(generation: Generation) -> Iterator[None]:
    """The first Ctrl-C ends the answer; a second one, before it has ended, everything."""

    def stop(*_: Any) -> None:
        generation.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class AnswerPrinter:
    """An answer on stdout, and the reasoning before it on stderr, on lines of its own."""

    def __init__(self, err: Console) -> None:
        self._err = err
        self._reasoning = False  # is being written

    def answer(self, text: str) -> None:
        """Print a part of the answer on stdout."""
        if self._reasoning:
            self._end_reasoning()
        emit(text)

    def reasoning(self, text: str) -> None:
        """Print a part of the reasoning on stderr."""
        if not self._reasoning:
            self._reasoning, text = True, f"(reasoning: {text.lstrip()}"
        self._err.print(text, end="", style="dim", markup=False)

    def end(self) -> None:
        """End the last line."""
        if self._reasoning:
            self._end_reasoning()
        emit("\n")

    def _end_reasoning(self) -> None:
        self._reasoning = False
        self._err.print(")", style="dim")
