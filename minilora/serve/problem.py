"""What goes wrong with a request, as OpenAI's interface tells it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

KINDS = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


class Problem(Exception):
    """The answer to a request that gets no answer."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def as_object(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def wrong(param: str, message: str) -> Problem:
    """A field with a value that makes no sense, or is not supported."""
    return Problem(400, message, param, "invalid_value")
