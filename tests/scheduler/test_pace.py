"""A pace that is learned from steps is that of the machine, whatever it is; and chunks keep streams to their target."""

import numpy as np
import pytest

from tokenllm.routing.learned_pace import TARGET_S, LearnedPace

GPU, CPU = (0.004, 4e-8, 2e-6, 2.5e-5), (0.01, 1e-6, 3e-3, 1.5e-3)


def learned(machine: tuple[float, ...], steps: int = 400, seed: int = 0) -> LearnedPace:
    """After so many steps, some with prompts in them, measured within 5 %; one in fifty was disturbed."""
    pace, random = LearnedPace(2048), np.random.default_rng(seed)
    for step in range(steps):
        decodes = int(random.integers(0, 65))
        load = np.array([1, decodes * random.integers(50, 500), decodes, random.integers(0, 513) * (step % 4 == 0)])
        seconds = float(load @ machine) * random.uniform(0.95, 1.05) * (30 if step % 50 == 49 else 1)
        pace.took(seconds, *load[1:].tolist())
    return pace


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_it_is_that_of_the_machine(machine: tuple[float, ...]) -> None:
    pace = learned(machine)
    for decodes, held, read in ((1, 100, 0), (64, 16_000, 0), (32, 9000, 512)):
        said = pace.step_s + pace.per_held_s * held + pace.per_decode_s * decodes + pace.per_read_s * read
        assert said == pytest.approx(float(np.array([1, held, decodes, read]) @ machine), rel=0.25, abs=0.015)


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_no_coefficient_is_negative_however_little_is_known(machine: tuple[float, ...]) -> None:
    for steps in range(1, 40):
        pace = learned(machine, steps, seed=steps)
        assert pace.step_s > 0 and pace.per_read_s > 0 and min(pace.per_held_s, pace.per_decode_s) >= 0
        assert 256 <= pace.chunk(8, 800) <= 2048


def test_prompts_take_what_the_target_leaves() -> None:
    pace = learned(GPU)
    chunk, step_s = pace.chunk(64, 16_000), 0.004 + 4e-8 * 16_000 + 2e-6 * 64
    assert step_s + chunk * 2.5e-5 == pytest.approx(TARGET_S, rel=0.25)
    assert pace.chunk(0, 0) == 2048, "nobody is delayed"


def test_on_a_slow_machine_the_streams_wait_for_no_more_than_three_steps_of_theirs() -> None:
    pace = learned(CPU)
    streams_s = 0.01 + 1e-6 * 16_000 + 3e-3 * 64
    pace.least_chunk = 1
    assert streams_s + pace.chunk(64, 16_000) * 1.5e-3 == pytest.approx(3 * streams_s, rel=0.25)
