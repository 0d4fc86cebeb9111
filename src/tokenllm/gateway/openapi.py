"""The OpenAPI document: generated from the very types that requests are parsed into and answers are made of.

An operation has the statuses that it can really give. What any server of HTTP/1.1 may say to a request that is none
(400, 405, 431, 505), or to one with a body where none belongs (408, 413), is no operation's.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from tokenllm import __version__
from tokenllm.gateway.endpoints import Endpoint
from tokenllm.gateway.guard import ANTHROPIC_PATH, OPEN_PATHS
from tokenllm_schemas.anthropic import AnthropicError
from tokenllm_schemas.errors import RETRIED, ErrorEnvelope
from tokenllm_schemas.meanings import MEANINGS

Json: TypeAlias = dict[str, Any]

ERRORS = {
    400: "The request is wrong; the message names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model, or nothing of that name is stored.",
    408: "The body took too long, or the answer took longer than the client said it would wait.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests wait.",
    500: "The server failed on this request.",
    503: "The model is loading, or the server is overloaded or shutting down.",
}
WITH_EVERY_METHOD = {500}
BEHIND_THE_KEY = {401, 503}
WITH_A_BODY = {400, 408, 413}
REQUEST_ID = {
    "description": "Of this request: the client's own, if it sent one of up to 64 letters, digits, dots, - and _.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
}
RETRY_AFTER = {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}
CHALLENGE = {"schema": {"const": "Bearer"}}
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A server that was given no keys asks for none."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "The same key."},
}
REFERENCE = "#/components/schemas/{name}"


def document(endpoints: Sequence[Endpoint]) -> bytes:
    """The body of `GET /openapi.json`."""
    answers = _Answers(endpoints)
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        paths.setdefault(_public(endpoint.path), {})[endpoint.method.lower()] = _operation(endpoint, answers)
    described = {
        "openapi": "3.2.0",
        "info": {"title": "tokenllm", "version": __version__, "description": "A server for large language models."},
        "security": [{name: []} for name in KEYS],
        "paths": paths,
        "components": {
            "securitySchemes": KEYS,
            "schemas": {**_bodies(endpoints), **answers.components},
        },
    }
    return msgspec.json.encode(described)


class _Answers:
    """The schemas of what is answered."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        types = [one.answer for one in endpoints if isinstance(one.answer, type)]
        types += [one.chunk for one in endpoints if one.chunk]
        types += [ErrorEnvelope, AnthropicError]
        self._types = types
        self._schemas, self.components = msgspec.json.schema_components(types, ref_template=REFERENCE)

    def schema(self, type: Any) -> Json:
        return self._schemas[self._types.index(type)]


def statuses(endpoint: Endpoint) -> list[int]:
    """What the operation may answer instead of what was asked for."""
    behind_the_key = BEHIND_THE_KEY if endpoint.path not in OPEN_PATHS else set()
    with_a_body = WITH_A_BODY if endpoint.method == "POST" else set()
    with_json = {415} if endpoint.body else set()
    return sorted({*endpoint.errors, *WITH_EVERY_METHOD, *behind_the_key, *with_a_body, *with_json})


def _public(path: str) -> str:
    """The path without starlette's converters."""
    return path.replace(":path}", "}")


def _operation(endpoint: Endpoint, answers: _Answers) -> Json:
    refusals = {str(status): _refusal(endpoint, status, answers) for status in statuses(endpoint)}
    operation: Json = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "parameters": [*_path_parameters(endpoint), *_queries(endpoint)],
        "responses": {**_success(endpoint, answers), **refusals},
    }
    if endpoint.body:
        reference = {"$ref": REFERENCE.format(name=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    if endpoint.path in OPEN_PATHS:
        operation["security"] = []
    return operation


def _path_parameters(endpoint: Endpoint) -> Iterable[Json]:
    for name in re.findall(r"{(\w+)", endpoint.path):
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _queries(endpoint: Endpoint) -> Iterable[Json]:
    for query in endpoint.query:
        yield {"name": query.name, "in": "query", "description": query.meaning, "schema": query.schema}


def _success(endpoint: Endpoint, answers: _Answers) -> Json:
    if endpoint.answer is None:
        return {}
    content: Json
    if isinstance(endpoint.answer, str):
        content = {endpoint.answer: {}}
    else:
        content = {"application/json": {"schema": answers.schema(endpoint.answer)}}
    if endpoint.chunk:
        content["text/event-stream"] = {"itemSchema": _event(endpoint, answers)}
    return {"200": {"description": endpoint.summary, "headers": {"x-request-id": REQUEST_ID}, "content": content}}


def _event(endpoint: Endpoint, answers: _Answers) -> Json:
    """One server-sent event."""
    kinds = [answers.schema(endpoint.chunk), *([answers.schema(ErrorEnvelope)] if endpoint.done else [])]
    written = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
    data = {"anyOf": [written, *([{"const": "[DONE]"}] if endpoint.done else [])]}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}


def _refusal(endpoint: Endpoint, status: int, answers: _Answers) -> Json:
    envelope = AnthropicError if endpoint.path.startswith(ANTHROPIC_PATH) else ErrorEnvelope
    headers: Json = {"x-request-id": REQUEST_ID}
    if status in RETRIED:
        headers["retry-after"] = RETRY_AFTER
    if status == 401:
        headers["www-authenticate"] = CHALLENGE
    content = {"application/json": {"schema": answers.schema(envelope)}}
    return {"description": ERRORS[status], "headers": headers, "content": content}


def _bodies(endpoints: Sequence[Endpoint]) -> Json:
    bodies: list[tuple[type[BaseModel], JsonSchemaMode]]
    bodies = [(endpoint.body, "validation") for endpoint in endpoints if endpoint.body]
    _, described = models_json_schema(bodies, ref_template=REFERENCE.replace("{name}", "{model}"))
    for endpoint in endpoints:
        if endpoint.body:
            _explain(described["$defs"][endpoint.body.__name__]["properties"])
    return described["$defs"]


def _explain(fields: dict[str, Json]) -> None:
    for name, field in fields.items():
        if name in MEANINGS:
            field.setdefault("description", MEANINGS[name])
