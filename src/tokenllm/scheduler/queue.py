"""Who waits, in columns as the router wants them: a queue of a thousand is judged in a few numpy operations."""

import numpy as np

from tokenllm.routing.columns import Columns, Ints
from tokenllm.scheduler.request import Request

INTS = 9  # columns that hold integers


class Queue:
    """Requests that wait, in the order in which they came or came back; the router says whose turn it is."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.prompt_tokens = 0
        self._ints = np.zeros((INTS, 64), np.int64)
        self._arrival_s = np.zeros(64)

    def __len__(self) -> int:
        return len(self.requests)

    def add(self, request: Request, unread: int, shared: int) -> None:
        place = len(self.requests)
        if place == len(self._arrival_s):
            self._ints = np.concatenate((self._ints, np.zeros_like(self._ints)), 1)
            self._arrival_s = np.concatenate((self._arrival_s, np.zeros_like(self._arrival_s)))
        told = len(request.prompt), request.generated, request.max_tokens
        self._ints[:, place] = request.uid, *told, unread, shared, request.kind, request.tenant, request.priority
        self._arrival_s[place] = request.arrival_s
        self.requests.append(request)
        self.prompt_tokens += len(request.prompt)

    def see(self, place: int, unread: int, shared: int) -> bool:
        """What a prefix hit would leave to compute, and how much of the hit others who run hold too. Whether that is
        news.
        """
        known = self._ints[4:6, place]
        news = known.tolist() != [unread, shared]
        if news:
            known[:] = unread, shared
        return news

    def columns(self) -> Columns:
        """Good until the queue changes."""
        uid, prompt, generated, most, unread, shared, kind, tenant, priority = self._ints[:, : len(self.requests)]
        arrival = self._arrival_s[: len(self.requests)]
        return Columns(uid, prompt, generated, most, unread, shared, arrival, kind, tenant, priority)

    def take(self, places: Ints) -> list[Request]:
        """These leave, and are returned in this order."""
        taken = [self.requests[place] for place in places.tolist()]
        for place in sorted(places.tolist(), reverse=True):
            self._remove(place)
        return taken

    def remove(self, request: Request) -> None:
        self._remove(self.requests.index(request))

    def _remove(self, place: int) -> None:
        """Who came later moves up."""
        end = len(self.requests)
        self._ints[:, place : end - 1] = self._ints[:, place + 1 : end]
        self._arrival_s[place : end - 1] = self._arrival_s[place + 1 : end]
        self.prompt_tokens -= len(self.requests.pop(place).prompt)
