"""The handlers of the gateway's endpoints: from a request to its answer, one function each."""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tokenllm import __version__
from tokenllm.gateway.chat import ChatFrames, chat_completion
from tokenllm.gateway.completions import CompletionFrames, text_completion
from tokenllm.gateway.gateway import Gateway, tenant_of
from tokenllm.gateway.metrics import render
from tokenllm.gateway.patience import patience_of
from tokenllm.gateway.reply import Head, Said, total_usage, whole
from tokenllm.gateway.served_model import template_options
from tokenllm.gateway.shown import Shown, shown_for
from tokenllm.gateway.sse import ChoicesStory, EventStream, Frames
from tokenllm.messages import Submit
from tokenllm_schemas.requests import (
    INT32_MAX,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    RequestBody,
    TokenizeRequest,
)
from tokenllm_schemas.responses import Health, Model, ModelList, Text, Tokens, Usage, Version

Handler: TypeAlias = Callable[[Gateway, Request], Awaitable[ASGIApp]]


class Query(NamedTuple):
    """A parameter that may stand behind the path."""

    name: str
    schema: dict[str, Any]
    meaning: str


@dataclass(frozen=True)
class Endpoint:
    """One line of the table of endpoints: what the router and the OpenAPI document need to know."""

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    summary: str
    body: type[RequestBody] | None = None
    answer: type[msgspec.Struct] | str | None = None  # a media type, if it is no JSON of ours; None: it only refuses
    chunk: Any = None  # the type of the events of its streams
    done: bool = False  # streams fail with an error envelope, and end with [DONE] in any case
    errors: tuple[int, ...] = ()  # beside those of every endpoint with its method
    query: tuple["Query", ...] = ()


class Wording(NamedTuple):
    """How an endpoint answers."""

    kind: str  # what its answers' ids begin with
    frames: Callable[[Head, int, bool, Shown], Frames]
    whole: Callable[[Head, Sequence[Said], Usage, Shown], msgspec.Struct]


CHAT = Wording("chatcmpl", ChatFrames, chat_completion)
TEXT = Wording("cmpl", CompletionFrames, text_completion)


async def chat_completions(gateway: Gateway, request: Request) -> ASGIApp:
    arrived_s = time.monotonic()
    body = await gateway.read(ChatCompletionRequest, request)
    return await _generate(gateway, request, body, await chat_submits(gateway, request, body, arrived_s), CHAT)


async def chat_submits(
    gateway: Gateway, request: Request, body: ChatCompletionRequest, arrived_s: float
) -> list[Submit]:
    """What a conversation asks of the scheduler, in whatever words the client asked."""
    gateway.check_queue(body.choices_each())
    prompt = await chat_prompt(gateway, body)
    return gateway.submits(body, [prompt], arrived_s, tenant_of(request))


async def chat_prompt(gateway: Gateway, body: ChatCompletionRequest) -> list[int]:
    model, max_model_len = gateway.model, gateway.ready().max_model_len
    longest = max_model_len if body.truncate_prompt_tokens is None else INT32_MAX
    options = template_options(body)
    return await gateway.off_loop(model.chat_prompt, body.messages, body.shown_tools(), options, longest)


async def completions(gateway: Gateway, request: Request) -> ASGIApp:
    arrived_s = time.monotonic()
    body = await gateway.read(CompletionRequest, request)
    gateway.check_queue(len(body.prompts()) * body.choices_each())
    model, max_model_len = gateway.model, gateway.ready().max_model_len
    for text in body.prompts() if body.truncate_prompt_tokens is None else []:
        model.check_size([text] if isinstance(text, str) else [], "prompt", max_model_len)
    prompts = await gateway.off_loop(model.text_prompts, body.prompts(), "prompt")
    return await _generate(gateway, request, body, gateway.submits(body, prompts, arrived_s, tenant_of(request)), TEXT)


async def _generate(
    gateway: Gateway, request: Request, body: Generation, submits: Sequence[Submit], wording: Wording
) -> ASGIApp:
    head, usage_wanted, each = gateway.head(wording.kind), body.include_usage(), body.choices_each()
    shown = Shown((), body)
    if not shown.plain:  # prompts are decoded
        shown = await gateway.off_loop(shown_for, body, submits, gateway.model.tokenizer)
    if body.stream:
        frames = wording.frames(head, len(submits), usage_wanted, shown)
        return EventStream(gateway.circuit, submits, ChoicesStory(frames, each, usage_wanted))
    said = await all_said(gateway, request, submits)
    usage = total_usage({one.index: one.finish for one in said if one.finish}, each)
    return await gateway.worded(said, lambda: json_answer(wording.whole(head, said, usage, shown)))


async def all_said(gateway: Gateway, request: Request, submits: Sequence[Submit]) -> list[Said]:
    """The whole answer at once, choice by choice."""
    reply = gateway.circuit.submit(submits, patience_of(request.scope))
    try:
        return await whole(reply)
    finally:
        gateway.circuit.abandon(reply)


async def tokenize(gateway: Gateway, request: Request) -> ASGIApp:
    body = await gateway.read(TokenizeRequest, request)
    model, limit = gateway.model, gateway.ready().max_model_len
    if body.messages is not None:
        ids = await gateway.aside(model.chat_prompt, body.messages, body.shown_tools(), template_options(body))
    else:
        [ids] = await gateway.aside(model.text_prompts, [body.prompt or ""], "prompt", body.add_special_tokens)
    return json_answer(Tokens(ids, len(ids), limit))


async def detokenize(gateway: Gateway, request: Request) -> ASGIApp:
    body = await gateway.read(DetokenizeRequest, request)
    ids = gateway.model.known(body.tokens, "tokens")
    return json_answer(Text(await gateway.aside(gateway.model.tokenizer.decode, ids, skip_special=False)))


async def models(gateway: Gateway, request: Request) -> ASGIApp:
    return json_answer(ModelList([_model(gateway)]))


async def model(gateway: Gateway, request: Request) -> ASGIApp:
    gateway.check_name(request.path_params["id"])
    return json_answer(_model(gateway))


async def version(gateway: Gateway, request: Request) -> ASGIApp:
    return json_answer(Version(__version__))


async def live(gateway: Gateway, request: Request) -> ASGIApp:
    return json_answer(Health("live"))


async def ready(gateway: Gateway, request: Request) -> ASGIApp:
    gateway.check_progress()
    return json_answer(Health("ready"))


async def metrics(gateway: Gateway, request: Request) -> ASGIApp:
    return Response(render(gateway.pages), headers={"content-type": CONTENT_TYPE_LATEST})


def _model(gateway: Gateway) -> Model:
    name, circuit = gateway.model.name, gateway.circuit
    limit = circuit.ready.max_model_len if circuit.ready else None
    return Model(name, gateway.model.created, "tokenllm", root=name, max_model_len=limit)


def json_answer(answer: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(answer), media_type="application/json")
