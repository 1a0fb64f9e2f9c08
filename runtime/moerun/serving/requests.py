"""OpenAI's requests as this server takes them: one class an endpoint, whose fields are checked by
pydantic and described by it in /openapi.json.

After the API reference, https://platform.openai.com/docs/api-reference, with the fields that vLLM
and llama.cpp have in addition: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html.
A field that asks for what happens anyway is taken; one that asks for what this server cannot do is
rejected by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
)

from moerun.serving.chat import Message
from moerun.serving.fields import (
    ROLES,
    Prompt,
    biases_of,
    messages_of,
    prompts_of,
    shown,
    stop_of,
    tools_of,
)
from moerun.serving.forced_calls import forced_tools

MOST_TOP_LOGPROBS = 20
MOST_CHOICES = 128
_TEXT = {"type": "string", "minLength": 1}
_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXT, _TOKENS]}
_PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    },
}
_CALL = {
    "type": "object",
    "properties": {
        "id": {},
        "function": {
            "type": "object",
            "properties": {"name": _TEXT, "arguments": {"type": ["string", "object"]}},
            "required": ["name"],
        },
    },
    "required": ["function"],
}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [{"type": "string"}, _PARTS, {"type": "null"}]},
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tool_calls": {"anyOf": [{"type": "array", "items": _CALL}, {"type": "null"}]},
        "tool_call_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "reasoning_content": {},
    },
    "required": ["role"],
    # What else a message has depends on its role.
    "anyOf": [
        {
            "properties": {"content": {"anyOf": [{"type": "string"}, _PARTS]}},
            "required": ["content"],
        },
        {
            "properties": {
                "role": {"const": "assistant"},
                "tool_calls": {"type": "array", "items": _CALL, "minItems": 1},
            },
            "required": ["tool_calls"],
        },
    ],
}
_TOOL = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "description": {"type": "string"},
                "parameters": {"type": "object"},
            },
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}


def _only(*values: Any) -> Any:
    """A field that is honoured in these values alone, which are what happens anyway."""

    def check(value: Any) -> Any:
        # No 0 for false: "logprobs": 0 asks for something.
        if any(
            value == each and isinstance(value, bool) == isinstance(each, bool) for each in values
        ):
            return value
        allowed = " or ".join(shown(each) for each in values)
        raise ValueError(f"is not supported by this server but as {allowed}")

    schema = {"enum": [*values, None]}
    return Annotated[Any, AfterValidator(check), WithJsonSchema(schema), Field(default=None)]


def _checked(check: Any, schema: dict[str, Any]) -> Any:
    """A field of more than one type, checked by a function of `moerun.serving.fields`."""
    return Annotated[Any, PlainValidator(check), WithJsonSchema(schema)]


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Label = Annotated[Any, Field(default=None)]
Name = Annotated[str, Field(max_length=1000)]


class Body(BaseModel):
    """A request's JSON. A field that is null is as one that is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """What a stream has besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: _only(False) = None  # type: ignore[valid-type]
    continuous_usage_stats: bool | None = Field(None, description="Usage in every chunk.")


