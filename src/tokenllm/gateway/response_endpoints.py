"""The handlers of `/v1/responses`: a response is a chat completion that may go on from one that is remembered."""

import re
import secrets
import time
from collections.abc import Sequence
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response as Answer
from starlette.types import ASGIApp

from tokenllm.gateway.endpoints import Endpoint, Query, all_said, chat_prompt, chat_submits, json_answer
from tokenllm.gateway.gateway import Gateway, tenant_of
from tokenllm.gateway.guard import LARGEST_BODY
from tokenllm.gateway.reply import Said
from tokenllm.gateway.response_prompt import (
    ResponseAsChat,
    as_chat_that_fits,
    conversation,
    items_named,
    listed,
    named_as_asked,
)
from tokenllm.gateway.response_store import Stored
from tokenllm.gateway.response_stream import ResponseStory
from tokenllm.gateway.response_wording import ResponseFrames, begun, ended
from tokenllm.gateway.sse import EventStream
from tokenllm_schemas.errors import ApiError, invalid, unsupported
from tokenllm_schemas.response_object import AnyEvent, DeletedResponse, InputTokens, ItemList, Response
from tokenllm_schemas.response_request import (
    InputItem,
    InputTokensRequest,
    ItemReference,
    ResponsePrompt,
    ResponseRequest,
)

KEY_BYTES = 12
REFERENCE = re.compile(rf"[a-z]+_([0-9a-f]{{{2 * KEY_BYTES}}})[io][0-9]+")  # an item's id begins with its response's
MOST_LISTED, USUALLY_LISTED = 100, 20


async def create_response(gateway: Gateway, request: Request) -> ASGIApp:
    arrived_s = time.monotonic()
    body = await gateway.read(ResponseRequest, request)
    items = await _items(gateway, body, tenant_of(request))
    with named_as_asked():
        [submit] = await chat_submits(gateway, request, await _chat(gateway, body, items), arrived_s)
    response = begun(body, f"resp_{secrets.token_hex(KEY_BYTES)}", submit)
    finish = partial(_finished, gateway, submit.tenant, items, response)
    if body.stream:
        return EventStream(gateway.circuit, [submit], ResponseStory(ResponseFrames(response), finish))
    [said] = await all_said(gateway, request, [submit])
    response = await finish(said)
    return await gateway.worded([said], lambda: json_answer(response))


async def response(gateway: Gateway, request: Request) -> ASGIApp:
    if request.query_params.get("stream", "false") != "false":
        raise unsupported("stream", "only responses made with background: true can be streamed later")
    return Answer((await _stored(gateway, request)).answer, media_type="application/json")


async def delete_response(gateway: Gateway, request: Request) -> ASGIApp:
    id = request.path_params["id"]
    if not await gateway.responses.forget(id, tenant_of(request)):
        raise _unknown(id)
    return json_answer(DeletedResponse(id))


async def cancel_response(gateway: Gateway, request: Request) -> ASGIApp:
    """What is stored has ended, and what runs is nobody's but its connection's."""
    await _stored(gateway, request)
    message = "only responses made with background: true can be cancelled; others end when their connection is closed"
    raise ApiError(400, message, "invalid_value", param="id")


async def response_input_items(gateway: Gateway, request: Request) -> ASGIApp:
    stored = await _stored(gateway, request)
    return await gateway.aside(lambda: json_answer(_page(msgspec.json.decode(stored.items), request)))


async def response_input_tokens(gateway: Gateway, request: Request) -> ASGIApp:
    body = await gateway.read(InputTokensRequest, request)
    with named_as_asked():
        chat = await _chat(gateway, body, await _items(gateway, body, tenant_of(request)))
        return json_answer(InputTokens(len(await chat_prompt(gateway, chat))))


async def _chat(gateway: Gateway, body: ResponsePrompt, items: Sequence[InputItem]) -> ResponseAsChat:
    return await gateway.off_loop(as_chat_that_fits, gateway.model, body, items, gateway.ready().max_model_len)


async def _finished(
    gateway: Gateway, tenant: str, items: Sequence[InputItem], so_far: Response, said: Said
) -> Response:
    """The response of what was said. It is stored, unless that is not wanted or there is no room for it."""
    response = await gateway.worded([said], lambda: ended(so_far, said))
    if not response.store:
        return response
    key = response.id.removeprefix("resp_")
    stored = Stored(msgspec.json.encode(response), await gateway.off_loop(listed, items, key))
    kept = await gateway.responses.keep(response.id, tenant, stored)
    return msgspec.structs.replace(response, store=kept)


