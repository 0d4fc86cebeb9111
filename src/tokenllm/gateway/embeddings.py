"""`/v1/embeddings`: vectors of texts, made of the hidden states of the model that is served. What comes round the
circle is as long as the model makes it; here it is cut, and brought to length one.
"""

import time
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import cast

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from tokenllm.gateway.endpoints import all_said
from tokenllm.gateway.gateway import Gateway, tenant_of
from tokenllm.gateway.reply import Said
from tokenllm.messages import Sampling, Submit
from tokenllm_schemas.errors import invalid
from tokenllm_schemas.requests import EmbeddingRequest
from tokenllm_schemas.responses import Embedding, EmbeddingList, EmbeddingUsage

AT_ONCE = 64  # texts of one request that are under way: more would fill the queue for everybody


async def create_embeddings(gateway: Gateway, request: Request) -> ASGIApp:
    arrived_s = time.monotonic()
    body = await gateway.read(EmbeddingRequest, request)
    dimensions = _dimensions(body, gateway.model.hidden_size)
    gateway.check_queue(len(body.inputs()))
    prompts = await _prompts(gateway, body)
    submits = [_submit(gateway, request, body, prompt, arrived_s) for prompt in prompts]
    said: list[Said] = []
    for first in range(0, len(submits), AT_ONCE):
        said += await all_said(gateway, request, submits[first : first + AT_ONCE])
    answer = await gateway.aside(_answer, said, dimensions, body.encoding_format == "base64", gateway.model.name)
    return Response(answer, media_type="application/json")


def _dimensions(body: EmbeddingRequest, most: int) -> int:
    dimensions = most if body.dimensions is None else body.dimensions
    if not 1 <= dimensions <= most:
        raise invalid("dimensions", f"must be from 1 to {most}, the length of this model's vectors (got {dimensions})")
    return dimensions


async def _prompts(gateway: Gateway, body: EmbeddingRequest) -> list[list[int]]:
    """The ids of each input, none of them empty or too long."""
    model, longest = gateway.model, gateway.ready().max_model_len
    keep = body.truncate_prompt_tokens
    for text in body.inputs() if keep is None else []:
        model.check_size([text] if isinstance(text, str) else [], "input", longest)
    prompts = await gateway.off_loop(model.text_prompts, body.inputs(), "input")
    if keep is not None:
        prompts = [prompt[-(longest if keep == -1 else keep) :] for prompt in prompts]
    for index, prompt in enumerate(prompts):
        _check_length(index, len(prompt), longest)
    return prompts


def _check_length(index: int, tokens: int, longest: int) -> None:
    if not tokens:  # the vocabulary may lack some bytes
        raise invalid("input", f"has no token the model knows, at index {index}")
    if tokens > longest:
        message = f"{tokens} tokens at index {index} are too many: the context of this model ends at {longest}"
        raise invalid("input", message, "context_length_exceeded")


def _submit(
    gateway: Gateway, request: Request, body: EmbeddingRequest, prompt: Sequence[int], arrived_s: float
) -> Submit:
    return Submit(
        uid=gateway.circuit.next_uid(),
        prompt=array("i", prompt).tobytes(),
        max_tokens=1,
        sampling=Sampling(seed=0),
        arrived_s=arrived_s,
        tenant=tenant_of(request),
        cache_salt=body.cache_salt or "",
        pooling=body.pooling or "mean",
    )


def _answer(said: Sequence[Said], dimensions: int, as_base64: bool, model: str) -> bytes:
    """Serialised vector by vector: between two of them other threads have their turn."""
    told = (_embedding(index, one.vector, dimensions, as_base64) for index, one in enumerate(said))
    data = cast(list[Embedding], [msgspec.Raw(msgspec.json.encode(embedding)) for embedding in told])
    tokens = sum(one.finish.prompt_tokens for one in said if one.finish)
    return msgspec.json.encode(EmbeddingList(data, model, EmbeddingUsage(tokens, tokens)))


def _embedding(index: int, vector: bytes, dimensions: int, as_base64: bool) -> Embedding:
    values = of_length_one(np.frombuffer(vector, "<f4")[:dimensions].astype(np.float64)).astype("<f4")
    return Embedding(index, b64encode(values.tobytes()).decode() if as_base64 else values.tolist())


def of_length_one(vector: np.ndarray) -> np.ndarray:
    """A vector of nothing but zeros has no direction, and stays what it is."""
    return vector / (np.linalg.norm(vector) or 1.0)
