"""How far each running request has come, in columns with one entry per row: what a step changes for all of them is a
few numpy operations, however many run. A row is a place in the batch, here and on the device; a request keeps its row
from its admission to its end.
"""

import numpy as np
from numpy.typing import NDArray

from tokenllm.engine.batch import Column, Decodes
from tokenllm.memory.token_slots import Slots
from tokenllm.routing.policy import Demands
from tokenllm.scheduler.request import Request

Uids = NDArray[np.uint64]

NOBODY = np.uint64(2**64 - 1)  # no uid: gateways have smaller slots


class Rows:
    """`count` rows of at most `max_positions` tokens. Entries of rows that nobody has mean nothing, but for `uids`."""

    def __init__(self, count: int, max_positions: int) -> None:
        self.max_positions = max_positions
        self.uids = np.full(count, NOBODY)
        self.prompt = np.zeros(count, np.int32)  # its tokens
        self.max_tokens = np.zeros(count, np.int32)
        self.planned = np.zeros(count, np.int32)  # tokens whose K and V are in memory, or on their way
        self.sampled = np.zeros(count, np.int32)  # tokens generated, or on their way
        self.generated = np.zeros(count, np.int32)  # tokens generated and known
        self.cached = np.zeros(count, np.int32)  # tokens of the prompt that somebody had computed before
        self.heeds_eos = np.zeros(count, bool)
        self.decodes = np.zeros(count, bool)  # its prompt is planned to the end
        self._slots = np.empty((count, max_positions), np.int32)  # of each position; costs memory where it is written
        self._ids = np.empty((count, max_positions + 1), np.int32)  # of each position, as far as known
        self._free = list(range(count))[::-1]

    @property
    def any_free(self) -> bool:
        return bool(self._free)

    @property
    def running(self) -> int:
        return len(self.uids) - len(self._free)

    def admit(self, request: Request) -> int:
        """The row that the request has from now on."""
        row = self._free.pop()
        self.uids[row] = request.uid
        self.prompt[row], self.max_tokens[row] = len(request.prompt), request.max_tokens
        self.planned[row] = self.sampled[row] = self.generated[row] = self.cached[row] = 0
        self._ids[row, : len(request.prompt)] = request.prompt
        self.heeds_eos[row], self.decodes[row] = not request.ignore_eos, False
        return row

    def release(self, row: int) -> Slots:
        """Nobody has the row now. Returns the slots that it held, which change when it has its next tenant."""
        self.uids[row] = NOBODY
        self.decodes[row] = False
        self._free.append(row)
        return self.held(row)

    def held(self, row: int) -> Slots:
        return self._slots[row, : self.planned[row]]

    def adopt(self, row: int, slots: Slots) -> None:
        """The row begins with what others have computed."""
        self._slots[row, : len(slots)] = slots
        self.planned[row] = self.cached[row] = len(slots)

    def learn(self, rows: Column, tokens: Column) -> None:
        """Each row has generated one more token."""
        self._ids[rows, self.prompt[rows] + self.generated[rows]] = tokens
        self.generated[rows] += 1

    def written(self, row: int) -> tuple[Column, Slots]:
        """Ids and slots of the tokens whose K and V are in memory, or on their way, and whose ids are known."""
        end = min(self.planned[row], self.prompt[row] + self.generated[row])
        return self._ids[row, :end], self._slots[row, :end]

    def wanting_a_token(self) -> NDArray[np.intp]:
        """The rows that decode at the next step, in ascending order."""
        return (self.decodes & (self.sampled < self.max_tokens)).nonzero()[0]

    def decode(self, rows: NDArray[np.intp], slots: Slots) -> Decodes:
        """Plan one more token for each of these rows."""
        positions = self.planned[rows]
        self._slots[rows, positions] = slots
        self.planned[rows] = positions + 1
        self.sampled[rows] += 1
        return Decodes(rows.astype(np.int32), positions, slots)

    def read(self, row: int, slots: Slots) -> int:
        """Plan as many tokens of the row's prompt as there are slots. Returns the position of the first."""
        start = int(self.planned[row])
        end = self.planned[row] = start + len(slots)
        self._slots[row, start:end] = slots
        self.decodes[row] = end == self.prompt[row]
        self.sampled[row] = self.decodes[row]
        return start

    def demands(self) -> Demands:
        taken = self.uids != NOBODY
        return Demands(self.prompt[taken], self.sampled[taken], self.max_tokens[taken])