async def _items(gateway: Gateway, body: ResponsePrompt, tenant: str) -> list[InputItem]:
    """The whole conversation: what went before, and what is new, without references."""
    earlier = []
    if body.previous_response_id is not None:
        stored = await gateway.responses.find(body.previous_response_id, tenant)
        if stored is None:
            raise _unknown(body.previous_response_id, "previous_response_id")
        earlier = await gateway.off_loop(conversation, stored)
    items = body.items()
    referred = await _referred(gateway, items, tenant)
    return earlier + [referred[item.id] if isinstance(item, ItemReference) else item for item in items]


async def _referred(gateway: Gateway, items: Sequence[InputItem], tenant: str) -> dict[str, InputItem]:
    """The stored items that these refer to, by their ids. Together they are no larger than a body may be."""
    params: dict[str, str] = {}
    for index, item in enumerate(items):
        if isinstance(item, ItemReference):
            param = f"input[{index}].id"
            if params.setdefault(item.id, param) != param:
                raise invalid(param, f"the item {item.id!r} is referred to twice")
    found, size = {}, 0
    for key in dict.fromkeys(match[1] for id in params if (match := REFERENCE.fullmatch(id))):
        if stored := await gateway.responses.find(f"resp_{key}", tenant):
            some, their_size = await gateway.off_loop(items_named, stored, params.keys())
            found |= some
            size += their_size
        if size > LARGEST_BODY:
            message = f"the items that are referred to are larger than {LARGEST_BODY} bytes"
            raise invalid("input", message, "context_length_exceeded")
    if missing := next((id for id in params if id not in found), None):
        param = params[missing]
        raise ApiError(404, f"{param}: there is no stored item {missing!r}", "item_not_found", param=param)
    return found


async def _stored(gateway: Gateway, request: Request) -> Stored:
    id = request.path_params["id"]
    stored = await gateway.responses.find(id, tenant_of(request))
    if stored is None:
        raise _unknown(id)
    return stored


def _unknown(id: str, param: str = "id") -> ApiError:
    return ApiError(404, f"{param}: there is no stored response {id!r}", "response_not_found", param=param)


def _page(items: list[dict], request: Request) -> ItemList:
    """The part of a list that the query asks for."""
    asked = request.query_params
    limit = _limit(asked.get("limit", str(USUALLY_LISTED)))
    match asked.get("order", "desc"):
        case "desc":
            items = items[::-1]
        case "asc":
            pass
        case other:
            raise invalid("order", f"must be asc or desc (got {other!r})")
    ids = [item["id"] for item in items]
    after = asked.get("after")
    if after is not None and after not in ids:
        raise invalid("after", f"there is no item {after!r} in this list")
    first = ids.index(after) + 1 if after is not None else 0
    shown = items[first : first + limit]
    ends = (shown[0]["id"], shown[-1]["id"]) if shown else ("", "")
    return ItemList(shown, *ends, has_more=first + limit < len(items))


def _limit(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MOST_LISTED:
        raise invalid("limit", f"must be a number from 1 to {MOST_LISTED} (got {text!r})")
    return int(text)


RESPONSE_ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/responses",
        create_response,
        "What a model answers to the items of a conversation",
        ResponseRequest,
        Response,
        AnyEvent,
        errors=(404, 429),
    ),
    Endpoint(
        "POST",
        "/v1/responses/input_tokens",
        response_input_tokens,
        "How many tokens a model would read",
        InputTokensRequest,
        InputTokens,
        errors=(404,),
    ),
    Endpoint(
        "GET",
        "/v1/responses/{id}",
        response,
        "A stored response",
        answer=Response,
        errors=(400, 404),
        query=(Query("stream", {"const": "false"}, "Whether to stream it: no longer."),),
    ),
    Endpoint(
        "DELETE",
        "/v1/responses/{id}",
        delete_response,
        "Forgets a stored response",
        answer=DeletedResponse,
        errors=(404,),
    ),
    Endpoint(
        "POST",
        "/v1/responses/{id}/cancel",
        cancel_response,
        "Is refused: nothing runs in the background",
        errors=(404,),
    ),
    Endpoint(
        "GET",
        "/v1/responses/{id}/input_items",
        response_input_items,
        "What a stored response was an answer to",
        answer=ItemList,
        errors=(400, 404),
        query=(
            Query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}, "The most items to list."),
            Query("order", {"enum": ["asc", "desc"]}, "The oldest or the newest first."),
            Query("after", {"type": "string"}, "The id of the item before the first one."),
        ),
    ),
)
