"""From a decoder on a GPU to a warm runner: buffers, KV memory of what they leave, and all graphs."""

import torch
from triton.runtime.errors import OutOfResources

from tokenllm.engine.cuda_runner import CudaRunner
from tokenllm.engine.device_step import DeviceStep, Limits
from tokenllm.engine.graphs import LEAST_CHUNKS, TOKENS_PER_CHUNK
from tokenllm.engine.runner import warm_up
from tokenllm.models.decoder import Decoder
from tokenllm.models.weights import Progress
from tokenllm_kernels import LogitsRule

MOST_CHUNKS = 128
GRAPH_BYTES = 600 << 20  # what the driver takes for some ninety graphs, with something to spare
FREE_SHARE = 0.01  # of the card, left alone: the driver fails in strange ways where nothing is left


def start_cuda(
    decoder: Decoder, rows: int, prompt_tokens: int, context: int, wanted: int, progress: Progress
) -> tuple[CudaRunner, int]:
    """A runner for `rows` requests and `prompt_tokens` of prompts in a step, and the tokens of its KV memory: `wanted`,
    or as many as fit. A MemoryError says what there is no room for.
    """
    _refuse_what_no_kernel_serves(decoder)
    torch.cuda.set_stream(torch.cuda.Stream())
    try:
        kv_tokens = _measure(decoder, limits_of(rows, prompt_tokens, context), wanted)
        limits = limits_of(rows, prompt_tokens, min(context, kv_tokens))
        step, kv = DeviceStep(decoder, limits), decoder.kv_memory(kv_tokens)
        runner = CudaRunner(step, kv, progress)
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"the GPU's memory is too small: {error}") from error
    except OutOfResources as error:
        raise ValueError(f"this GPU is too small for the model's kernels: {error}") from error
    tokens = min(limits.positions, limits.prompt_tokens, 64)
    warm_up(runner, tokens, LogitsRule(seed=0), logprobs=20)
    warm_up(runner, tokens, LogitsRule(seed=0, logit_bias=((0, 0.0),)))
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
    largest = limits.tokens, limits.rows, limits.chunks
    step.body(decoder.kv_memory(limits.tokens), *largest, gather=step.gathers)
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
