"""The Efficient Router: at every step, who is admitted, who computes how many tokens, who is paused.

Owns no request and no clock: the scheduler and the simulator hand it columns and carry out what it decides. A policy
says who may join and in which order; the router sees to the memory and the time of the next step. Relies on numpy only.
"""

import numpy as np

from tokenllm.routing.columns import Columns, Decision, Ints
from tokenllm.routing.first_come import Policy
from tokenllm.routing.pace import Pace

CANDIDATES = 32  # judged at once; a step seldom has tokens to read for more
UNBOUNDED = 1 << 60
NOBODY: Ints = np.zeros(0, np.int64)


class Router:
    """Decides one step at a time."""

    def __init__(self, policy: Policy, pace: Pace | None, most_running: int) -> None:
        self.policy = policy
        self._pace = pace  # None: a prompt is read in one step, however long
        self._most_running = most_running

    def decide(self, now: float, running: Columns, waiting: Columns, free_tokens: int, leaving: int = 0) -> Decision:
        """`free_tokens`: slots that nobody who runs holds, those of the prefix cache included; `leaving`: requests
        that are not among the running, because they want no more tokens, and have a row yet.
        """
        decodes = running.decodes
        streams = int(np.count_nonzero(decodes))
        if pause := self._pause(running, streams, free_tokens):
            return self._without(running, pause)
        fits = self._pace.chunk(streams, int(running.held[decodes].sum())) if self._pace else UNBOUNDED
        budget = min(fits, free_tokens - streams)
        rows, unread = self._most_running - len(running) - leaving, int(running.unread.sum()) - streams
        admit = NOBODY
        if rows > 0 and unread < budget and len(waiting):
            admit, joining = self._admit(now, running, waiting, free_tokens, budget - unread, rows)
            unread += int(joining.unread.sum())
            budget = min(budget, free_tokens - streams - int(joining.held.sum()))  # prefix hits were free until now
        tokens = streams + max(0, min(budget, unread))
        if len(running) > 1 and not tokens:  # all are in the middle of a prompt, and there is no room to go on
            return self._without(running, self.policy.victims(running)[:1].tolist())
        return Decision(admit, NOBODY, tokens)

    @staticmethod
    def needs_no_decision(streams: int, free_tokens: int) -> bool:
        """With nothing to read, the batch goes on as it is until somebody comes or goes, or memory ends."""
        return free_tokens >= streams

    def finished(self, kind: int, length: int) -> None:
        self.policy.learn(kind, length)

    def _pause(self, running: Columns, streams: int, free_tokens: int) -> list[int]:
        """As few as let the others take their next token."""
        pause = []
        if streams > free_tokens:
            for victim in self.policy.victims(running)[: len(running) - 1].tolist():
                pause.append(victim)
                free_tokens += int(running.held[victim])
                streams -= int(running.decodes[victim])
                if streams <= free_tokens:
                    break
        return pause

    def _without(self, running: Columns, pause: list[int]) -> Decision:
        places = np.array(pause, np.int64)
        victims = running.take(places)
        self.policy.paused(victims)
        return Decision(NOBODY, places, int(np.count_nonzero(running.decodes) - np.count_nonzero(victims.decodes)))

    def _admit(
        self, now: float, running: Columns, waiting: Columns, free_tokens: int, left: int, rows: int
    ) -> tuple[Ints, Columns]:
        """Candidates in their order, while this step has tokens to read left for them and the policy agrees."""
        places = self.policy.order(now, running, waiting, min(CANDIDATES, rows))
        candidates = waiting.take(places)
        fits = candidates.whole.cumsum() <= free_tokens  # whatever a policy hopes
        reads = candidates.unread.cumsum() - candidates.unread < left
        candidates = candidates.first(int(np.count_nonzero(fits & reads)))
        if not len(candidates):
            return NOBODY, candidates
        count = self.policy.admits(running, candidates, free_tokens + int(running.held.sum()))
        if not count and not len(running):
            count = 1  # whoever fits alone runs, whatever a policy fears
        joining = candidates.first(count)
        if count:
            self.policy.admitted(now, joining)
        return places[:count], joining
