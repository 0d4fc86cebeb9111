"""Everything that crosses a ring, and nothing else.

    gateway ── A: Submit, Abort ──▶ scheduler ── B: Ready, Begin, Vector, Step, Refused ──▶ detokenizer
       ▲                                                                                        │
       └──────────────────────────────── C: Ready, Texts, Refused ──────────────────────────────┘

A uid names one choice of one request. Every `Submit` that enters ring A leaves ring C with exactly
one last word: a `Delta` with a `Finish`, or a `Refused`. Token ids travel as raw little-endian int32.
"""

from typing import Literal, TypeAlias

import msgspec

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
Pooling: TypeAlias = Literal["mean", "last"]  # of the hidden states of which tokens a vector is made
STILL_RUNNING = 0
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "abort", "error")  # Step.finished is 1 + the index here


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A frame on a ring: tagged by its class name, encoded as a msgpack array."""


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 is off; the seed is never absent."""

    seed: int  # 0 <= seed < 2**63, made up by the gateway when the client gave none
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None  # also report the chosen token's logprob and that many alternatives
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, added to its logit), each id once; minus infinity masks it
    only_biased: bool = False  # ids that logit_bias does not name are masked
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of two ids or more that are never said
    muted: tuple[int, ...] = ()  # ids that are masked until there are `min_tokens`
    min_tokens: int = 0
    prompt_logprobs: int | None = None  # report those of the prompt too, from its second token on


class Telling(msgspec.Struct, frozen=True, array_like=True):
    """How the detokenizer tells what was generated. The scheduler carries it along in `Begin`."""

    stop: tuple[str, ...] = ()  # strings that end the text
    special_tokens: bool = False  # they show in the text
    each_token: bool = False  # `Delta.logprobs` lists every token, also without logprobs
    nothing: bool = False  # only the prompt's logprobs were asked for: the one token that was generated is not told


class Submit(Message, frozen=True):
    """A gateway asks for one completion; or for the vector of a prompt, which ends when the prompt is read."""

    uid: int
    prompt: bytes  # int32 ids, at least one
    max_tokens: int  # at least 1; prompt and max_tokens together fit the context
    sampling: Sampling
    ignore_eos: bool = False
    arrived_s: float = 0.0  # time.monotonic() in the gateway
    tenant: str = ""  # whose request it is: tenants never share what was computed
    cache_salt: str = ""  # a tenant's own word for who may share
    adapter: str | None = None  # refused for now
    media: bytes | None = None  # refused for now
    priority: int = 0  # higher goes first
    stop_ids: tuple[int, ...] = ()  # end the completion beside the model's own, whatever `ignore_eos` says
    telling: Telling = Telling()
    pooling: Pooling | None = None  # a vector is asked for: nothing is generated, whatever `max_tokens` says


class Abort(Message, frozen=True):
    """Stop working on this uid: its client left, or a stop string was found. Unknown uids are ignored."""

    uid: int


class GatewayLost(Message, frozen=True):
    """The supervisor speaks for a dead gateway: abort all its uids."""

    slot: int
    incarnation: int


class Ready(Message, frozen=True):
    """The model is loaded. Goes round the circle, so that it proves the whole of it; again after `GatewayLost`."""

    generation: int
    kv_tokens_capacity: int
    max_model_len: int


class Begin(Message, frozen=True):
    """A request was accepted: what the detokenizer needs to turn its ids into text."""

    uid: int
    prompt_tokens: int
    telling: Telling = Telling()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """The raw model's log-probability of one generated token and of the likeliest alternatives."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first


class Step(Message, frozen=True):
    """One step of the whole batch. Ragged: `counts[i]` of the `ids` belong to `uids[i]`."""

    uids: tuple[int, ...]
    counts: tuple[int, ...]
    ids: bytes  # int32, sum(counts) of them
    finished: tuple[int, ...]  # per uid: STILL_RUNNING, or 1 + an index into FINISH_REASONS
    cached_tokens: tuple[int, ...]  # per uid: prompt tokens that were not computed
    logprobs: dict[int, tuple[TokenLogprob, ...]] = {}  # uid → one per id, for those who asked
    prompt_logprobs: dict[int, tuple[TokenLogprob, ...]] = {}  # uid → the next ones of its prompt; before all else here


class Vector(Message, frozen=True):
    """A part of a prompt's vector, which comes before its last word. The parts, in order, are all of it."""

    uid: int
    values: bytes  # little-endian float32; of any length, as a vector


class Refused(Message, frozen=True):
    """The last word for a `Submit` that never ran. `status` is the HTTP status to answer with."""

    uid: int
    status: int
    code: str
    message: str
    retry_after_s: int = 0  # 0: trying again is no use, or nobody knows when


class TokenText(msgspec.Struct, frozen=True, array_like=True):
    """One token as clients see it in `logprobs`: `bytes_` are its exact bytes, `text` their lossy decoding."""

    text: str
    bytes_: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()
    id: int = -1
    top_ids: tuple[int, ...] = ()


class Finish(msgspec.Struct, frozen=True, array_like=True):
    """How a completion ended and what it cost."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    by_stop_string: bool = False  # the scheduler may not know yet: the gateway sends the Abort


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New text of one uid. `tokens` ids stand behind it, also when they show no text yet. The first of `logprobs` are
    the prompt's, where they were asked for. `vector` is a part of its vector, which may be empty.
    """

    uid: int
    text: str
    tokens: int
    logprobs: tuple[TokenText, ...] = ()
    finish: Finish | None = None
    vector: bytes = b""  # little-endian float32


class Texts(Message, frozen=True):
    """All new text for one gateway."""

    deltas: tuple[Delta, ...]


Inbound: TypeAlias = Submit | Abort | GatewayLost  # ring A
Midway: TypeAlias = Ready | Begin | Vector | Step | Refused  # ring B
Outbound: TypeAlias = Ready | Texts | Refused  # ring C

SLOT_BITS, INCARNATION_BITS, COUNTER_BITS = 8, 24, 32


def make_uid(slot: int, incarnation: int, counter: int) -> int:
    """A uid no other gateway process, living or dead, has ever used (64 bits, unsigned)."""
    counter &= (1 << COUNTER_BITS) - 1
    return (slot << INCARNATION_BITS | incarnation) << COUNTER_BITS | counter


def gateway_of(uid: int) -> tuple[int, int]:
    """The (slot, incarnation) of the gateway that made this uid."""
    return uid >> (INCARNATION_BITS + COUNTER_BITS), uid >> COUNTER_BITS & (1 << INCARNATION_BITS) - 1
