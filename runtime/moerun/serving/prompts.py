"""A request's prompts as token ids, and what each of its answers is to be."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moerun.errors import RunError
from moerun.live.prompt import encode
from moerun.live.runner import Runner
from moerun.live.turn import Turn, model_ends, turn_of
from moerun.serving import forced_calls, guided
from moerun.serving.answers import TokenNames
from moerun.serving.api_error import ApiError
from moerun.serving.chat import encode_chat, has_template, stops_of, template_arguments
from moerun.serving.fields import Prompt, unsupported
from moerun.serving.forced_calls import forced_turn, grammar_of
from moerun.serving.guided import Grammars, schema_of
from moerun.serving.protocol import Answering, Defaults, choices_of, sampling_of
from moerun.serving.requests import ChatRequest, TextRequest, TokenizeRequest
from moerun.serving.tools import CallForm, call_form, tool_turn
from moerun.serving.worker import Wanted


class Prompts:
    """Makes what the worker is to do out of requests, for one model."""

    def __init__(self, runner: Runner) -> None:
        self.limit = runner.limit_tokens
        """The longest text that the model takes, in tokens; None: any."""
        # Fast tokenizers do not bear two threads: the worker decodes with the runner's, this one
        # encodes in a thread of the loop's, and the loop itself names tokens.
        self._tokenizer = copy.deepcopy(runner.tokenizer)
        self.names = TokenNames(copy.deepcopy(runner.tokenizer))
        self._encoding = asyncio.Lock()
        self._device = runner.settings.device
        self._n_tokens = runner.model.get_input_embeddings().num_embeddings
        self._stops = stops_of(runner.tokenizer)
        self._turn = turn_of(runner.tokenizer)
        self._tool_turn = tool_turn(runner.tokenizer, runner.model, self._turn)
        ends = (*model_ends(runner.model, runner.tokenizer), *self._turn.end_ids)
        logits = runner.model.get_output_embeddings().weight.shape[0]
        self._grammars = Grammars(self._tokenizer, logits, tuple(dict.fromkeys(ends)))

    async def wanted(self, asked: ChatRequest | TextRequest, defaults: Defaults) -> list[Wanted]:
        """The answers that a request asks for, those to one prompt together. Raises ApiError."""
        # A long prompt takes a while to encode, and others are being answered meanwhile.
        async with self._encoding:
            return await asyncio.to_thread(self._wanted, asked, defaults)

    async def tokens(self, asked: TokenizeRequest) -> list[int]:
        """The token ids that a text or a conversation has. Raises ApiError."""
        async with self._encoding:
            ids = await asyncio.to_thread(self._tokens, asked)
        found: list[int] = ids[0].tolist()
        return found

    async def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens. Raises ApiError."""
        self._check("tokens", tokens)
        if self._tokenizer is None:
            raise ApiError(400, "the model has no tokenizer")
        async with self._encoding:
            text: str = await asyncio.to_thread(self._tokenizer.decode, list(tokens))
        return text

    def echoed(
        self, asked: ChatRequest | TextRequest, prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        """The texts of the prompts, where the answer is to begin with them; else none."""
        if not isinstance(asked, TextRequest) or not asked.echo:
            return []
        return [
            given if isinstance(given, str) else self.names.text(ids)
            for given, ids in zip(asked.prompts, prompts, strict=True)
        ]

    def _wanted(self, asked: ChatRequest | TextRequest, defaults: Defaults) -> list[Wanted]:
        self._check("logit_bias", [token for token, _ in asked.logit_bias])
        self._check("stop_token_ids", asked.stop_token_ids or ())
        schema = schema_of(asked.response_format)
        grammar, field = self._grammar_of(asked, schema)
        if schema and asked.ignore_eos:
            raise unsupported("ignore_eos", "is not for a response_format, which says when to end")
        wanted = []
        for ids in self._prompts_of(asked):
            sampling = sampling_of(asked, ids.shape[1], defaults, self._answering(asked))
            for each in choices_of(sampling, asked.choices):
                kept = grammar and self._grammars.constraint(grammar, ids.shape[1], field)
                wanted.append(Wanted(ids, each, kept or None))
        return wanted

    def _grammar_of(
        self, asked: ChatRequest | TextRequest, schema: dict[str, Any] | None
    ) -> tuple[str, str]:
        """The grammar that an answer is kept to, empty where there is none, and the field of the
        request that asks for it."""
        if schema:
            return self._grammars.of_schema(schema), guided.FIELD
        if not isinstance(asked, ChatRequest) or not (tools := asked.forced_tools):
            return "", ""
        several = asked.tool_choice == "required" and asked.parallel_tool_calls is not False
        form = self._form()
        grammar = grammar_of(tools, form, self._tokenizer, several=several)
        return grammar, forced_calls.FIELD

    def _form(self) -> CallForm:
        if (form := call_form(self._tokenizer, self._turn)) is None:
            raise unsupported(
                forced_calls.FIELD,
                "cannot be enforced with this model, whose chat template writes no calls as JSON "
                'between marks: "auto" or "none"',
            )
        return form

    def _answering(self, asked: ChatRequest | TextRequest) -> Answering:
        if not isinstance(asked, ChatRequest):
            return Answering(self.limit)
        turn: Turn | None = self._turn
        if asked.response_format and turn and schema_of(asked.response_format):
            turn = replace(turn, response_template=None)  # the grammar has one channel
        elif asked.forced_tools:
            turn = forced_turn(self._turn, self._form())
        elif tools := asked.usable_tools:
            if (turn := self._tool_turn) is None:
                raise unsupported(
                    "tools",
                    "cannot be read out of this model's answers: it has no response "
                    "template, and its chat template writes no calls as JSON",
                )
            turn = replace(turn, tools=tuple(tools))
        return Answering(self.limit, self._stops, turn)

    def _prompts_of(self, asked: ChatRequest | TextRequest) -> list[torch.Tensor]:
        if isinstance(asked, TextRequest):
            special = asked.add_special_tokens is not False
            return [self._encode(prompt, special) for prompt in asked.prompts]
        variables = dict(asked.chat_template_kwargs or {})
        if asked.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", asked.reasoning_effort)
        return [self._encode_chat(asked.conversation, asked.usable_tools, variables)]

    def _tokens(self, asked: TokenizeRequest) -> torch.Tensor:
        if asked.messages and asked.prompt is None:
            generation = asked.add_generation_prompt is not False
            variables = asked.chat_template_kwargs or {}
            return self._encode_chat(asked.messages, asked.tools, variables, generation)
        if asked.prompt is None or asked.messages:
            raise ApiError(400, "give prompt or messages, one of the two", param="prompt")
        return self._encode(asked.prompt, asked.add_special_tokens is not False)

    def _encode(self, prompt: Prompt, special: bool) -> torch.Tensor:
        if isinstance(prompt, str):
            try:
                return encode(self._tokenizer, prompt, self._device, special=special)
            except RunError as error:
                raise ApiError(400, str(error), param="prompt") from error
        self._check("prompt", prompt)
        return torch.tensor([prompt], device=self._device)

    def _encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        variables: dict[str, Any],
        generation: bool = True,
    ) -> torch.Tensor:
        name = "chat_template_kwargs"
        if has_template(self._tokenizer):
            taken = template_arguments(self._tokenizer)
            for variable in variables:
                if variable in taken or not variable.isidentifier():
                    raise unsupported(f"{name}.{variable}", "is no variable of a chat template")
        try:
            return encode_chat(
                self._tokenizer,
                messages,
                self._device,
                tools=tools,
                variables=variables,
                generation=generation,
            )
        except RunError as error:
            param = "tools" if "tools" in str(error) else "messages"
            raise ApiError(400, str(error), param=param) from error

    def _check(self, name: str, tokens: Sequence[int]) -> None:
        if wrong := [token for token in tokens if not 0 <= token < self._n_tokens]:
            raise ApiError(
                400,
                f"there is no token {wrong[0]}: the model has 0 to {self._n_tokens - 1}",
                param=name,
            )
