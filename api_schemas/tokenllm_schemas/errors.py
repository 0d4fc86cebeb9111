"""What a client is told when there is no answer: one exception, one envelope, and the words the OpenAI SDK knows.

{"error": {"message": "...", "type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}
"""

from typing import Final

import msgspec

TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    505: "invalid_request_error",
}
RETRIED: Final = (429, 503)  # answers that say when to come again


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """The body of every answer from 400 upwards, and the data of an error event in a stream."""

    error: ErrorBody


class ApiError(Exception):
    """An answer from 400 upwards. The message is shown to people: it names the field and the value.

    One that asks to come again says when, in `retry-after`: after a second, unless `headers` know better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = TYPES[status]
        self.param = param
        self.code = code
        self.headers = {**({"retry-after": "1"} if status in RETRIED else {}), **(headers or {})}

    def envelope(self) -> bytes:
        body = ErrorBody(message=self.message, type=self.type, param=self.param, code=self.code)
        return msgspec.json.encode(ErrorEnvelope(body))


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """The client's fault: `message` says what is wrong with the field `param`."""
    return ApiError(400, f"{param}: {message}", code, param=param)


def unsupported(param: str, message: str) -> ApiError:
    """A promise that this server does not make: to ignore the field would be to break it silently."""
    return invalid(param, message, "unsupported_parameter")


def busy(message: str, code: str = "overloaded") -> ApiError:
    """No room now."""
    return ApiError(503, message, code)
