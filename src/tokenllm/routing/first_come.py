"""What a policy answers, and the answers that most of them share: first come, first served, last come, first paused."""

from typing import Protocol

import numpy as np

from tokenllm.routing.columns import Columns, Ints


class Policy(Protocol):
    """Judges from numbers alone. The router asks it; it holds what it has learned and nothing else."""

    retries: bool  # may change its mind while nothing happens: to be asked at every step

    def order(self, now: float, running: Columns, waiting: Columns, most: int) -> Ints:
        """The places of the first `most` among the waiting, in the order in which they are to be served."""
        ...

    def admits(self, running: Columns, candidates: Columns, room: float) -> int:
        """How many of the candidates, from the first on, may join those who run; `room` is for all of them."""
        ...

    def victims(self, running: Columns) -> Ints:
        """The places of those who run, in the order in which they would be paused."""
        ...

    def reading_order(self, unread: Ints) -> Ints:
        """In which order prompts are read."""
        ...

    def admitted(self, now: float, requests: Columns) -> None: ...

    def paused(self, requests: Columns) -> None: ...

    def learn(self, kind: int, length: int) -> None: ...

    def kind(self, group: int, max_tokens: int) -> int:
        """What a request is, as far as its length can be told from its application (-1: unknown) and `max_tokens`."""
        ...

    def peak(self, running: Columns) -> float:
        """The most tokens that those who run are expected to hold together, each shared one left out."""
        ...


class FirstCome:
    """Serves in the order of arrival and pauses whoever came last."""

    retries = False

    def order(self, now: float, running: Columns, waiting: Columns, most: int) -> Ints:
        return np.lexsort((waiting.uid, waiting.arrival))[:most]

    def victims(self, running: Columns) -> Ints:
        return np.arange(len(running))[::-1]

    def reading_order(self, unread: Ints) -> Ints:
        return np.arange(len(unread))

    def admitted(self, now: float, requests: Columns) -> None:
        pass

    def paused(self, requests: Columns) -> None:
        pass

    def learn(self, kind: int, length: int) -> None:
        pass

    def kind(self, group: int, max_tokens: int) -> int:
        return 0

    def peak(self, running: Columns) -> float:
        """Who predicts nothing expects what there is."""
        return float(running.whole.sum())
