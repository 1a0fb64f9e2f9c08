"""An OpenAPI description of this server, made of what checks its requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from moerun.serving.requests import (
    ChatRequest,
    DetokenizeRequest,
    TextRequest,
    TokenizeRequest,
)

_STRING: dict[str, Any] = {"type": "string"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_JSON = "application/json"
_REFERENCE = "#/components/schemas/"


def _object(**fields: Any) -> dict[str, Any]:
    """An object that has all of these fields, and perhaps more."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _list(of: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_ENDING = {"enum": ["stop", "length", "tool_calls", "cancelled"]}
_MESSAGE = _object(role={"const": "assistant"}, content=_or_null(_STRING))
_LOGPROBS = _or_null({"type": "object"})
_CHOICE = {"index": _COUNT, "logprobs": _LOGPROBS, "finish_reason": _ENDING}
_CARD = _object(id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING)
SCHEMAS: dict[str, dict[str, Any]] = {
    "Error": _object(
        error=_object(
            message=_STRING, type=_STRING, param=_or_null(_STRING), code=_or_null(_STRING)
        )
    ),
    "ChatAnswer": _object(
        id=_STRING,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_STRING,
        choices=_list(_object(message=_MESSAGE, **_CHOICE)),
        usage=_USAGE,
    ),
    "TextAnswer": _object(
        id=_STRING,
        object={"const": "text_completion"},
        created=_COUNT,
        model=_STRING,
        choices=_list(_object(text=_STRING, **_CHOICE)),
        usage=_USAGE,
    ),
    "Model": _CARD,
    "Models": _object(object={"const": "list"}, data=_list(_CARD)),
    "Tokens": _object(count=_COUNT, max_model_len=_or_null(_COUNT), tokens=_list(_COUNT)),
    "Text": _object(prompt=_STRING),
    "Health": _object(status=_STRING),
}
_ERRORS = {
    "400": "A field is wrong, or asks for what this server cannot do: the error names the field.",
    "404": "There is no such model.",
    "408": "The request did not come in time.",
    "413": "The request is too long.",
    "431": "The head of the request is too long.",
    "429": "The queue is full: Retry-After says when to come back.",
    "500": "The answer failed.",
    "503": "The server is shutting down.",
}


def _answer(schema: str, description: str = "The answer.", **more: Any) -> dict[str, Any]:
    content = {_JSON: {"schema": {"$ref": f"{_REFERENCE}{schema}"}}, **more}
    return {"description": description, "content": content}


def _answers(schema: str, *codes: str, keyed: bool, **more: Any) -> dict[str, Any]:
    errors = {code: _answer("Error", _ERRORS[code]) for code in (*codes, "431")}
    if keyed:
        errors["401"] = _answer("Error", "The key is wrong or missing.")
    return {"200": _answer(schema, **more), **errors}


def _post(
    kind: type[BaseModel], schema: str, summary: str, *codes: str, keyed: bool, **more: Any
) -> dict[str, Any]:
    reference = {"schema": {"$ref": f"{_REFERENCE}{kind.__name__}"}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {_JSON: reference}},
        "responses": _answers(schema, "400", "404", "408", "413", *codes, keyed=keyed, **more),
    }


def describe(version: str, *, keyed: bool) -> dict[str, Any]:
    """The description as OpenAPI 3.1 has it; ``keyed``: requests need a key."""
    kinds = (ChatRequest, TextRequest, TokenizeRequest, DetokenizeRequest)
    _, made = models_json_schema(
        [(kind, "validation") for kind in kinds], ref_template=_REFERENCE + "{model}"
    )
    stream: dict[str, Any] = {"text/event-stream": {}}
    generating = ("429", "500", "503")
    name = {"name": "name", "in": "path", "required": True, "schema": _STRING}

    def get(schema: str, summary: str, *codes: str, keyed: bool = keyed) -> dict[str, Any]:
        return {"summary": summary, "responses": _answers(schema, *codes, keyed=keyed)}

    def post(kind: type[BaseModel], schema: str, summary: str, *codes: str, **more: Any) -> Any:
        return {"post": _post(kind, schema, summary, *codes, keyed=keyed, **more)}

    paths: dict[str, Any] = {
        "/v1/chat/completions": post(
            ChatRequest, "ChatAnswer", "Answer a conversation.", *generating, **stream
        ),
        "/v1/completions": post(
            TextRequest, "TextAnswer", "Continue a text.", *generating, **stream
        ),
        "/v1/models": {"get": get("Models", "The models there are.")},
        "/v1/models/{name}": {"get": get("Model", "A model.", "404"), "parameters": [name]},
        "/tokenize": post(TokenizeRequest, "Tokens", "The tokens of a text or a conversation."),
        "/detokenize": post(DetokenizeRequest, "Text", "The text of tokens."),
        "/health": {"get": get("Health", "Whether it serves.", "503", keyed=False)},
    }
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "moerun serve", "version": version},
        "paths": paths,
        "components": {"schemas": {**SCHEMAS, **made["$defs"]}},
    }
    if keyed:
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        described["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return described
