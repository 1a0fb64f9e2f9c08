"""An error as OpenAI's clients expect it."""

from __future__ import annotations

from collections.abc import Mapping


class ApiError(Exception):
    """A request that cannot be answered, in OpenAI's terms."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = {
            "error": {"message": message, "type": type, "param": param, "code": code},
        }
