"""How an assistant's turn ends and what it consists of, read off the model's own chat template.

A template is asked by rendering: what it writes behind a finished answer ends a turn, and what it
writes around an answer's reasoning marks a channel apart. No name of a token is known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch

from moerun.errors import RunError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What response templates call the reasoning before an answer, in the order of preference."""
TOOL_CALLS = "tool_calls"
"""What response templates call the calls of tools in an answer."""

# Contents that no template has: where they come out, the template's own text begins and ends.
_ASKED, _MUSED, _ANSWERED, _CALLED = "zqaskedqz", "zqmusedqz", "zqansweredqz", "zqcalledqz"
_USER = {"role": "user", "content": _ASKED}
_AGAIN = {"role": "user", "content": _CALLED}
_ANSWER = {"role": "assistant", "content": _ANSWERED}
_TAG = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])\s*$")
_SPLIT = re.compile(r"""split\(\s*['"]([^'"]+)['"]\s*\)""")


@dataclass(frozen=True)
class Turn:
    """An answer of a chat.

    end_ids            tokens that end it, besides those that end any text of the model
    response_template  transformers' description of its channels; None: it has but one
    prefill            what the template has written of the answer already; None: it is in the
                       prompt, where the response template's anchor finds it
    tools              that the model may call, in OpenAI's form: their arguments are read by their
                       types
    """

    end_ids: tuple[int, ...] = ()
    response_template: dict[str, Any] | None = None
    prefill: str | None = None
    tools: tuple[dict[str, Any], ...] = ()

    def parser(self, tokenizer: Any, prompt_ids: torch.Tensor) -> Any:
        """Transformers' parser of an answer to prompt_ids [1, tokens]; None: one channel."""
        if self.response_template is None:
            return None
        prefix = tokenizer.decode(prompt_ids[0]) if self.prefill is None else ""
        parser = tokenizer.get_response_parser(
            self.response_template, prefix=prefix, tools=list(self.tools)
        )
        if self.prefill:
            parser.feed(self.prefill)
        return parser


def model_ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end any text: those that its configuration, its generation configuration
    and its tokenizer name, each of which may lack some."""
    named = (
        model.generation_config.eos_token_id,
        getattr(model.config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    known = model.get_input_embeddings().num_embeddings
    found: dict[int, None] = {}
    for ids in named:
        for token in ids if isinstance(ids, list | tuple) else [ids]:
            if token is not None and 0 <= token < known:
                found[int(token)] = None
    return tuple(found)


def hidden_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the special tokens, which are left out of the text that a reader sees."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {token for token, entry in added.items() if entry.special}
    return frozenset(special | set(getattr(tokenizer, "all_special_ids", ())))


def turn_of(tokenizer: Any) -> Turn:
    """What the tokenizer's chat template says of an answer; of one without, nothing.

    Raises RunError for a response template of the tokenizer's own that cannot be used.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Turn()
    turn = Turn(end_ids=_end_ids(tokenizer))
    declared = getattr(tokenizer, "response_template", None)
    if declared is None:
        return _derived(tokenizer, turn)
    turn = replace(turn, response_template=declared)
    try:
        turn.parser(tokenizer, torch.zeros(1, 0, dtype=torch.long))
    except Exception as error:  # it is checked in many ways
        raise RunError(f"the tokenizer's response_template cannot be used: {error}") from error
    return turn


def _end_ids(tokenizer: Any) -> tuple[int, ...]:
    """The token behind a finished answer, and the last one of a turn that calls a tool."""
    finished = render_chat(tokenizer, [_USER, _ANSWER])
    ends = _tokens(tokenizer, _behind(finished, _ANSWERED))[:1]
    if not ends:  # some templates end a turn by beginning the next
        followed = _behind(render_chat(tokenizer, [_USER, _ANSWER, _AGAIN]), _ANSWERED)
        ends = _tokens(tokenizer, followed.partition(_CALLED)[0])[:1]
    for arguments in ({"x": _CALLED}, f'{{"x": "{_CALLED}"}}'):  # templates take one or the other
        function = {"name": "f", "arguments": arguments}
        call = {"type": "function", "id": "call00000", "function": function}
        turn = {"role": "assistant", "content": "", "tool_calls": [call]}
        called = _tokens(tokenizer, _behind(render_chat(tokenizer, [_USER, turn]), _CALLED))
        special = hidden_ids(tokenizer)
        ends += [token for token in called if token in special][-1:]
    return tuple(dict.fromkeys(ends))


