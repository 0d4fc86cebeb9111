"""From a model path to a warm runner: device and precision, weights, KV memory sized from what is free."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenllm.checkpoint.description import ModelDescription, describe
from tokenllm.config import ServeConfig
from tokenllm.engine.batch import Chunk, Decodes, Plan
from tokenllm.engine.runner import CpuRunner, Runner
from tokenllm.host_memory import available_bytes
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Precision, Track, load_decoder, open_weights
from tokenllm_kernels import LogitsRule

KV_SHARE_OF_MEMORY = 0.5  # of what is free once the weights are loaded; the rest is for activations and for others


@dataclass(frozen=True)
class Engine:
    """A runner that is ready to serve, and what was learned on the way."""

    runner: Runner[Any]
    kv_tokens: int
    max_model_len: int
    eos_ids: frozenset[int]


def start_engine(config: ServeConfig, path: Path, track: Track[int]) -> Engine:
    """Load the model; a ValueError or CheckpointError says what cannot be served."""
    torch.set_num_threads(usable_cores())
    description = describe(path)
    device = _device(config)
    precision = _precision(config)
    context = _context(config, description)
    source = open_weights(path, description, device, dummy=config.load_format == "dummy", dtype=precision.activations)
    decoder = load_decoder(source, description, precision, device, context, track)
    kv_tokens = _kv_tokens(decoder, config.max_total_tokens, config.max_running_requests * context)
    context = min(context, kv_tokens)
    runner = CpuRunner(decoder, kv_tokens, config.max_running_requests, context)
    _warm_up(runner, min(context, config.prefill_chunk_tokens))
    return Engine(runner, kv_tokens, context, description.eos_ids)


def usable_cores() -> int:
    """Cores this process may really use: torch's choice, less what affinity or a container's quota forbids."""
    allowed = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    limit, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return allowed if limit == "max" else max(1, min(allowed, int(limit) // int(period)))


def _device(config: ServeConfig) -> torch.device:
    if config.device == "cuda":
        raise ValueError("device: the CUDA engine is not there yet; serve with --device cpu")
    return torch.device("cpu")


def _precision(config: ServeConfig) -> Precision:
    if config.dtype == "auto":
        return Precision(torch.float32, half_weights=True)
    return Precision(getattr(torch, config.dtype))


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


def _warm_up(runner: Runner[Any], tokens: int) -> None:
    """One prefill and one decode step, so that the first request finds every kernel prepared."""
    slots, row = np.arange(tokens, dtype=np.int32), np.zeros(1, np.int32)
    ids, rule = np.zeros(tokens - 1, np.int32), LogitsRule(seed=0, temperature=0.0)
    prefill = Plan(Decodes.none(), (Chunk(0, 0, slots[:-1], ids, True, rule, None),))
    decode = Plan(Decodes(row, row + len(ids), slots[-1:]))
    for plan in (prefill, decode) if tokens > 1 else ():
        runner.collect(runner.launch(plan))
