"""What nobody can have: a policy that knows how long every answer will be."""

from tokenllm.routing.columns import Columns, Floats, Ints
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.order import ShortestService
from tokenllm.routing.pace import Pace
from tokenllm.routing.peaks import peak


class FirstComeOracle(FirstCome):
    """Admits while the sorted cumulative peak of the true lengths is at most the room. Nobody is ever paused."""

    def __init__(self, lengths: Ints) -> None:
        self._lengths = lengths

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        everybody = running.then(candidates)
        steps = self._lengths[everybody.uid] - everybody.generated - 1
        tokens = everybody.whole
        for count in range(1, len(candidates) + 1):
            alive = slice(len(running) + count)
            if peak(tokens[alive], steps[alive]) > room:
                return count - 1
        return len(candidates)


class Oracle(ShortestService):
    """The same, serving in the order of tokenllm's policy, by true lengths."""

    def __init__(self, lengths: Ints, pace: Pace, capacity: int) -> None:
        super().__init__(pace, capacity)
        self._lengths = lengths
        self._knows = FirstComeOracle(lengths)

    def expected(self, waiting: Columns) -> Floats:
        return (self._lengths[waiting.uid] - waiting.generated).astype(float)

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        return self._knows.admits(running, candidates, room)