def _derived(tokenizer: Any, turn: Turn) -> Turn:
    """``turn`` with the channels that the template gives an answer with reasoning."""
    prompt = _behind(render_chat(tokenizer, [_USER], generation=True), _ASKED)
    plain = _behind(render_chat(tokenizer, [_USER, _ANSWER]), _ASKED)
    mused = {**_ANSWER, "reasoning_content": _MUSED}
    before, found, behind = _behind(render_chat(tokenizer, [_USER, mused]), _ASKED).partition(
        _MUSED
    )
    if found and _ANSWERED in behind:
        begun = _shared(prompt, before)
        opening, between = before[len(begun) :].strip(), behind.partition(_ANSWERED)[0]
        if not opening and (tag := _TAG.search(begun)):  # the prompt has opened it
            begun, opening = begun[: tag.start()], tag[0].strip()
    else:
        opening, between = _left_out(tokenizer)
        begun = _shared(prompt, plain.partition(_ANSWERED)[0])
        if opening and begun.rstrip().endswith(opening):
            begun = begun.rstrip().removesuffix(opening)
    if not opening or not between.strip():
        return turn
    head = plain.partition(_ANSWERED)[0].removeprefix(begun)
    fields = _fields(tokenizer, opening, between, head, turn.end_ids)
    template = {"start_anchor": begun or opening, "fields": fields}
    return replace(turn, response_template=template, prefill=prompt[len(begun) :])


def _left_out(tokenizer: Any) -> tuple[str, str]:
    """The marks of reasoning that a template takes off an answer; empty where it takes off none."""
    for close in dict.fromkeys(_SPLIT.findall(str(tokenizer.chat_template))):
        opening = close.replace("/", "", 1)
        said = {"role": "assistant", "content": f"{opening}{_MUSED}{close}{_ANSWERED}"}
        rendered = render_chat(tokenizer, [_USER, said, _AGAIN])  # some leave the last answer whole
        if opening != close and _ANSWERED in rendered and _MUSED not in rendered:
            return opening, close
    return "", ""


def _fields(
    tokenizer: Any, opening: str, between: str, head: str, ends: Iterable[int]
) -> dict[str, Any]:
    """The fields of a response template: reasoning, the answer, and what is marked as neither.

    ``opening`` comes before reasoning, ``between`` between it and the answer, ``head`` before an
    answer without reasoning: nothing, empty reasoning, or the mark of the answer's channel.
    """
    close = between.strip()
    mark = re.sub(rf"{re.escape(opening)}\s*{re.escape(close)}", "", head).strip()
    if not mark or not close.endswith(mark):
        reasoning = {
            "open_pattern": rf"{re.escape(opening)}\s*",
            "close_pattern": rf"\s*{re.escape(close)}\s*",
        }
        return {"reasoning_content": reasoning, "content": {}}
    # Each channel is a message with a header, as in the harmony format.
    first = _tokens(tokenizer, close)[:1]
    end = _string(tokenizer, first[0]) if first else close.removesuffix(mark)
    header = close.removesuffix(mark).removeprefix(end).strip()
    closes = list(dict.fromkeys([end, *(_string(tokenizer, token) for token in ends)]))
    before = rf"(?:{re.escape(header)})?" if header else ""
    left, right = _shared(opening, mark), _shared(opening[::-1], mark[::-1])[::-1]
    other = re.escape(mark)
    if left and right:  # any channel but that of reasoning, which the shorter name is first for
        other = rf"{re.escape(left)}[^<>]*{re.escape(right)}"
        before = before and rf"(?:{re.escape(header)}[^<>]*)?"
    return {
        "reasoning_content": {"open_pattern": before + re.escape(opening), "close": closes},
        "shown": {"open_pattern": before + other, "close": closes},
        "unmarked": {},
    }


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], *, generation: bool = False) -> str:
    """The text that a chat template makes of messages; empty where it refuses such messages.

    ``generation``: with what it writes before an answer.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation
        )
    except Exception:  # a template raises what it likes
        return ""
    return text


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _behind(text: str, content: str) -> str:
    return text.rpartition(content)[2] if content in text else ""


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a template's text that no ordinary text has; blanks are ordinary."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text else []
    return [token for token in ids if token in added and str(added[token]).strip()]


def _string(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text
