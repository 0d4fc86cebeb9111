"""In which order the queue is served: who can be answered in time and soonest first, and nobody waits without end."""

import numpy as np

from tokenllm.routing.columns import Columns, Floats, Ints
from tokenllm.routing.first_come import FirstCome
from tokenllm.routing.pace import Pace

IN_TIME_S = 8.0  # a first token after this has come late for whoever sits before the screen
PATIENCE = 1.5  # nobody waits longer than this many times what it takes to work off the whole queue
WINDOW_S = 60.0
BAND = 1e9  # wider than any age or turn: bands of one key do not mix


class ShortestService(FirstCome):
    """By priority; then who was paused; then who waits too long; then who can be in time; then the others.

    Who can be in time goes by service, shortest first, the others by age. Service is predicted:
    unread·read + length·(decode + held·(tokens + length/2))  seconds of the machine (pace.py). Too long is

        max(IN_TIME_S, PATIENCE · service of all who wait / service admitted per second lately)

    because first come, first served would let its newest request wait for that quotient. Between tenants the service
    is kept equal: a turn is what the tenant has had, and all of its own that go before. Who comes, or comes back after
    its last request has ended, starts beside the one that has had least, not with a claim on the past.
    """

    def __init__(self, pace: Pace, capacity: int) -> None:
        self._pace, self._capacity = pace, capacity
        self._served: dict[int, float] = {}  # service of each tenant since it came
        self._rate, self._rate_at_s = 0.0, 0.0

    def expected(self, waiting: Columns) -> Floats:
        """The tokens each will still generate."""
        raise NotImplementedError

    def service(self, waiting: Columns) -> Floats:
        return self._pace.service_s(waiting.unread, waiting.whole, self.expected(waiting), self._capacity)

    def order(self, now: float, running: Columns, waiting: Columns, most: int) -> Ints:
        service, waited = self.service(waiting), now - waiting.arrival
        patience = max(IN_TIME_S, PATIENCE * float(service.sum()) / max(self._rate, 1e-9))
        key = np.where(waited > IN_TIME_S, BAND - waited, self._turns(running.tenant, waiting.tenant, service))
        key -= (waited > patience) * (3 * BAND)
        key -= (waiting.generated > 0) * (6 * BAND)  # its stream stands still
        key -= waiting.priority * (20 * BAND)
        if len(key) <= most:
            return key.argsort(kind="stable")
        first = key.argpartition(most)[:most]
        return first[key[first].argsort(kind="stable")]

    def _turns(self, running: Ints, waiting: Ints, service: Floats) -> Floats:
        """The tenants of those who run, of those who wait, and the latter's service."""
        tenants = np.concatenate((running, waiting))
        if np.count_nonzero(tenants == tenants[0]) == len(tenants):
            self._see_who_is_here([int(tenants[0])])
            return service
        names, first, which = np.unique(tenants, return_index=True, return_inverse=True)
        order = first.argsort()  # so that nothing, not the last bit of a sum, depends on what number a tenant has
        here, which = names[order], order.argsort()[which[len(running) :]]
        places = np.argsort(which * BAND + service)
        so_far, sorted_tenants = service[places].cumsum(), which[places]
        starts = np.searchsorted(sorted_tenants, np.arange(len(here)))
        before = np.concatenate(([0.0], so_far))[starts]
        turns = np.empty_like(service)
        turns[places] = so_far + (np.array(self._see_who_is_here(here.tolist())) - before)[sorted_tenants]
        return turns

    def _see_who_is_here(self, tenants: list[int]) -> list[float]:
        """What each has had; the others are forgotten."""
        had = {tenant: self._served[tenant] for tenant in tenants if tenant in self._served}
        self._served = dict.fromkeys(tenants, min(had.values(), default=0.0)) | had
        return list(self._served.values())

    def admitted(self, now: float, requests: Columns) -> None:
        service = self.service(requests)
        for tenant, one in zip(requests.tenant.tolist(), service.tolist(), strict=True):
            self._served[tenant] = self._served.get(tenant, 0.0) + one
        fades = np.exp((self._rate_at_s - now) / WINDOW_S)
        self._rate = float(self._rate * fades + service.sum() / WINDOW_S)
        self._rate_at_s = now

    def reading_order(self, unread: Ints) -> Ints:
        return unread.argsort(kind="stable")
