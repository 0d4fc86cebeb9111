"""A plan as the words of a step: what the host tells the device, in the places that `StepLayout` names. Owns nothing.
What there is once per decode is written in columns; of prompts there are few in a step, and a loop is quicker.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenllm.engine.batch import Chunk, Plan
from tokenllm.engine.graphs import StepShape
from tokenllm_kernels.gpu.inputs import CONTEXT_ALIGNMENT, COUNTS, StepLayout
from tokenllm_kernels.gpu.prefill_hopper import BLOCK_M
from tokenllm_kernels.gpu.sampling import RULE_WORDS, write_rules

Words = NDArray[np.int32]


def write_step(words: Words, layout: StepLayout, plan: Plan, vocab: int) -> tuple[StepShape, int]:
    """Returns also how many words it takes."""
    decodes, n, rows, chunks = plan.decodes, len(plan.decodes.rows), layout.rows, plan.chunks
    words[COUNTS : COUNTS + n] = decodes.rows
    words[COUNTS + rows : COUNTS + rows + n] = decodes.positions
    words[COUNTS + 2 * rows : COUNTS + 2 * rows + n] = decodes.slots
    if not chunks:
        words[:4] = n, 0, 0, 0
        return StepShape(n, n, 0, 0, shares=bool(decodes.prefixes)), layout.chunk_columns
    contexts = _write_chunks(words, layout, chunks, n, layout.prompt + 2 * (plan.tokens - n))
    ending = _write_last_chunks(words, layout, chunks, vocab)
    words[:4] = n, plan.tokens - n, contexts, ending
    return StepShape(plan.tokens, n + ending, len(chunks), contexts), _write_tokens(words, layout.prompt, chunks)


def _write_chunks(words: Words, layout: StepLayout, chunks: Sequence[Chunk], place: int, prefixes: int) -> int:
    """Of tokens in the batch from `place` on, and prefixes in the words from `prefixes` on. Returns the room that all
    contexts take together.
    """
    table, context, tile = [], 0, 0
    for chunk in chunks:
        tokens, end, prefix = chunk.tokens, chunk.end, len(chunk.prefix)
        table.append((chunk.row, place, tokens, end, context, prefix, prefixes, tile))
        place, prefixes = place + tokens, prefixes + prefix
        context += -(-end // CONTEXT_ALIGNMENT) * CONTEXT_ALIGNMENT
        tile += -(-tokens // BLOCK_M)
    columns = words[layout.chunk_columns : layout.tile_starts + layout.chunks].reshape(-1, layout.chunks).T
    columns[: len(table)] = table
    columns[len(table) :] = 0, place, 0, 0, context, 0, prefixes, tile
    words[layout.tile_starts + layout.chunks] = tile
    return context


def _write_last_chunks(words: Words, layout: StepLayout, chunks: Sequence[Chunk], vocab: int) -> int:
    """Returns how many prompts end in this step."""
    ending = [place for place, chunk in enumerate(chunks) if chunk.samples]
    last = [chunks[place] for place in ending]
    words[layout.last_chunks : layout.last_chunks + len(last)] = ending
    rules = words[layout.rules : layout.rules + RULE_WORDS * len(last)].reshape(-1, RULE_WORDS)
    write_rules(rules, [chunk.row for chunk in last], [chunk.rule for chunk in last], vocab)
    return len(last)


def _write_tokens(words: Words, start: int, chunks: Sequence[Chunk]) -> int:
    """Returns where they end."""
    parts = [chunk.ids for chunk in chunks] + [chunk.slots for chunk in chunks] + [chunk.prefix for chunk in chunks]
    end = start + sum(map(len, parts))
    np.concatenate(parts, out=words[start:end])
    return end
