"""Conversations as prompts: by the model's own chat template, or plainly where it has none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from moerun.errors import RunError
from moerun.live.prompt import encode

Message = dict[str, Any]
"""``role`` (system, user, assistant or tool), ``content`` and what else chat templates take."""

PLAIN_STOPS = ("\nUser:", "\nAssistant:")
"""Where an answer ends that no template of its own ends: the model goes on with the next role."""


class Prompt(NamedTuple):
    """A conversation as token ids that a model continues."""

    ids: torch.Tensor  # int64[1, tokens]
    dropped: int  # turns that did not fit


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def stops_of(tokenizer: Any) -> tuple[str, ...]:
    """The stop strings that an answer needs besides the model's end token."""
    return () if has_template(tokenizer) else PLAIN_STOPS


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    device: torch.device,
    *,
    tools: Sequence[dict[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    generation: bool = True,
) -> torch.Tensor:
    """Token ids, int64[1, tokens], of a conversation whose next answer is the model's.

    ``tools`` are functions that the model may call, ``variables`` more of what the template reads;
    ``generation``: with what the template writes before an answer. Without a template it is the
    text that ``plain_text`` gives. Raises RunError where the template refuses the messages, ignores
    the tools, or there is no tokenizer.
    """
    if not has_template(tokenizer):
        if tools:
            raise RunError("the model has no chat template that could tell it of tools")
        return encode(tokenizer, plain_text(messages), device)

    def rendered(tools: Sequence[dict[str, Any]], **how: Any) -> Any:
        return tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=generation,
            **how,
            **(variables or {}),
        )

    try:
        ids: torch.Tensor = rendered(tools, return_tensors="pt", return_dict=True)["input_ids"]
        ignored = tools and rendered(tools, tokenize=False) == rendered((), tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise RunError(f"the model's chat template refuses the messages: {error}") from error
    if ignored:
        raise RunError("the model's chat template has no place for tools")
    return ids.to(device)


def template_arguments(tokenizer: Any) -> frozenset[str]:
    """Names that are no variables of a chat template: arguments of what renders it."""
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    return frozenset(parameters) | {"messages", "raise_exception", "strftime_now"}


def plain_text(messages: Sequence[Message]) -> str:
    """A script for models that were taught no format: a line a message, then "Assistant:"."""
    lines = []
    for message in messages:
        content = message["content"].strip()
        said = content if message["role"] == "system" else f"{message['role'].title()}: {content}"
        lines.append(f"{said}\n")
    return "".join([*lines, "Assistant:"])


class Conversation:
    """A system message, which stays, and turns, of which the oldest go when room is short."""

    def __init__(self, tokenizer: Any, device: torch.device, system: str | None = None) -> None:
        self.turns: list[list[Message]] = []  # each a user's message and perhaps the answer
        self._tokenizer = tokenizer
        self._device = device
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str) -> None:
        """Add what the user says as a new turn."""
        self.turns.append([{"role": "user", "content": text}])

    def answer(self, text: str) -> None:
        """Add the model's answer to the last turn."""
        self.turns[-1].append({"role": "assistant", "content": text.strip()})

    def prompt(self, room: int | None) -> Prompt:
        """What the model is to continue, in at most ``room`` tokens where that can be.

        Oldest turns are dropped for good until it fits; the last message never is.
        """
        dropped = 0
        while True:
            ids = encode_chat(self._tokenizer, self._messages(), self._device)
            if room is None or ids.shape[1] <= room or len(self.turns) == 1:
                return Prompt(ids, dropped)
            del self.turns[0]
            dropped += 1

    def _messages(self) -> list[Message]:
        return self._system + [message for turn in self.turns for message in turn]


class Lead:
    """Hands text on from its first letter: a plain answer begins with the space after a colon."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._begun = False

    def __call__(self, text: str) -> None:
        """Pass ``text`` on, without the whitespace before the first letter."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if text:
            self._on_text(text)
