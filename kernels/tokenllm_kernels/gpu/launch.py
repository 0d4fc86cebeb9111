"""Programmatic dependent launch: on Hopper and later a kernel may begin while the one before it still runs.

A kernel that is launched with `launch_pdl=True` first reads what no kernel of the step writes, its weights above all,
then says `after_predecessors`, and only then touches what others write. Every such kernel says it in every program,
whatever there is to do, so "my predecessor has ended" always means that all before it have.
"""

import torch
import triton
import triton.language as tl

from tokenllm_kernels.gpu.device import is_hopper

_PREFETCH_512: tl.constexpr = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], 512; mov.b32 $0, 0;")
_PREFETCH_2048: tl.constexpr = tl.constexpr("cp.async.bulk.prefetch.L2.global [$1], 2048; mov.b32 $0, 0;")


def dependent(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    return is_hopper(device)


@triton.jit
def let_successors_begin(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def after_predecessors(PDL: tl.constexpr):
    """All kernels before this one have ended, and what they wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def prefetch_2048(pointers, PDL: tl.constexpr):
    """Bring 2048 bytes from each of these addresses, multiples of 16, into the L2 cache."""
    if PDL:
        tl.inline_asm_elementwise(_PREFETCH_2048, "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_512(pointers, PDL: tl.constexpr):
    if PDL:
        tl.inline_asm_elementwise(_PREFETCH_512, "=r,l", [pointers.to(tl.int64)], tl.int32, is_pure=False, pack=1)
