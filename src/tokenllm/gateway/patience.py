"""How long a client waits: the SDKs say so in a header. Nobody computes for a client that has given up."""

from math import inf

from starlette.datastructures import Headers
from starlette.types import Scope

READ_TIMEOUT = "x-stainless-read-timeout"  # seconds without a byte, as the SDK's HTTP client counts them


def patience_of(scope: Scope) -> float:
    """The seconds in which the client wants to read something; for ever if it does not say, or makes no sense."""
    try:
        seconds = float(Headers(scope=scope).get(READ_TIMEOUT, inf))
    except ValueError:
        return inf
    return seconds if seconds > 0 else inf
