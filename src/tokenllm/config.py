"""The settings of `tokenllm serve`, frozen: one field per flag, and what each child process is told at birth."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec

from tokenllm.ring import RingFds

Device: TypeAlias = Literal["auto", "cuda", "cpu"]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat: TypeAlias = Literal["auto", "dummy"]
PolicyName: TypeAlias = Literal["conservative", "lightllm", "past-future", "tokenllm"]

INT32_MAX = 2**31 - 1
CPU_RUNNING, CUDA_RUNNING = 64, 512  # requests in one batch where nobody says how many
CPU_CHUNK, CUDA_CHUNK = 512, 2048  # prompt tokens in one step, likewise


def _flag(help: str, *, ge: float | None = None, le: float | None = None, secret: bool = False) -> msgspec.Meta:
    return msgspec.Meta(description=help, ge=ge, le=le, extra={"secret": True} if secret else None)


_DEFAULT_MODEL = _flag("folder, .gguf file or hub ORG/NAME; empty means the embedded default")
_MODEL_LEN = _flag("longest prompt plus completion, in tokens; 0 means the model's own", ge=0, le=INT32_MAX)
_TOTAL_TOKENS = _flag("KV memory, in tokens; 0 means measured from free memory", ge=0, le=INT32_MAX)
_QUEUED_REQUESTS = _flag("requests waiting for room before 429", ge=0, le=INT32_MAX)
_QUEUED_TOKENS = _flag("prompt tokens waiting for room before 429", ge=0, le=INT32_MAX)
_DTYPE = _flag("arithmetic; auto is bfloat16 on a GPU, float32 with float16 weights on a CPU")
_RUNNING = _flag(f"requests in one batch; 0 means {CPU_RUNNING} on a CPU, {CUDA_RUNNING} on a GPU", ge=0, le=4096)
_PREFILL_CHUNK = _flag(
    f"prompt tokens computed in one step; 0 means {CPU_CHUNK} on a CPU, {CUDA_CHUNK} on a GPU", ge=0, le=INT32_MAX
)
_DRAIN = _flag("seconds that running streams get to finish after SIGTERM", ge=0, le=86400)
_RING = _flag("size of each ring, rounded up to a power of two", ge=1 << 16, le=1 << 30)


class ServeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting of the server, its default and its meaning; flags are the field names with dashes."""

    model: Annotated[str, _DEFAULT_MODEL] = ""
    served_model_name: Annotated[str, _flag("the name clients use; empty means the model's own")] = ""
    host: Annotated[str, _flag("address to listen on")] = "127.0.0.1"
    port: Annotated[int, _flag("port to listen on; 0 takes a free one", ge=0, le=65535)] = 8000
    api_key: Annotated[str, _flag("key that clients must send as 'Authorization: Bearer KEY'", secret=True)] = ""
    api_key_file: Annotated[str, _flag("file with one accepted key per line")] = ""
    allow_no_auth: Annotated[bool, _flag("listen on a non-loopback address without any key")] = False
    chat_template: Annotated[str, _flag("Jinja file that replaces the model's own chat template")] = ""
    device: Annotated[Device, _flag("where the model runs")] = "auto"
    dtype: Annotated[Dtype, _DTYPE] = "auto"
    load_format: Annotated[LoadFormat, _flag("dummy makes random weights of the config's shape")] = "auto"
    max_model_len: Annotated[int, _MODEL_LEN] = 0
    max_total_tokens: Annotated[int, _TOTAL_TOKENS] = 0
    max_running_requests: Annotated[int, _RUNNING] = 0
    max_queued_requests: Annotated[int, _QUEUED_REQUESTS] = 1024
    max_queued_tokens: Annotated[int, _QUEUED_TOKENS] = 1_000_000
    prefill_chunk_tokens: Annotated[int, _PREFILL_CHUNK] = 0
    policy: Annotated[PolicyName, _flag("who is admitted when")] = "tokenllm"
    gateway_processes: Annotated[int, _flag("HTTP processes sharing the port", ge=1, le=64)] = 1
    drain_s: Annotated[float, _DRAIN] = 30.0
    ring_bytes: Annotated[int, _RING] = 1 << 24


def accepted_keys(config: ServeConfig) -> frozenset[str]:
    """The keys a client may show; none at all means that nobody is asked for one."""
    keys = {config.api_key} if config.api_key else set()
    if config.api_key_file:
        lines = Path(config.api_key_file).read_text(encoding="utf-8").splitlines()
        from_file = {line.strip() for line in lines} - {""}
        if not from_file:
            raise ValueError("the file holds no key")
        keys |= from_file
    return frozenset(keys)


class GatewayBirth(msgspec.Struct, frozen=True):
    """What a gateway process reads from its standard input, as JSON."""

    config: ServeConfig
    model_path: str
    model_name: str
    slot: int
    incarnation: int
    supervisor_pid: int
    listen_fd: int
    control_fd: int
    page_fds: tuple[int, ...]  # the pages of all processes
    own_page: int  # an index into them
    responses_path: str  # of the store that the gateways share


class SchedulerBirth(msgspec.Struct, frozen=True):
    config: ServeConfig
    model_path: str
    generation: int
    supervisor_pid: int
    inboxes: tuple[RingFds, ...]  # ring A of each gateway slot
    outbox: RingFds  # ring B
    page_fd: int


class DetokenizerBirth(msgspec.Struct, frozen=True):
    config: ServeConfig
    model_path: str
    generation: int
    supervisor_pid: int
    inbox: RingFds  # ring B
    outboxes: tuple[RingFds, ...]  # ring C of each gateway slot
    page_fd: int
