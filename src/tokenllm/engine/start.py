"""From a model path to a warm runner: device and precision, weights, KV memory sized from what is free."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenllm.checkpoint.description import ModelDescription, describe
from tokenllm.config import CPU_CHUNK, CPU_RUNNING, CUDA_CHUNK, CUDA_RUNNING, ServeConfig
from tokenllm.engine.runner import CpuRunner, Runner, warm_up
from tokenllm.host_memory import available_bytes
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Precision, Progress, load_decoder, open_weights
from tokenllm_kernels import LogitsRule

KV_SHARE_OF_MEMORY = 0.5  # of what is free once the weights are loaded; the rest is for activations and for others


class DeviceFault(Exception):
    """The GPU failed, or ran out of memory: nothing that it still holds can be trusted."""


@contextmanager
def device_faults() -> Iterator[None]:
    """Turn what torch says of a failing GPU into a DeviceFault."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceFault(f"the GPU ran out of memory: {_first_line(error)}") from error
    except torch.AcceleratorError as error:
        raise DeviceFault(f"the GPU failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@dataclass(frozen=True)
class BatchSize:
    """What one step may hold: requests, and tokens of their prompts."""

    rows: int
    prompt_tokens: int


CPU_BATCH, CUDA_BATCH = BatchSize(CPU_RUNNING, CPU_CHUNK), BatchSize(CUDA_RUNNING, CUDA_CHUNK)


@dataclass(frozen=True)
class Engine:
    """A runner that is ready to serve, and what was learned on the way."""

    runner: Runner[Any]
    batch: BatchSize
    kv_tokens: int
    max_model_len: int
    eos_ids: frozenset[int]


def start_engine(config: ServeConfig, path: Path, progress: Progress) -> Engine:
    """Load the model; a ValueError, CheckpointError or MemoryError says what cannot be served."""
    torch.set_num_threads(usable_cores())
    description, device = describe(path), _device(config)
    precision, batch = _precision(config, device), _batch(config, device)
    context = _context(config, description)
    source = open_weights(path, description, device, dummy=config.load_format == "dummy", dtype=precision.activations)
    decoder = load_decoder(source, description, precision, device, context, progress("loading weights"))
    del source  # files stay mapped as long as it lives
    if device.type == "cuda":
        from tokenllm.engine.cuda_start import start_cuda  # needs Triton

        runner, kv_tokens = start_cuda(
            decoder, batch.rows, batch.prompt_tokens, context, config.max_total_tokens, progress
        )
    else:
        runner, kv_tokens = _start_cpu(decoder, batch, context, config.max_total_tokens)
    return Engine(runner, batch, kv_tokens, min(context, kv_tokens), description.eos_ids)


def _start_cpu(decoder: Decoder, batch: BatchSize, context: int, wanted: int) -> tuple[CpuRunner, int]:
    kv_tokens = _kv_tokens(decoder, wanted, batch.rows * context)
    context = min(context, kv_tokens)
    runner = CpuRunner(decoder, kv_tokens, batch.rows, context)
    warm_up(runner, min(context, batch.prompt_tokens), LogitsRule(seed=0, temperature=0.0))
    return runner, kv_tokens


def usable_cores() -> int:
    """Cores this process may really use: torch's choice, less what affinity or a container's quota forbids."""
    allowed = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


def _device(config: ServeConfig) -> torch.device:
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, and torch finds no GPU it can use")
    return torch.device("cuda", torch.cuda.current_device())


def _precision(config: ServeConfig, device: torch.device) -> Precision:
    if config.dtype != "auto":
        return Precision(getattr(torch, config.dtype))
    if device.type == "cuda":
        return Precision(torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16)
    return Precision(torch.float32, half_weights=True)


def _batch(config: ServeConfig, device: torch.device) -> BatchSize:
    usual = CUDA_BATCH if device.type == "cuda" else CPU_BATCH
    return BatchSize(config.max_running_requests or usual.rows, config.prefill_chunk_tokens or usual.prompt_tokens)


def _context(config: ServeConfig, description: ModelDescription) -> int:
    """The longest sequence. A sliding window is not implemented: beyond it the model would see what it must not."""
    longest = description.max_position_embeddings
    if description.sliding_window:
        longest = min(longest, description.sliding_window)
    if config.max_model_len > longest:
        raise ValueError(f"max_model_len: {config.max_model_len} is more than the model's {longest}")
    return config.max_model_len or longest


def _kv_tokens(decoder: Decoder, wanted: int, useful: int) -> int:
    """The tokens of KV memory that were asked for; else as many as fit, but no more than could ever be used."""
    per_token, available = decoder.kv_bytes_per_token, available_bytes()
    if wanted * per_token > available:
        needed = f"KV memory for {wanted} tokens takes {wanted * per_token} bytes"
        raise MemoryError(f"max_total_tokens: {needed}, {available} are available")
    measured = int(available * KV_SHARE_OF_MEMORY) // per_token
    if measured < 1:
        raise MemoryError(f"no memory for KV: one token takes {per_token} bytes, {available} are available")
    return wanted or min(measured, useful)
