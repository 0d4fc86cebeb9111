"""The inputs of a step, built on the device from one short array of words that the host sends.

The host knows rows, positions and slots; the device knows which token each row sampled last. `build_inputs` puts the
two together, enters the new slots in the index table, and pads to the size of the graph; `adopt_prefixes` enters those
that others have computed. `StepLayout` says where in the words each column stands:

    counts │ decodes: rows, positions, slots │ chunks: rows … │ last chunks: which, rules │ prompt: ids, slots, prefixes
    ├─ all that a step of decodes needs ─────┤                                                    as long as needed ──┤
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenllm_kernels.gpu.decode_attention import DecodePlan
from tokenllm_kernels.gpu.sampling import RULE_WORDS

COUNTS = 8  # words: decodes, prompt tokens, room of all contexts in the workspace, prompts that end here
CONTEXT_ALIGNMENT = 128  # a context's room in the workspace: no tile of prefill attention reaches into its neighbour's

_COUNTS = tl.constexpr(COUNTS)


@dataclass(frozen=True)
class StepLayout:
    """Offsets into the words of one step."""

    rows: int
    chunks: int
    prompt_tokens: int
    context_tokens: int  # prefixes of all chunks together are no longer

    @property
    def chunk_columns(self) -> int:
        """rows, first tokens in the batch, counts, ends, first tokens in the workspace, tokens of the adopted prefix,
        where its slots stand in the words. Empty chunks follow, which begin where the last one ends.
        """
        return COUNTS + 3 * self.rows

    @property
    def tile_starts(self) -> int:
        """The last of the columns, with an end."""
        return self.chunk_columns + 7 * self.chunks

    @property
    def last_chunks(self) -> int:
        """Which chunks end a prompt."""
        return self.tile_starts + self.chunks + 8

    @property
    def rules(self) -> int:
        """How each of these samples, as `sampling.write_rules` says."""
        return self.last_chunks + self.chunks

    @property
    def prompt(self) -> int:
        """ids, then slots of the prompt tokens of this step; slots of adopted prefixes."""
        return self.rules + RULE_WORDS * self.chunks

    @property
    def words(self) -> int:
        return self.prompt + 2 * self.prompt_tokens + self.context_tokens


@dataclass(frozen=True)
class StepInputs:
    """What a forward pass reads, [tokens] each, int32."""

    ids: Tensor
    positions: Tensor
    slots: Tensor

    @classmethod
    def empty(cls, tokens: int, device: torch.device) -> "StepInputs":
        return cls(*(torch.zeros(tokens, dtype=torch.int32, device=device) for _ in range(3)))

    def first(self, tokens: int) -> "StepInputs":
        return StepInputs(self.ids[:tokens], self.positions[:tokens], self.slots[:tokens])


@dataclass(frozen=True)
class SampleInputs:
    """Who samples, [rows] each, int32: the decodes, then the prompts that end here, then padding."""

    rows: Tensor  # of the batch, -1 is padding
    places: Tensor  # of the tokens whose successors are sampled, among the tokens of the step
    positions: Tensor  # of the tokens that are sampled

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "SampleInputs":
        return cls(*(torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(3)))


@triton.jit
def _inputs_kernel(
    words, last_token, index, ids, positions, slots, lengths, sequence_rows, sample_rows, sample_places,
    sample_positions, tokens, sequences, rows, chunk_columns, last_chunks, prompt, spare_slot, index_stride,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    decodes, prompt_tokens = tl.load(words), tl.load(words + 1)
    decode = i < decodes
    row = tl.load(words + _COUNTS + i, mask=decode, other=0)
    position = tl.load(words + _COUNTS + rows + i, mask=decode, other=0)
    slot = tl.load(words + _COUNTS + 2 * rows + i, mask=decode, other=0)
    token = tl.load(last_token + row, mask=decode, other=0)
    tl.store(lengths + i, tl.where(decode, position + 1, 0), mask=i < sequences)
    tl.store(sequence_rows + i, row, mask=i < sequences)
    columns = words + chunk_columns
    ends = (i >= decodes) & (i < decodes + tl.load(words + 3))
    last = columns + tl.load(words + last_chunks + i - decodes, mask=ends, other=0)
    tl.store(sample_rows + i, tl.where(decode, row, tl.load(last, mask=ends, other=-1)), mask=i < rows)
    after = tl.load(last + CHUNKS, mask=ends, other=0) + tl.load(last + 2 * CHUNKS, mask=ends, other=1)
    tl.store(sample_places + i, tl.where(decode, i, after - 1), mask=i < rows)
    following = tl.where(decode, position + 1, tl.load(last + 3 * CHUNKS, mask=ends, other=0))
    tl.store(sample_positions + i, following, mask=i < rows)
    there = (i >= decodes) & (i < decodes + prompt_tokens)
    if prompt_tokens > 0:  # in a step without any, the columns are of some earlier step
        starts = tl.load(columns + CHUNKS + tl.arange(0, CHUNKS))
        mine = columns + tl.maximum(tl.sum((starts[None, :] <= i[:, None]).to(tl.int32), 1) - 1, 0)
        source = words + prompt + i - decodes
        token = tl.where(there, tl.load(source, mask=there, other=0), token)
        slot = tl.where(there, tl.load(source + prompt_tokens, mask=there, other=0), slot)
        row = tl.where(there, tl.load(mine), row)
        before = tl.load(mine + 3 * CHUNKS) - tl.load(mine + 2 * CHUNKS)
        position = tl.where(there, before + i - tl.load(mine + CHUNKS), position)
    real = decode | there
    tl.store(index + row.to(tl.int64) * index_stride + position, slot, mask=real)
    tl.store(ids + i, token, mask=i < tokens)
    tl.store(positions + i, position, mask=i < tokens)
    tl.store(slots + i, tl.where(real, slot, spare_slot), mask=i < tokens)


def build_inputs(
    words: Tensor, layout: StepLayout, last_token: Tensor, index: Tensor, spare_slot: int, inputs: StepInputs,
    samples: SampleInputs, decode: DecodePlan, sequences: int,
) -> None:  # fmt: skip
    """Fill `inputs`, padded with token 0 at the spare slot, `samples`, and lengths and rows of the first `sequences`
    of `decode`.

    words [layout.words] int32; last_token [rows] int32; index [rows, positions] int32, which learns the new slots.
    """
    tokens, block = len(inputs.ids), 128
    _inputs_kernel[(triton.cdiv(max(tokens, layout.rows), block),)](
        words, last_token, index, inputs.ids, inputs.positions, inputs.slots, decode.lengths, decode.rows,
        samples.rows, samples.places, samples.positions, tokens, sequences, layout.rows, layout.chunk_columns,
        layout.last_chunks, layout.prompt, spare_slot, index.stride(0), BLOCK=block, CHUNKS=layout.chunks,
    )  # fmt: skip


@triton.jit
def _adopt_kernel(words, index, columns, chunks, index_stride, BLOCK: tl.constexpr):
    mine = words + columns + tl.program_id(0)
    row, count = tl.load(mine).to(tl.int64), tl.load(mine + 5 * chunks)
    slots = words + tl.load(mine + 6 * chunks)
    for start in tl.range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        slot = tl.load(slots + i, mask=i < count, other=0)
        tl.store(index + row * index_stride + i, slot, mask=i < count)


def adopt_prefixes(words: Tensor, layout: StepLayout, index: Tensor, chunks: int) -> None:
    """Enter in `index` where the prefixes lie that the first `chunks` chunks begin with."""
    _adopt_kernel[(chunks, 4)](words, index, layout.chunk_columns, layout.chunks, index.stride(0), BLOCK=1024)


@triton.jit
def _context_slots_kernel(
    words, index, context_slots, chunk_columns, capacity, index_stride, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    total = tl.minimum(tl.load(words + 2), capacity)
    chunk = tl.arange(0, CHUNKS)
    columns = words + chunk_columns
    begins = tl.load(columns + 4 * CHUNKS + chunk)  # of padding: where the last context's room ends
    for start in tl.range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        mine = tl.maximum(tl.sum((begins[None, :] <= i[:, None]).to(tl.int32), 1) - 1, 0)
        row = tl.load(columns + mine).to(tl.int64)
        position = i - tl.load(columns + 4 * CHUNKS + mine)
        there = (i < total) & (position < tl.load(columns + 3 * CHUNKS + mine))
        slot = tl.load(index + row * index_stride + position, mask=there, other=-1)
        tl.store(context_slots + i, slot, mask=i < total)


def find_context_slots(words: Tensor, layout: StepLayout, index: Tensor, context_slots: Tensor) -> None:
    """The slot of every token of every chunk's context, in the order of the workspace, into `context_slots` int32; -1
    for the rest of a context's room.
    """
    _context_slots_kernel[(128,)](
        words, index, context_slots, layout.chunk_columns, len(context_slots), index.stride(0),
        BLOCK=32, CHUNKS=layout.chunks,
    )  # fmt: skip


@triton.jit
def _gather_kernel(
    words, context_slots, kv, workspace, capacity, ROW: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    total = tl.minimum(tl.load(words + 2), capacity)
    column = tl.arange(0, WIDTH)[None, :]
    inside = column < ROW
    for start in tl.range(tl.program_id(0) * BLOCK, total, tl.num_programs(0) * BLOCK, num_stages=3):
        i = start + tl.arange(0, BLOCK)
        slot = tl.load(context_slots + tl.minimum(i, total - 1)).to(tl.int64)
        value = tl.load(kv + slot[:, None] * ROW + column, mask=inside & (slot >= 0)[:, None], other=0.0)
        tl.store(workspace + i.to(tl.int64)[:, None] * ROW + column, value, mask=(i < total)[:, None] & inside)


def gather_contexts(words: Tensor, context_slots: Tensor, kv: Tensor, workspace: Tensor) -> None:
    """Copy K and V of all contexts of one layer together, into workspace [room, kv_heads, 2, head_dim]; zeros where no
    token is: a weight of 0 would not hide what is not a number.
    """
    row = kv.shape[1] * 2 * kv.shape[3]
    width = triton.next_power_of_2(row)
    _gather_kernel[(512,)](
        words,
        context_slots,
        kv,
        workspace,
        len(workspace),
        ROW=row,
        WIDTH=width,
        BLOCK=max(1, 8192 // width),
        num_warps=4,
    )
