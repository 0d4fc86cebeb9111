"""From a decoder on a GPU to a warm runner: buffers, KV memory of what they leave, and all graphs."""

from collections.abc import Callable

import numpy as np
import torch

from tokenllm.engine.batch import Chunk, Decodes, Plan
from tokenllm.engine.cuda_runner import CudaRunner
from tokenllm.engine.device_step import DeviceStep, Limits
from tokenllm.engine.graphs import LEAST_CHUNKS, TOKENS_PER_CHUNK
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Track
from tokenllm_kernels import LogitsRule

MOST_CHUNKS = 128
GRAPH_BYTES = 600 << 20  # what the driver takes for some eighty graphs, with something to spare
FREE_SHARE = 0.01  # of the card, left alone: the driver fails in strange ways where nothing is left


def start_cuda(
    decoder: Decoder, rows: int, prompt_tokens: int, context: int, wanted: int, progress: Callable[[str], Track[int]]
) -> tuple[CudaRunner, int]:
    """A runner for `rows` requests and `prompt_tokens` of prompts in a step, and the tokens of its KV memory: `wanted`,
    or as many as fit. A MemoryError says what there is no room for.
    """
    _refuse_what_no_kernel_serves(decoder)
    torch.cuda.set_stream(torch.cuda.Stream())
    try:
        kv_tokens = _measure(decoder, limits_of(rows, prompt_tokens, context), wanted)
        limits = limits_of(rows, prompt_tokens, min(context, kv_tokens))
        with torch.inference_mode():
            step, kv = DeviceStep(decoder, limits), decoder.kv_memory(kv_tokens)
        runner = CudaRunner(step, kv, progress("capturing CUDA graphs"))
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory is too small: {str(error).splitlines()[0]}") from error
    _warm_up(runner, limits)
    runner.count_compilations()
    return runner, kv_tokens


def _refuse_what_no_kernel_serves(decoder: Decoder) -> None:
    head_dim = decoder.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(f"head_dim {head_dim} is not served on a GPU: its kernels want a power of two from 16 on")


def limits_of(rows: int, prompt_tokens: int, context: int) -> Limits:
    chunks = min(MOST_CHUNKS, max(LEAST_CHUNKS, (rows + prompt_tokens) // TOKENS_PER_CHUNK))
    return Limits(rows, context, prompt_tokens, 1 << chunks.bit_length() - 1)  # kernels look it up in a power of two


@torch.inference_mode()
def _measure(decoder: Decoder, limits: Limits, wanted: int) -> int:
    """Tokens of KV memory that fit beside the buffers and the largest step, which is run once to see what it takes."""
    free_before, total = torch.cuda.mem_get_info()
    step = DeviceStep(decoder, limits)
    step.body(decoder.kv_memory(limits.tokens), limits.tokens, limits.rows, limits.chunks, gather=step.gathers)
    step.head(limits.rows)
    torch.cuda.synchronize()
    taken = free_before - torch.cuda.mem_get_info()[0] - limits.tokens * decoder.kv_bytes_per_token
    del step
    torch.cuda.empty_cache()
    left = torch.cuda.mem_get_info()[0] - max(0, taken) - GRAPH_BYTES - int(total * FREE_SHARE)
    fitting = left // decoder.kv_bytes_per_token
    if max(wanted, 1) > fitting:
        asked = f"max_total_tokens: KV memory for {wanted} tokens" if wanted else "no memory for KV: a token"
        raise MemoryError(
            f"{asked} takes {max(wanted, 1) * decoder.kv_bytes_per_token} bytes, {max(left, 0)} are left on the GPU"
        )
    return wanted or min(fitting, limits.rows * limits.positions)


def _warm_up(runner: CudaRunner, limits: Limits) -> None:
    """A prompt, a step after it and its logprobs, so that what no graph holds is compiled, too."""
    tokens = min(limits.positions, limits.prompt_tokens, 64)
    slots, row = np.arange(tokens, dtype=np.int32), np.zeros(1, np.int32)
    ids = np.zeros(tokens - 1, np.int32)
    for rule, logprobs in ((LogitsRule(seed=0), 20), (LogitsRule(seed=0, logit_bias=((0, 0.0),)), None)):
        prompt = Plan(Decodes.none(), (Chunk(0, 0, slots[:-1], ids, True, rule, logprobs),))
        for plan in (prompt, Plan(Decodes(row, row + len(ids), slots[-1:]))) if tokens > 1 else ():
            runner.collect(runner.launch(plan))
