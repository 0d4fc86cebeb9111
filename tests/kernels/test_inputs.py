"""The inputs of a step, against a plain loop over its words."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROWS, CHUNKS, PROMPT, CONTEXT, POSITIONS, SPARE = 9, 8, 40, 100, 30, 500
steps = st.tuples(
    st.integers(0, 4),  # decodes
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=4),  # chunks: context before, tokens
).filter(lambda step: step[0] or step[1])


def room(chunk: tuple[int, int]) -> int:
    """What a context takes of the workspace: here multiples of 16, in life of 128."""
    return -(-sum(chunk) // 16) * 16


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(step=steps, padding=st.integers(0, 5))
def test_inputs_and_contexts(step: tuple[int, list[tuple[int, int]]], padding: int, device: torch.device) -> None:
    from tokenllm_kernels.gpu.decode_attention import DecodePlan, DecodeTiling
    from tokenllm_kernels.gpu.inputs import (
        COUNTS,
        SampleInputs,
        StepInputs,
        StepLayout,
        adopt_prefixes,
        build_inputs,
        find_context_slots,
        gather_contexts,
    )  # fmt: skip

    decodes, chunks = step
    layout, tokens = StepLayout(ROWS, CHUNKS, PROMPT, CONTEXT), sum(count for _, count in chunks)
    words = torch.full((layout.words,), -1, dtype=torch.int32)
    index = torch.randint(0, SPARE, (ROWS, POSITIONS), dtype=torch.int32)
    expected_index = index.clone()
    last_token = torch.randint(0, 1000, (ROWS,), dtype=torch.int32)
    rows = torch.randperm(ROWS)
    new_slots = iter(torch.randperm(SPARE).tolist())
    expected: list[tuple[int, int, int]] = []
    for i in range(decodes):
        row, position, slot = int(rows[i]), int(torch.randint(0, POSITIONS, ())), next(new_slots)
        words[COUNTS + i], words[COUNTS + ROWS + i], words[COUNTS + 2 * ROWS + i] = row, position, slot
        expected.append((int(last_token[row]), position, slot))
        expected_index[row, position] = slot
    prompt, contexts, column = [], [], layout.chunk_columns
    adopted = layout.prompt + 2 * tokens
    for i, (before, count) in enumerate(chunks):
        row, start, prefix = int(rows[decodes + i]), decodes + len(prompt), before * (i % 2)
        fields = (row, start, count, before + count, sum(map(room, chunks[:i])), prefix, adopted)
        for field, value in enumerate(fields):
            words[column + field * CHUNKS + i] = value
        for position in range(before, before + count):
            prompt.append((int(torch.randint(0, 1000, ())), row, position, next(new_slots)))
            expected_index[row, position] = prompt[-1][3]
        for position in range(prefix):
            words[adopted + position] = expected_index[row, position] = next(new_slots)
        adopted += prefix
        contexts.append((row, before + count))
    if chunks:
        for i in range(len(chunks), CHUNKS):
            for field, value in enumerate((0, decodes + tokens, 0, 0, sum(map(room, chunks)), 0, adopted)):
                words[column + field * CHUNKS + i] = value
    expected += [(token, position, slot) for token, _, position, slot in prompt] + [(0, 0, SPARE)] * padding
    for i, (token, _, _, slot) in enumerate(prompt):
        words[layout.prompt + i], words[layout.prompt + tokens + i] = token, slot
    context = sum(map(room, chunks))
    words[0], words[1], words[2] = decodes, tokens, context
    ending = [i for i in range(len(chunks)) if i % 2 == 0]
    last_chunks = [(int(rows[decodes + i]), decodes + sum(c for _, c in chunks[: i + 1]) - 1, sum(chunks[i]))
                   for i in ending]  # fmt: skip
    words[3] = len(ending)
    for i, chunk in enumerate(ending):
        words[layout.last_chunks + i] = chunk

    words, index, last_token = words.to(device), index.to(device), last_token.to(device)
    inputs = StepInputs.empty(decodes + tokens + padding, device)
    plan = DecodePlan.empty(ROWS, 2, 1, 16, DecodeTiling(16, 4, 2, 4), device)
    plan.lengths.fill_(-5)
    samples = SampleInputs.empty(ROWS, device)
    build_inputs(words, layout, last_token, index, SPARE, inputs, samples, plan, decodes + 2)
    if chunks:
        adopt_prefixes(words, layout, index, len(chunks) + 1)
    assert list(zip(inputs.ids.tolist(), inputs.positions.tolist(), inputs.slots.tolist(), strict=True)) == expected
    assert index.cpu().equal(expected_index)
    assert plan.lengths.tolist() == [e[1] + 1 for e in expected[:decodes]] + [0] * 2 + [-5] * (ROWS - decodes - 2)
    assert plan.rows[:decodes].tolist() == rows[:decodes].tolist()

    sampling = [(int(rows[i]), i, expected[i][1] + 1) for i in range(decodes)] + last_chunks
    sampling += [(-1, 0, 0)] * (ROWS - len(sampling))
    found = zip(samples.rows.tolist(), samples.places.tolist(), samples.positions.tolist(), strict=True)
    assert list(found) == sampling

    context_slots = torch.full((context + 3,), -5, dtype=torch.int32, device=device)
    find_context_slots(words, layout, index, context_slots)
    truth = []
    for (row, end), chunk in zip(contexts, chunks, strict=True):
        truth += expected_index[row, :end].tolist() + [-1] * (room(chunk) - end)
    assert context_slots.tolist() == truth + [-5] * 3
    kv = torch.randn(SPARE + 1, 2, 2, 16, device=device)
    kv[SPARE] = torch.nan
    workspace = torch.full((context + 3, 2, 2, 16), torch.nan, device=device)
    gather_contexts(words, context_slots, kv, workspace)
    slots = context_slots[:context].long()
    assert workspace[:context].equal(kv[slots.clamp(min=0)] * (slots >= 0)[:, None, None, None])
    assert workspace[context:].isnan().all()


def test_a_layout_has_room_for_everything() -> None:
    from tokenllm_kernels.gpu.inputs import COUNTS, StepLayout

    layout = StepLayout(5, 4, 7, 11)
    assert (
        COUNTS + 15
        <= layout.chunk_columns
        <= layout.tile_starts - 28
        <= layout.last_chunks - 33
        <= layout.rules - 37
        <= layout.prompt - 93
        == layout.words - 118
    )


def test_a_long_prefix_is_adopted_whole(device: torch.device) -> None:
    from tokenllm_kernels.gpu.inputs import StepLayout, adopt_prefixes

    layout, row, prefix = StepLayout(ROWS, CHUNKS, PROMPT, 10_000), 3, 9001
    words = torch.zeros(layout.words, dtype=torch.int32)
    for field, value in ((0, row), (5, prefix), (6, layout.prompt)):
        words[layout.chunk_columns + field * CHUNKS] = value
    words[layout.prompt : layout.prompt + prefix] = torch.randperm(prefix) + 1
    index = torch.zeros(ROWS, prefix + 5, dtype=torch.int32, device=device)
    adopt_prefixes(words.to(device), layout, index, 1)
    expected = torch.zeros_like(index, device="cpu")
    expected[row, :prefix] = words[layout.prompt : layout.prompt + prefix]
    assert index.cpu().equal(expected)
