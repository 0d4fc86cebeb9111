"""The kernels in Triton. Importing this needs Triton: it is done where there is a GPU, and by the tests."""

from tokenllm_kernels.gpu.layers import embed, rms_norm, rope_and_store, silu_mul
from tokenllm_kernels.gpu.linear import linear, linear_add, linear_silu_mul

__all__ = [
    "embed",
    "linear",
    "linear_add",
    "linear_silu_mul",
    "rms_norm",
    "rope_and_store",
    "silu_mul",
]
