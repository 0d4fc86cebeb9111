"""Prompts are the same everywhere and inside their bounds; a bad workload is refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.workload import CHAT_FILE, Chats, IdRange, Lengths, WorkloadError, parse_id_range, read_workload


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1), st.integers(0, 100), st.integers(1, 9))
def test_ids_stay_in_bounds_and_lengths_repeat(lengths, low, width) -> None:
    workload = Lengths("", lengths, IdRange(low, low + width))
    for number in range(-1, 2 * len(lengths)):
        prompt = workload.prompt(number)
        assert (len(prompt.ids), prompt.output_tokens) == lengths[number % len(lengths)]
        assert all(low <= id_ < low + width for id_ in prompt.ids)
        assert prompt == workload.prompt(number)


def test_ids_are_those_of_the_published_recipe() -> None:
    workload = Lengths("", [(796, 124), (281, 304)], IdRange(1000, 100000))
    assert workload.prompt(0).ids[:4] == [43264, 6862, 45506, 76748]
    assert workload.prompt(1).ids[:2] != workload.prompt(3).ids[:2]  # the same lengths, but no prompt twice


def test_the_chat_prompts_are_many_and_different() -> None:
    workload = read_workload(CHAT_FILE, IdRange(0, 1), output_tokens=64)
    assert isinstance(workload, Chats)
    assert len({json.dumps([turn.content for turn in chat]) for chat in workload.conversations}) == 40
    for chat in workload.conversations:
        assert chat[-1].role == "user"
        assert {turn.role for turn in chat} <= {"system", "user", "assistant"}


def test_a_file_of_lengths_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text('{"seed": 1, "note": "more keys are fine", "requests": [[3, 2], [1, 1]]}')
    workload = read_workload(file, IdRange(5, 6), output_tokens=64)
    assert workload.name == "w"
    assert [workload.prompt(number).ids for number in range(2)] == [[5, 5, 5], [5]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "truncated"),
        ('{"requests": []}', "requests"),
        ('{"requests": [[3, 0]]}', "$.requests[0][1]"),
        ('{"requests": [[3]]}', "$.requests[0]"),
        ('{"conversations": [[]]}', "$.conversations[0]"),
        ('{"prompts": []}', "conversations"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(WorkloadError) as refusal:
        read_workload(file, IdRange(0, 1), output_tokens=64)
    assert said in str(refusal.value) and "bad.json" in str(refusal.value)


def test_an_absent_file_and_bad_bounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"absent\.json"):
        read_workload(tmp_path / "absent.json", IdRange(0, 1), output_tokens=64)
    for bounds in ("5", "9:5", "5:5", "a:b", "-1:5"):
        with pytest.raises(WorkloadError, match="--token-ids"):
            parse_id_range(bounds)
    assert parse_id_range("5:9") == IdRange(5, 9)


def test_prompts_that_share_a_prefix_differ_after_it(tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text('{"shared_prefix_tokens": 7, "requests": [[10, 2], [5, 1]]}')
    workload = read_workload(file, IdRange(0, 1000), output_tokens=1)
    first, short, third = (workload.prompt(number).ids for number in range(3))
    assert first[:7] == third[:7] and first[7:] != third[7:] and short == first[:5]
