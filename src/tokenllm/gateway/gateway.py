"""What the endpoints of one gateway process work with, and the steps that they share."""

import asyncio
import secrets
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import ParamSpec, TypeVar

from msgspec.structs import replace
from starlette.requests import Request

from tokenllm import __version__
from tokenllm.checkpoint.description import SamplingDefaults
from tokenllm.counters import Page, total
from tokenllm.gateway.circuit import Circuit
from tokenllm.gateway.masks import with_masks
from tokenllm.gateway.reply import Head, Said
from tokenllm.gateway.response_store import ResponseStore
from tokenllm.gateway.served_model import ServedModel
from tokenllm.messages import Ready, Sampling, Submit, Telling
from tokenllm_schemas.errors import ApiError, busy, invalid
from tokenllm_schemas.requests import Body, Generation, parse

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

LONG_BODY = 64 * 1024  # longer ones are not parsed on the event loop
MANY_LOGPROBS = 1000  # more are not put into words on the event loop
SEED_BITS = 63
TIERS = {"flex": -10, "priority": 10, "fast": 10}  # the others are 0
STUCK_S = 30.0
LONGEST_SHOWN = 256  # of a model's name that is none


@dataclass(frozen=True)
class Gateway:
    model: ServedModel
    circuit: Circuit
    pages: Sequence[Page]
    max_queued_requests: int
    responses: ResponseStore
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "prompts"))
    spare_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "spare"))

    async def off_loop(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run what takes long in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, lambda: work(*args, **kwargs))

    async def aside(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run what may take seconds, and what no completion has to wait for."""
        return await asyncio.get_running_loop().run_in_executor(self.spare_thread, lambda: work(*args, **kwargs))

    async def read(self, kind: type[Body], request: Request) -> Body:
        """The request in a body that is asked of the model served here."""
        data = await request.body()
        body = await self.off_loop(parse, kind, data) if len(data) > LONG_BODY else parse(kind, data)
        self.check_name(getattr(body, "model", None))
        return body

    async def worded(self, said: Sequence[Said], wording: Callable[[], Result]) -> Result:
        """The answer that is made of what was said."""
        many = sum(len(one.logprobs) for one in said) > MANY_LOGPROBS
        return await self.off_loop(wording) if many else wording()

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.model.name:
            message = f"the model {name[:LONGEST_SHOWN]!r} does not exist; this server has {self.model.name!r}"
            raise ApiError(404, message, "model_not_found", param="model")

    def ready(self) -> Ready:
        """What the living generation can hold."""
        if self.circuit.ready is None:
            raise busy("the model is still loading", "loading")
        return self.circuit.ready

    def check_queue(self, choices: int) -> None:
        """An early word, before anything is tokenized; the scheduler has the last."""
        waiting = int(total(self.pages, "tokenllm_requests_waiting"))
        if waiting and waiting >= self.max_queued_requests:
            self.circuit.count_refused(choices)
            retry_after_s = max(1, int(total(self.pages, "tokenllm_retry_after_seconds")))
            message = f"the queue is full: {waiting} requests wait"
            raise ApiError(429, message, "queue_full", headers={"retry-after": str(retry_after_s)})

    def check_progress(self) -> None:
        """Ready means: the model is loaded, and what was asked of it moves on, as far as this gateway can see."""
        self.ready()
        waiting_since = self.circuit.waiting_since()
        gauges = (total(self.pages, f"tokenllm_requests_{state}") for state in ("running", "waiting"))
        last_step_s = total(self.pages, "tokenllm_last_step_monotonic_seconds")
        silent_s = time.monotonic() - max(last_step_s, self.circuit.heard_s, waiting_since or 0.0)
        if (waiting_since is not None or any(gauges)) and silent_s > STUCK_S:
            raise busy(f"requests are pending, but nothing has moved for {silent_s:.0f} s", "stuck")

    def head(self, kind: str) -> Head:
        """A new answer's."""
        return Head(f"{kind}-{secrets.token_hex(12)}", int(time.time()), self.model.name, f"tokenllm-{__version__}")

    def submits(self, body: Generation, prompts: Sequence[list[int]], arrived_s: float, tenant: str) -> list[Submit]:
        """One for each choice: those of the first prompt, then those of the second."""
        max_model_len = self.ready().max_model_len
        prompts = [truncated(prompt, max_model_len, body) for prompt in prompts]
        how = with_masks(sampling(body, self.model.sampling, 0), body, self.model)
        what, priority, stop_ids = telling(body), priority_of(body), tuple(body.stop_token_ids or ())
        return [
            Submit(
                uid=self.circuit.next_uid(),
                prompt=array("i", prompt).tobytes(),
                max_tokens=room(len(prompt), max_model_len, body),
                sampling=replace(how, seed=fitting(seed + choice)),
                ignore_eos=bool(body.ignore_eos),
                arrived_s=arrived_s,
                tenant=tenant,
                cache_salt=body.cache_salt or "",
                priority=priority,
                stop_ids=stop_ids,
                telling=what,
            )
            for prompt in prompts
            for seed in [secrets.randbits(SEED_BITS) if body.seed is None else body.seed]
            for choice in range(body.choices_each())
        ]


def tenant_of(request: Request) -> str:
    """Whose request it is: whoever shows the same key in the same headers, and who shows none."""
    keys = [request.headers[name] for name in ("authorization", "x-api-key") if request.headers.get(name)]
    return sha256("\n".join(keys).encode()).hexdigest()[:32] if keys else ""


def room(prompt_tokens: int, max_model_len: int, body: Generation) -> int:
    """How many tokens may be generated after a prompt."""
    if not prompt_tokens:  # the vocabulary may lack some bytes
        raise invalid(body.prompt_field, "has no token the model knows")
    left = max_model_len - prompt_tokens
    if left <= 0:
        message = f"{prompt_tokens} tokens are too many: the context of this model ends at {max_model_len}"
        raise invalid(body.prompt_field, message, "context_length_exceeded")
    wanted = body.token_limit()
    return left if wanted is None else max(1, min(wanted, left))


def truncated(prompt: list[int], max_model_len: int, body: Generation) -> list[int]:
    """Its end, where the client allows to forget what precedes it."""
    most = body.truncate_prompt_tokens
    if most == -1:
        most = max(1, max_model_len - max(1, body.token_limit() or 1))
    return prompt if most is None else prompt[-most:]


def telling(body: Generation) -> Telling:
    return Telling(
        stop=body.stop_strings(),
        special_tokens=body.skip_special_tokens is False,
        each_token=bool(body.return_token_ids or body.running_usage()),
        nothing=body.token_limit() == 0,
    )


def priority_of(body: Generation) -> int:
    """Higher goes first. Clients of other servers know it the other way round."""
    return TIERS.get(body.service_tier or "", 0) - (body.priority or 0)


def fitting(seed: int) -> int:
    return seed & (1 << SEED_BITS) - 1


def sampling(body: Generation, model: SamplingDefaults, seed: int) -> Sampling:
    """The client's word comes before the model's, and the model's before the usual."""
    return Sampling(
        seed=fitting(seed),
        temperature=_first(body.temperature, model.temperature, 1.0),
        top_p=_first(body.top_p, model.top_p, 1.0),
        top_k=max(0, _first(body.top_k, model.top_k, 0)),
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        logprobs=body.alternatives(),
        min_p=body.min_p or 0.0,
        repetition_penalty=body.repetition_penalty or body.repeat_penalty or 1.0,
        prompt_logprobs=body.prompt_alternatives(),
    )


def _first(given: Result | None, recommended: Result | None, usual: Result) -> Result:
    if given is not None:
        return given
    return usual if recommended is None else recommended
