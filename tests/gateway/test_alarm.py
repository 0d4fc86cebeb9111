"""An alarm rings once, at the time that was set last, however often it was put off or brought forward."""

import asyncio
import time
from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from tokenllm.gateway.alarm import Alarm

TICK_S = 0.004


@given(st.lists(st.sampled_from([1, 3, 6, inf]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=25)
def test_it_rings_once_at_the_time_set_last(ticks: list[float]) -> None:
    """Set again at once, so that only the last time counts."""

    async def scenario() -> None:
        rung: list[float] = []
        alarm = Alarm(lambda: rung.append(time.monotonic()))
        for after in ticks:
            due_s = time.monotonic() + after * TICK_S
            alarm.set(due_s)
        await asyncio.sleep(8 * TICK_S)
        assert len(rung) == (ticks[-1] < inf)
        assert all(due_s <= at_s < due_s + 2 * TICK_S + 0.05 for at_s in rung)

    asyncio.run(scenario())


def test_it_rings_again_when_it_is_set_again_and_never_when_it_was_stopped() -> None:
    async def scenario() -> None:
        rung: list[None] = []
        alarm = Alarm(lambda: rung.append(None))
        for _ in range(2):
            alarm.set(time.monotonic() + TICK_S)
            await asyncio.sleep(3 * TICK_S)
        assert len(rung) == 2
        alarm.set(time.monotonic() + TICK_S)
        alarm.stop()
        await asyncio.sleep(3 * TICK_S)
        assert len(rung) == 2

    asyncio.run(scenario())