class CompletionBody(Body):
    """What requests for an answer have in common."""

    model: Name | None = None
    max_tokens: Count | None = Field(
        None,
        description="The most tokens of an answer. Default: 16 for /v1/completions, as OpenAI has "
        "it, and for a conversation what the context has room for.",
    )
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Share | None = Field(None, description="0 takes the likeliest token.")
    top_k: Annotated[int, Field(ge=-1, le=1 << 31)] | None = Field(
        None, description="Choose among the so many likeliest tokens; 0 and -1: among all."
    )
    min_p: Share | None = Field(
        None, description="Choose among tokens of this share of the likeliest's probability."
    )
    seed: int | None = Field(
        None, description="-1, or none: a random one. Others are taken modulo 2^32."
    )
    stop: _checked(stop_of, _nullable({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]})) = ()  # type: ignore[valid-type]
    stop_token_ids: Annotated[list[Count], Field(max_length=64)] | None = None
    ignore_eos: bool | None = Field(None, description="Go on past the model's end tokens.")
    min_tokens: Count | None = Field(
        None, description="No end token before so many; not more than the answer may have."
    )
    repetition_penalty: Annotated[float, Field(ge=1e-3, le=1e3)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: _checked(biases_of, _nullable({"type": "object"})) = ()  # type: ignore[valid-type]
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = Field(
        None,
        description="text, json_object or json_schema; the last two need the extra [guided].",
    )
    cache_prompt: bool | None = Field(
        None, description="false: read all of the prompt, whatever is kept of an earlier one."
    )
    return_token_ids: bool | None = Field(
        None, description="Answer with the token ids of prompt and answer, too."
    )
    # Say something about a request, and ask for nothing.
    user: Label
    metadata: Label
    service_tier: Label
    priority: Label
    request_id: Label
    name: Label
    # What happens anyway, in these values.
    best_of: _only(1)  # type: ignore[valid-type]
    store: _only(False)  # type: ignore[valid-type]
    length_penalty: _only(1)  # type: ignore[valid-type]
    early_stopping: _only(False)  # type: ignore[valid-type]
    use_beam_search: _only(False)  # type: ignore[valid-type]
    typical_p: _only(1)  # type: ignore[valid-type]
    skip_special_tokens: _only(True)  # type: ignore[valid-type]
    spaces_between_special_tokens: _only(True, False)  # type: ignore[valid-type]
    include_stop_str_in_output: _only(False)  # type: ignore[valid-type]
    detokenize: _only(True)  # type: ignore[valid-type]
    return_tokens_as_token_ids: _only(False)  # type: ignore[valid-type]

    @property
    def chat(self) -> bool:
        """Whether this asks for a turn of a conversation, not for a text's continuation."""
        return isinstance(self, ChatRequest)

    @property
    def length_field(self) -> str:
        """The field that says how long the answer may be."""
        return "max_tokens"

    @property
    def length(self) -> int | None:
        """The most tokens that the answer may have; None where the request does not say."""
        return self.max_tokens

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def top(self) -> int | None:
        """Number of likely tokens to report at each place; None: nothing is reported."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of a stream has the usage until then."""
        options = self.stream_options
        return bool(options and options.include_usage and options.continuous_usage_stats)


class ChatRequest(CompletionBody):
    """A request to /v1/chat/completions."""

    messages: _checked(messages_of, {"type": "array", "items": _MESSAGE, "minItems": 1})  # type: ignore[valid-type]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: _checked(tools_of, _nullable({"type": "array", "items": _TOOL})) = ()  # type: ignore[valid-type]
    tool_choice: Any = Field(
        None,
        description='"none", "auto", "required" (at least one call), or {"type": "function", '
        '"function": {"name": ...}} (one call of that function).',
    )
    parallel_tool_calls: bool | None = Field(
        None, description='false: a tool_choice of "required" makes one call.'
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        description="Variables for the model's chat template; those that it does not read change "
        "nothing.",
    )
    reasoning_effort: Annotated[str, Field(max_length=100)] | None = Field(
        None,
        description="A variable for the model's chat template; it changes nothing where the "
        "template does not read it.",
    )
    documents: _only([])  # type: ignore[valid-type]
    functions: _only([])  # type: ignore[valid-type]
    function_call: _only("none", "auto")  # type: ignore[valid-type]
    modalities: _only(["text"])  # type: ignore[valid-type]
    echo: _only(False)  # type: ignore[valid-type]
    add_generation_prompt: _only(True)  # type: ignore[valid-type]
    continue_final_message: _only(False)  # type: ignore[valid-type]
    add_special_tokens: _only(False)  # type: ignore[valid-type]
    safety_identifier: Label
    prompt_cache_key: Label
    prompt_cache_retention: Label
    verbosity: Label

    @property
    def length_field(self) -> str:
        """The field that says how long the answer may be."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def length(self) -> int | None:
        """The most tokens that the answer may have; None where the request does not say."""
        chosen: int | None = getattr(self, self.length_field)
        return chosen

    @property
    def top(self) -> int | None:
        """Number of likely tokens to report at each place; None: nothing is reported."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages, as chat templates take them."""
        found: tuple[Message, ...] = self.messages
        return found

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else list(self.tools)

    @property
    def forced_tools(self) -> list[dict[str, Any]]:
        """The tools of which one has to be called; none: no call is demanded. Raises ApiError."""
        return forced_tools(self.tools, self.tool_choice, written=False)


class TextRequest(CompletionBody):
    """A request to /v1/completions."""

    prompt: _checked(  # type: ignore[valid-type]
        prompts_of,
        {"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT, "minItems": 1}]},
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="Answer with the prompt before its continuation.")
    suffix: _only("")  # type: ignore[valid-type]
    add_special_tokens: bool | None = None
    prompt_logprobs: _only()  # type: ignore[valid-type]

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, each of which is continued."""
        found: list[Prompt] = self.prompt
        return found

    @property
    def top(self) -> int | None:
        """Number of likely tokens to report at each place; None: nothing is reported."""
        return self.logprobs


class TokenizeRequest(Body):
    """A request to /tokenize, as vLLM has it: the tokens of a text, or of a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: _checked(  # type: ignore[valid-type]
        messages_of, _nullable({"type": "array", "items": _MESSAGE, "minItems": 1})
    ) = ()
    tools: _checked(tools_of, _nullable({"type": "array", "items": _TOOL})) = ()  # type: ignore[valid-type]
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """A request to /detokenize, as vLLM has it: the text of tokens."""

    model: Name | None = None
    tokens: Annotated[list[Count], Field(max_length=1 << 20)]


Kind = Literal["chat", "text"]
"""A request to /v1/chat/completions or to /v1/completions."""
KINDS: dict[Kind, type[ChatRequest] | type[TextRequest]] = {
    "chat": ChatRequest,
    "text": TextRequest,
}
assert set(KINDS) == set(get_args(Kind))
