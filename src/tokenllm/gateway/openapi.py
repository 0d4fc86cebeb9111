"""The OpenAPI document: generated from the very types that requests are parsed into and answers are made of."""

from collections.abc import Sequence
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from tokenllm import __version__
from tokenllm.gateway.endpoints import Endpoint
from tokenllm.gateway.guard import OPEN_PATHS
from tokenllm_schemas.errors import ErrorEnvelope

ERRORS = {
    "400": "The request is wrong; the message names the field.",
    "401": "The API key is missing or wrong.",
    "404": "There is no such model.",
    "405": "The path has another method.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "Too many requests wait; retry after the given seconds.",
    "500": "The server failed on this request.",
    "503": "The model is loading, overloaded or shutting down; retry after the given seconds.",
}


def document(endpoints: Sequence[Endpoint]) -> bytes:
    """The body of `GET /openapi.json`."""
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        paths.setdefault(_public(endpoint.path), {})[endpoint.method.lower()] = _operation(endpoint)
    described = {
        "openapi": "3.1.0",
        "info": {"title": "tokenllm", "version": __version__},
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(endpoints),
        },
    }
    return msgspec.json.encode(described)


def _public(path: str) -> str:
    """The path without starlette's converters."""
    return path.replace(":path}", "}")


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "summary": endpoint.summary,
        "responses": {"200": {"description": endpoint.summary, "content": _content(endpoint)}, **_errors()},
    }
    if endpoint.body:
        content = {"application/json": {"schema": _reference(endpoint.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    if "{id}" in _public(endpoint.path):
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    if endpoint.path in OPEN_PATHS:
        operation["security"] = []
    return operation


def _content(endpoint: Endpoint) -> dict[str, Any]:
    if endpoint.answer is None:
        return {"*/*": {}}
    content = {"application/json": {"schema": _reference(endpoint.answer)}}
    if endpoint.chunk:
        content["text/event-stream"] = {"schema": _reference(endpoint.chunk)}
    return content


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(ErrorEnvelope)}}
    return {status: {"description": meaning, "content": content} for status, meaning in ERRORS.items()}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _schemas(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    template = "#/components/schemas/{name}"
    bodies: list[tuple[type[BaseModel], JsonSchemaMode]]
    bodies = [(endpoint.body, "validation") for endpoint in endpoints if endpoint.body]
    answers = {kind for endpoint in endpoints for kind in (endpoint.answer, endpoint.chunk) if kind}
    _, asked = models_json_schema(bodies, ref_template=template.replace("{name}", "{model}"))
    _, answered = msgspec.json.schema_components({*answers, ErrorEnvelope}, ref_template=template)
    return {**asked["$defs"], **answered}
