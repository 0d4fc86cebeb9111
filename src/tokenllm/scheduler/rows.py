"""How far each running request has come, in columns with one entry per row: what a step changes for all of them is a
few numpy operations, however many run. A row is a place in the batch, here and on the device; a request keeps its row
from its admission to its end, or until it is paused.
"""

import numpy as np
from numpy.typing import NDArray

from tokenllm.engine.batch import Column, Decodes, SharedPrefix
from tokenllm.memory.token_slots import Slots
from tokenllm.routing.columns import Columns
from tokenllm.scheduler.prefixes import PROBES, shared_prefixes
from tokenllm.scheduler.request import Request

Uids = NDArray[np.uint64]
Places = NDArray[np.intp]

NOBODY = np.uint64(2**64 - 1)  # no uid: gateways have smaller slots
NO_STAY = -1


class Rows:
    """`count` rows of at most `max_positions` tokens. Entries of rows that nobody has mean nothing, but for `uids`,
    `stays` and `decodes`, and that they want no tokens.
    """

    def __init__(self, count: int, max_positions: int) -> None:
        self.max_positions = max_positions
        self.uids = np.full(count, NOBODY)
        self.stays = np.full(count, NO_STAY)  # each admission has a number of its own, higher than those before
        self._told = np.zeros((8, count), np.int32)  # what the router is told, in columns that are views of it:
        self.prompt, self.sampled, self.max_tokens, self.planned, self.shared, *_ = self._told
        # prompt: its tokens; sampled: tokens generated, or on their way; planned: tokens whose K and V are in memory,
        # or on their way; shared: of these, those that others who run hold too; then kind, tenant and priority
        self.text = np.zeros(count, np.int32)  # tokens to read before it decodes: a resumed one's generated ones too
        self.generated = np.zeros(count, np.int32)  # tokens generated and known
        self.cached = np.zeros(count, np.int32)  # tokens of the prompt that somebody had computed before
        self.adopted = np.zeros(count, np.int32)  # of its first tokens, those that it has not computed itself
        self.heeds_eos = np.zeros(count, bool)
        self.stop_ids: dict[int, frozenset[int]] = {}  # of rows that have some of their own
        self.decodes = np.zeros(count, bool)  # its text is planned to the end
        self._arrival_s = np.zeros(count)
        self._slots = np.empty((count, max_positions), np.int32)  # of each position; costs memory where it is written
        self._ids = np.empty((count, max_positions + 1), np.int32)  # of each position, as far as known
        self._free = list(range(count))[::-1]
        self._admissions = 0
        self._sharing_stays = np.empty(0, np.int64)  # of the rows that decoded last, who share these:
        self._prefixes: tuple[SharedPrefix, ...] = ()

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def running(self) -> int:
        return len(self.uids) - len(self._free)

    def admit(self, request: Request) -> int:
        """The row that the request has from now on."""
        row = self._free.pop()
        self.uids[row], self.stays[row] = request.uid, self._admissions
        self._admissions += 1
        self.prompt[row], self.text[row], self.max_tokens[row] = (
            len(request.prompt),
            len(request.text),
            request.max_tokens,
        )
        self.planned[row], self.cached[row], self.adopted[row] = 0, request.cached, 0
        self.sampled[row] = self.generated[row] = request.generated
        self._ids[row, : len(request.text)] = request.text
        self.heeds_eos[row], self.decodes[row] = not request.ignore_eos, False
        if request.stop_ids:
            self.stop_ids[row] = request.stop_ids
        self._told[5:, row] = request.kind, request.tenant, request.priority
        self._arrival_s[row] = request.arrival_s
        return row

    def release(self, row: int) -> None:
        """Nobody has the row now."""
        self.uids[row], self.stays[row] = NOBODY, NO_STAY
        self.decodes[row], self.max_tokens[row] = False, 0
        self.stop_ids.pop(row, None)
        self._free.append(row)

    def held(self, row: int) -> Slots:
        """The slots of its tokens, which change when the row has its next tenant."""
        return self._slots[row, : self.planned[row]]

    def adopt(self, row: int, slots: Slots) -> int:
        """The row goes on with what others have computed; `slots` are of all positions from the first on.

        Returns how many of them are new to it.
        """
        start = int(self.planned[row])
        self._slots[row, start : len(slots)] = slots[start:]
        self.planned[row] = self.adopted[row] = len(slots)
        return len(slots) - start

    def learn(self, rows: Places, tokens: Column) -> None:
        """Each row has generated one more token."""
        self._ids[rows, self.prompt[rows] + self.generated[rows]] = tokens
        self.generated[rows] += 1

    def ids(self, row: int) -> Column:
        """Its prompt and all it is known to have generated."""
        return self._ids[row, : self.prompt[row] + self.generated[row]]

    def written(self, row: int) -> tuple[Column, Slots]:
        """Ids and slots of the tokens whose K and V are in memory, or on their way, and whose ids are known."""
        ids = self.ids(row)[: self.planned[row]]
        return ids, self._slots[row, : len(ids)]

    def wanting_a_token(self) -> Places:
        """The rows that decode at the next step, in ascending order."""
        return (self.decodes & (self.sampled < self.max_tokens)).nonzero()[0]

    def staying(self) -> Places:
        """The rows that still want tokens, in the order of their admission."""
        rows = (self.sampled < self.max_tokens).nonzero()[0]
        return rows[self.stays[rows].argsort()]

    def columns(self, rows: Places) -> Columns:
        """What the router has to know of those who run, as if all that is planned had happened."""
        told = self._told.take(rows, 1).astype(np.int64)
        prompt, generated, most, planned, shared, kind, tenant, priority = told
        uids, arrival = self.uids[rows].view(np.int64), self._arrival_s[rows]
        unread = prompt + generated - planned
        return Columns(uids, prompt, generated, most, unread, shared, arrival, kind, tenant, priority)

    def decode(self, rows: Places, slots: Slots) -> Decodes:
        """Plan one more token for each of these rows."""
        prefixes = self._shared_by(rows)
        positions = self.planned[rows]
        self._slots[rows, positions] = slots
        self.planned[rows] = positions + 1
        self.sampled[rows] += 1
        return Decodes(rows.astype(np.int32), positions, slots, prefixes)

    def _shared_by(self, rows: Places) -> tuple[SharedPrefix, ...]:
        """What the rows share: looked for when they are others than at the last step."""
        if self.adopted[rows].max(initial=0) < PROBES[0]:
            return ()
        stays = self.stays[rows]
        if not np.array_equal(stays, self._sharing_stays):
            self._sharing_stays = stays
            self._prefixes = shared_prefixes(self._slots, rows, self.planned[rows])
        return self._prefixes

    def read(self, row: int, slots: Slots) -> int:
        """Plan as many tokens of the row's text as there are slots. Returns the position of the first."""
        start = int(self.planned[row])
        end = self.planned[row] = start + len(slots)
        self._slots[row, start:end] = slots
        self.decodes[row] = end == self.text[row]
        self.sampled[row] += self.decodes[row]
        return start
