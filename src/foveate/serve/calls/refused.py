"""RefusedRequest: a request that is not served, and why. It becomes an answer with OpenAI's form of an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: OpenAI's type of an error, by status.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}


class RefusedRequest(Exception):
    """A request that is not served: the HTTP status, a sentence, the field, and headers.

    Attributes:
        status: the HTTP status.
        parameter: the field that is to blame, or None.
        headers: headers of the answer, such as Retry-After.
    """

    def __init__(
        self, message: str, *, status: int = 400, parameter: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.parameter, self.headers = status, parameter, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return error_body(str(self), self.status, self.parameter)


def error_body(message: str, status: int, parameter: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": status}}
