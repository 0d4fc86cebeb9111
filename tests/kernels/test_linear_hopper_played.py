"""The Gluon product for few tokens, its Python executed on a CPU, where a model of the hardware does all as late as it
may: copies land when they are waited for, products read shared memory when they are, CTAs come in any order. So reading
a tile too early, overwriting it too early and waiting for ever all show.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from tokenllm_kernels.gpu import linear_hopper
from tokenllm_kernels.gpu.linear_hopper import MOST_BLOCK_N, MOST_TOKENS, Cut, StreamTiling, stream_linear

HELPERS = ["_first_tile", "_holder", "_slot", "_begin_sums", "_add_up"]
HELPERS += ["_expect", "_fetch_weights", "_fetch_inputs", "_multiply"]


@dataclass
class Barrier:
    """An mbarrier of one arrival: a phase ends when it has arrived and all expected bytes have come."""

    phase: int = 0
    arrived: bool = False
    bytes_to_come: int = 0
    copies: list[Any] = field(default_factory=list)  # under way; they land in no hurry

    def expect(self, count: int) -> None:
        assert not self.arrived, "a stage is expected to fill before it is awaited"
        self.arrived, self.bytes_to_come = True, count

    def wait(self, parity: int) -> None:
        if self.phase & 1 == parity:
            for land in self.copies:
                self.bytes_to_come -= land()
            self.copies.clear()
            assert self.arrived and not self.bytes_to_come, "this wait has no end"
            self.phase, self.arrived = self.phase + 1, False
        assert self.phase & 1 != parity


@dataclass
class Shared:
    memory: Any  # a tensor or a list of barriers

    @property
    def shape(self) -> Any:
        return self.memory.shape if isinstance(self.memory, Tensor) else [len(self.memory), 1]

    def index(self, i: int) -> Any:
        return Shared(self.memory[i]) if isinstance(self.memory, Tensor) else self.memory[i]

    def permute(self, order: tuple[int, int]) -> "Shared":
        return Shared(self.memory.permute(order))


class Descriptor:
    """Of a matrix that TMA reads tiles of, with zeros around it."""

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block: list[int], layout: None) -> None:
        assert list(base.shape) == shape and list(base.stride()) == strides
        self.base, self.dtype, self.layout = base, base.dtype, layout
        self.block_type = SimpleNamespace(shape=block, nbytes=block[0] * block[1] * 2)

    def tile(self, row: int, column: int) -> Tensor:
        rows, columns = self.block_type.shape
        part = self.base[row : row + rows, column : column + columns]
        return functional.pad(part, (0, columns - part.shape[1], 0, rows - part.shape[0]))


@dataclass
class Pointer:
    memory: Tensor
    at: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, self.at + offset)


@dataclass
class Multiprocessor:
    """What the kernel's Python sees as Gluon, for one CTA."""

    program: int
    programs: int
    x: Tensor
    may_touch: bool = False  # what other kernels write
    products: list[Any] = field(default_factory=list)  # under way
    barriers: list[Barrier] = field(default_factory=list)
    float32, int32, int64 = torch.float32, torch.int32, torch.int64

    def program_id(self, axis: int) -> int:
        return self.program

    def num_programs(self, axis: int) -> int:
        return self.programs

    minimum, maximum, static_range = staticmethod(min), staticmethod(max), staticmethod(range)
    exp, zeros_like = staticmethod(torch.exp), staticmethod(torch.zeros_like)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def NVMMASharedLayout(**_: object) -> None: ...

    @staticmethod
    def NVMMADistributedLayout(*_: object) -> None: ...

    @staticmethod
    def SliceLayout(*_: object) -> None: ...

    @staticmethod
    def arange(start: int, end: int, layout: None) -> Tensor:
        return torch.arange(start, end)

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: None) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: object) -> Shared:
        if dtype == torch.int64:
            self.barriers = [Barrier() for _ in range(shape[0])]
            return Shared(self.barriers)
        return Shared(torch.full(shape, math.nan, dtype=dtype))

    def load(self, pointer: Pointer, mask: Tensor, other: float, cache_modifier: str = "") -> Tensor:
        assert self.may_touch
        at, mask = torch.broadcast_tensors(pointer.at, mask)
        return torch.where(mask, pointer.memory[torch.where(mask, at, 0)], other)

    def store(self, pointer: Pointer, value: Any, mask: Tensor | None = None) -> None:
        assert self.may_touch
        if mask is None:
            pointer.memory[pointer.at] = value
        else:
            pointer.memory[pointer.at[mask]] = value[mask]

    def atomic_add(self, pointer: Pointer, value: int, sem: str) -> int:
        assert self.may_touch and sem == "acq_rel"
        before = int(pointer.memory[pointer.at])
        pointer.memory[pointer.at] += value
        return before

    def wait_for_predecessors(self) -> None:
        self.may_touch = True

    def copy(self, desc: Descriptor, coordinates: list[int], barrier: Barrier, into: Shared, wanted: bool) -> None:
        assert self.may_touch or desc.base is not self.x
        if wanted:
            into.memory.fill_(math.nan)  # from now on it may land at any time

            def land() -> int:
                into.memory.copy_(desc.tile(*coordinates))
                return desc.block_type.nbytes

            barrier.copies.append(land)

    def multiply(self, a: Shared, b: Shared, acc: Tensor, is_async: bool) -> Tensor:
        self.products.append(lambda: acc.add_(a.memory.float() @ b.memory.float()))
        return acc

    def wait_for_products(self, num_outstanding: int, deps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        while len(self.products) > num_outstanding:
            self.products.pop(0)()
        return deps


@contextmanager
def played(processors: int, order: list[float]) -> Iterator[linear_hopper.StreamWorkspace]:
    """`stream_linear` with the model above for Gluon; `order` is that of the CTAs, as keys to sort them by."""
    sums = torch.full((processors * 4 * MOST_BLOCK_N * MOST_TOKENS,), math.nan)
    workspace = linear_hopper.StreamWorkspace(sums, torch.zeros(processors, dtype=torch.int32))
    kernel = linear_hopper._stream_kernel.fn
    with pytest.MonkeyPatch.context() as patch:

        def launch(w_desc: Descriptor, x_desc: Descriptor, *arguments: Any, **constants: Any) -> None:
            del constants["num_warps"], constants["launch_pdl"]
            pointers = [Pointer(each.view(-1)) for each in arguments[:4]]
            for program in sorted(range(ctas[0]), key=lambda each: order[each % len(order)]):
                gpu = Multiprocessor(program, ctas[0], x_desc.base)
                patch.setattr(linear_hopper, "gl", gpu)
                patch.setattr(linear_hopper, "gdc_wait", gpu.wait_for_predecessors)
                patch.setattr(linear_hopper, "tma", SimpleNamespace(async_copy_global_to_shared=gpu.copy))
                patch.setattr(linear_hopper, "warpgroup_mma", gpu.multiply)
                patch.setattr(linear_hopper, "warpgroup_mma_wait", gpu.wait_for_products)
                kernel(w_desc, x_desc, *pointers, *arguments[4:], **constants)
                assert not gpu.products and not any(b.arrived or b.copies for b in gpu.barriers), "nothing is under way"
                assert gpu.may_touch, "every CTA waits, so that who waits for this kernel waits for all before it"

        class Launcher:
            def __getitem__(self, grid: tuple[int]) -> Any:
                ctas[:] = grid
                return launch

        ctas: list[int] = []
        barriers = SimpleNamespace(
            init=lambda barrier, count: None,
            expect=lambda barrier, count, wanted: barrier.expect(count) if wanted else None,
            wait=lambda barrier, parity: barrier.wait(parity),
            MBarrierLayout=lambda: None,
        )
        patch.setattr(linear_hopper, "_stream_kernel", Launcher())
        patch.setattr(linear_hopper, "TensorDescriptor", Descriptor)
        patch.setattr(linear_hopper, "StreamWorkspace", SimpleNamespace(of=lambda device: workspace))
        patch.setattr(linear_hopper, "multiprocessors", lambda device: processors)
        patch.setattr(linear_hopper, "mbarrier", barriers)
        for name in ("barrier", "fence_async_shared", "gdc_launch_dependents"):
            patch.setattr(linear_hopper, name, lambda: None)
        for name in HELPERS:
            patch.setattr(linear_hopper, name, getattr(linear_hopper, name).fn)
        patch.setattr(linear_hopper, "gl", Multiprocessor)
        yield workspace


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 64),
    features=st.integers(1, 500),
    depth=st.integers(1, 80).map(lambda eighth: 8 * eighth),
    kind=st.sampled_from(["", "bias", "gated", "add", "bias add"]),
    block_n=st.sampled_from([64, 128]),
    ring_kb=st.sampled_from([1, 64, 160]),
    cut=st.sampled_from(["anywhere", "between blocks", "evenly"]),
    early=st.booleans(),
    processors=st.integers(1, 20),
    order=st.lists(st.floats(0, 1), min_size=20, max_size=20),
)
def test_equals_its_definition_whenever_copies_land_and_whoever_comes_last(
    tokens: int, features: int, depth: int, kind: str, block_n: int, ring_kb: int, cut: Cut,
    early: bool, processors: int, order: list[float],
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(tokens + depth)
    gated, rows = kind == "gated", features * 2 if kind == "gated" else features
    x, weight, bias, held = (
        torch.randn(shape, generator=generator).bfloat16()
        for shape in ((tokens, depth), (rows, depth), (rows,), (tokens, features))
    )
    exact = functional.linear(x.double(), weight.double(), bias.double() if "bias" in kind else None)
    if gated:
        gate, up = exact.bfloat16().double().chunk(2, dim=1)
        exact = functional.silu(gate) * up
    tiling = StreamTiling(block_n, block_k=64, ring_kb=ring_kb, cut=cut, early=early)
    with played(processors, order) as workspace:
        for _ in range(2):
            target = held.clone() if "add" in kind else torch.full_like(held, math.nan)
            place = {"add_to" if "add" in kind else "out": target}
            stream_linear(x, weight, tiling, bias=bias if "bias" in kind else None, gated=gated, **place)
            expected = exact + held.double() if "add" in kind else exact
            assert (target.double() - expected).norm() <= 1e-2 * expected.norm() + 1e-3
            assert not workspace.arrived.any(), "the next launch finds the counters at zero"
