"""The table of endpoints, and the ASGI application made of it."""

from collections.abc import Iterable
from functools import cache

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from tokenllm.gateway import anthropic, embeddings, endpoints
from tokenllm.gateway.docs import CONTENT_SECURITY_POLICY, PAGE
from tokenllm.gateway.endpoints import Endpoint
from tokenllm.gateway.gateway import Gateway
from tokenllm.gateway.guard import DOCS_PATH, Guard, check_json, wrong_method
from tokenllm.gateway.openapi import document
from tokenllm.gateway.response_endpoints import RESPONSE_ENDPOINTS
from tokenllm_schemas.anthropic import AnthropicMessage, CountTokensRequest, MessagesRequest, TokenCountAnswer
from tokenllm_schemas.errors import ApiError
from tokenllm_schemas.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from tokenllm_schemas.responses import (
    ChatChunk,
    ChatCompletion,
    EmbeddingList,
    Health,
    Model,
    ModelList,
    Text,
    TextCompletion,
    Tokens,
    Version,
)


@cache
def _document() -> bytes:
    return document(ENDPOINTS)


async def openapi(gateway: Gateway, request: Request) -> ASGIApp:
    return Response(_document(), media_type="application/json")


async def docs(gateway: Gateway, request: Request) -> ASGIApp:
    return Response(PAGE, media_type="text/html", headers={"content-security-policy": CONTENT_SECURITY_POLICY})


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        endpoints.chat_completions,
        "The next turn of a conversation",
        ChatCompletionRequest,
        ChatCompletion,
        ChatChunk,
        done=True,
        errors=(404, 429),
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        endpoints.completions,
        "What follows a text",
        CompletionRequest,
        TextCompletion,
        TextCompletion,
        done=True,
        errors=(404, 429),
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings.create_embeddings,
        "Vectors of texts",
        EmbeddingRequest,
        EmbeddingList,
        errors=(404, 429),
    ),
    *RESPONSE_ENDPOINTS,
    Endpoint(
        "POST",
        "/v1/messages",
        anthropic.create_message,
        "The next turn of a conversation, as Anthropic's clients ask for it",
        MessagesRequest,
        AnthropicMessage,
        anthropic.MessageEvent,
        errors=(404, 429),
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_message_tokens,
        "How many tokens such a conversation has",
        CountTokensRequest,
        TokenCountAnswer,
        errors=(404,),
    ),
    Endpoint("GET", "/v1/models", endpoints.models, "The models served", answer=ModelList),
    Endpoint("GET", "/v1/models/{id:path}", endpoints.model, "One model", answer=Model, errors=(404,)),
    Endpoint(
        "POST", "/tokenize", endpoints.tokenize, "The token ids of a text", TokenizeRequest, Tokens, errors=(404,)
    ),
    Endpoint(
        "POST", "/detokenize", endpoints.detokenize, "The text of token ids", DetokenizeRequest, Text, errors=(404,)
    ),
    Endpoint("GET", "/version", endpoints.version, "The version of this server", answer=Version),
    Endpoint("GET", "/health/live", endpoints.live, "Whether this process answers", answer=Health),
    Endpoint("GET", "/health/ready", endpoints.ready, "Whether requests are served", answer=Health, errors=(503,)),
    Endpoint("GET", "/metrics", endpoints.metrics, "The numbers of the server, for Prometheus", answer="text/plain"),
    Endpoint("GET", "/openapi.json", openapi, "This description", answer="application/json"),
    Endpoint("GET", DOCS_PATH, docs, "This description, for people", answer="text/html"),
)


def application(gateway: Gateway, keys: Iterable[str]) -> Guard:
    """All endpoints, behind the guard."""
    paths = dict.fromkeys(endpoint.path for endpoint in ENDPOINTS)
    routes = [Route(path, _Answering([one for one in ENDPOINTS if one.path == path], gateway)) for path in paths]
    return Guard(Router(routes, redirect_slashes=False, default=_not_found), keys)


class _Answering:
    """The endpoints of one path as an ASGI application: errors are left to the guard."""

    def __init__(self, endpoints: Iterable[Endpoint], gateway: Gateway) -> None:
        self._endpoints: dict[str, Endpoint] = {endpoint.method: endpoint for endpoint in endpoints}
        if "GET" in self._endpoints:
            self._endpoints["HEAD"] = self._endpoints["GET"]
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self._endpoints:
            raise wrong_method(scope["method"], self._endpoints)
        endpoint = self._endpoints[scope["method"]]
        if endpoint.body:
            check_json(scope)
        answer = await endpoint.handler(self._gateway, Request(scope, receive))
        await answer(scope, receive, send)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, f"there is no {scope['path']!r} here", "not_found")
