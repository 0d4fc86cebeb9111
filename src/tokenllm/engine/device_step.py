"""A step on the GPU: every buffer it touches, and the launches that compute it, in terms of what stands in `words`.

Nothing here looks at a value: shapes are those of a bucket, what is real and what padding is read on the device, so
a step can be captured as CUDA graphs. Its body ends with the hidden states of the tokens that are followed by a sampled
one; the head makes logits and tokens of them. Where all tokens decode and share nothing, both are one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenllm.models.decoder import Decoder
from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling, decode_attention, plan_decode
from tokenllm_kernels.gpu.inputs import (
    CONTEXT_ALIGNMENT,
    SampleInputs,
    StepInputs,
    StepLayout,
    adopt_prefixes,
    build_inputs,
    find_context_slots,
    gather_contexts,
)
from tokenllm_kernels.gpu.prefill_attention import ChunkTable, prefill_attention
from tokenllm_kernels.gpu.prefill_hopper import (
    HopperTiling,
    PrefillChunks,
    is_available,
    most_tiles,
    prefill_attention_hopper,
)
from tokenllm_kernels.gpu.sampling import SamplingTable, SamplingWorkspace, sample_rows, take_rules
from tokenllm_kernels.gpu.shared_prefix import PrefixLayout, PrefixPartials, prefix_attention

HOPPER_HEAD_DIMS = (64, 128)
LEAST_CONTEXTS = 1 << 16  # tokens, a few kilobytes each
ENDING = 3  # the word that tells how many prompts end in the step


@dataclass(frozen=True)
class Limits:
    """The largest step: requests, positions of one request, prompt tokens and chunks of prompts."""

    rows: int
    positions: int
    prompt_tokens: int
    chunks: int

    @property
    def tokens(self) -> int:
        return self.rows + self.prompt_tokens

    @property
    def context_tokens(self) -> int:
        """Of all chunks' contexts: of the longest request, or of many that begin with a prefix computed before."""
        return max(self.positions, LEAST_CONTEXTS) + self.prompt_tokens

    @property
    def context_room(self) -> int:
        """What they take in the workspace."""
        return self.context_tokens + CONTEXT_ALIGNMENT * self.chunks


class DeviceStep:
    """Buffers for steps of a decoder within limits, without KV memory: that takes what they leave."""

    def __init__(self, decoder: Decoder, limits: Limits) -> None:
        device = decoder.embedding.device
        self.decoder, self.limits = decoder, limits
        self.layout = StepLayout(limits.rows, limits.chunks, limits.prompt_tokens, limits.context_tokens)
        self.words = torch.zeros(self.layout.words, dtype=torch.int32, device=device)
        self.index = torch.zeros(limits.rows, limits.positions, dtype=torch.int32, device=device)
        self.table = SamplingTable.empty(limits.rows, decoder.vocab_size, device)
        self.tokens = torch.empty(limits.rows, dtype=torch.int32, device=device)
        self.logits = torch.empty(limits.rows, decoder.vocab_size, dtype=decoder.dtype, device=device)
        self._hidden = torch.empty(limits.rows, decoder.embedding.shape[1], dtype=decoder.dtype, device=device)
        self.prompt_hidden = torch.zeros(limits.tokens, self._hidden.shape[1], dtype=decoder.dtype, device=device)
        self._workspace = SamplingWorkspace.empty(limits.rows, decoder.vocab_size, device)
        self._samples = SampleInputs.empty(limits.rows, device)
        self._inputs = StepInputs.empty(limits.tokens, device)
        tiling = DecodeTiling.of(decoder.dtype, decoder.head_dim, device)
        self._decodes = DecodePlan.empty(limits.rows, decoder.heads, decoder.kv_heads, decoder.head_dim, tiling, device)
        prefixes = PrefixLayout.of(limits.rows, decoder.heads, decoder.kv_heads)
        words = torch.zeros(prefixes.words, dtype=torch.int32, device=device)
        self.prefixes = PrefixPartials.empty(words, prefixes, decoder.heads, decoder.head_dim)
        if self.gathers:
            shape = (limits.context_room, decoder.kv_heads, 2, decoder.head_dim)
            self._contexts = torch.zeros(shape, dtype=decoder.dtype, device=device)
            self._context_slots = torch.zeros(limits.context_room, dtype=torch.int32, device=device)

    @cached_property
    def gathers(self) -> bool:
        """Whether prefill copies contexts together for the Hopper kernel."""
        decoder = self.decoder
        return (
            is_available(decoder.embedding.device)
            and decoder.dtype.itemsize == 2
            and decoder.head_dim in HOPPER_HEAD_DIMS
        )

    def decode(self, kv: Sequence[Tensor], rows: int) -> None:
        """All of a step of up to `rows` decodes that share nothing."""
        self._sample(self._layers(kv, rows, 0, gather=False, share=False))

    def body(self, kv: Sequence[Tensor], tokens: int, samples: int, chunks: int, *, gather: bool) -> None:
        """All layers for `tokens` tokens, up to the hidden states of `samples` of them. `chunks` 0: decodes alone. What
        `prefixes` name is read once for all decodes that share it.
        """
        x = self._layers(kv, tokens, chunks, gather=gather, share=True)
        torch.index_select(x, 0, self._samples.places[:samples], out=self._hidden[:samples])
        if chunks:
            self.prompt_hidden[:tokens].copy_(x)

    def _layers(self, kv: Sequence[Tensor], tokens: int, chunks: int, *, gather: bool, share: bool) -> Tensor:
        decoder, inputs = self.decoder, self._inputs.first(tokens)
        sequences = min(tokens, self.limits.rows)
        spare, prefixes = len(kv[0]) - 1, self.prefixes if share else None
        build_inputs(
            self.words, self.layout, self.table.last_token, self.index, spare, inputs, self._samples, self._decodes,
            sequences,
        )  # fmt: skip
        plan_decode(self._decodes, sequences, decoder.kv_heads, prefixes)
        if chunks:
            adopt_prefixes(self.words, self.layout, self.index, chunks)
            take_rules(self.words[self.layout.rules :], self.words[ENDING:], chunks, self.table)
        if chunks and gather:
            find_context_slots(self.words, self.layout, self.index, self._context_slots)

        def attend(q: Tensor, memory: Tensor) -> Tensor:
            out = q.new_empty(tokens, decoder.heads, decoder.head_dim)
            if prefixes:
                prefix_attention(q, memory, self.index, prefixes)
            decode_attention(q, memory, self.index, self._decodes, out, prefixes)
            if chunks and gather:
                gather_contexts(self.words, self._context_slots, memory, self._contexts)
                tiles = most_tiles(tokens, chunks)
                prefill_attention_hopper(q, self._contexts, self._tiled_chunks, tiles, out, HopperTiling())
            elif chunks:
                prefill_attention(q, memory, self.index, self._chunks, tokens, out)
            return out.flatten(1)

        return decoder.hidden(inputs.ids, inputs.positions, inputs.slots, kv, attend)

    def logits_at(self, places: Tensor) -> Tensor:
        """Of these tokens of the newest body, which read prompts."""
        return self.decoder.logits(self.prompt_hidden.index_select(0, places))

    def head(self, samples: int) -> None:
        """Logits and tokens of the first `samples` rows that sample, or are padding, after a `body`."""
        self._sample(self._hidden[:samples])

    def _sample(self, hidden: Tensor) -> None:
        samples = len(hidden)
        rows, positions = self._samples.rows[:samples], self._samples.positions[:samples]
        logits = self.decoder.logits(hidden, out=self.logits[:samples])
        sample_rows(logits, rows, positions, self.table, self.tokens[:samples], self._workspace)

    def _columns(self, offset: int, length: int, count: int) -> Tensor:
        return self.words[offset : offset + count * length].view(count, length)

    @cached_property
    def _chunks(self) -> ChunkTable:
        return ChunkTable(*self._columns(self.layout.chunk_columns, self.limits.chunks, 4))

    @cached_property
    def _tiled_chunks(self) -> PrefillChunks:
        chunks = self.limits.chunks
        _, starts, counts, ends, contexts = self._columns(self.layout.chunk_columns, chunks, 5)
        tiles = self.words[self.layout.tile_starts :][: chunks + 1]
        return PrefillChunks(tiles, starts, counts, ends, contexts)
