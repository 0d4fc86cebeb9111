"""The policies by name, each made anew for a run."""

from collections.abc import Callable

from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.first_come import Policy
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.lightllm import LightLLM
from tokenllm.routing.pace import Pace
from tokenllm.routing.past_future import PastFuture
from tokenllm.routing.tokenllm import TokenLLM
from tokenllm.simulate.flags import POLICIES
from tokenllm.simulate.oracle import FirstComeOracle, Oracle
from tokenllm.simulate.workload import Workload

KindOf = Callable[[int, int], int]


def make(name: str, work: Workload, pace: Pace, capacity: int, seed: int) -> tuple[Policy, KindOf]:
    """A policy, and the row of its history for a new request's (group, max_tokens)."""
    match name:
        case "conservative":
            return WorstCase(), _all_alike
        case "lightllm":
            return LightLLM(), _all_alike
        case "past-future":
            return PastFuture(seed), _all_alike
        case "tokenllm":
            lengths = Lengths()
            return TokenLLM(lengths, pace, capacity), lengths.kind
        case "oracle":
            return Oracle(work.length, pace, capacity), _all_alike
        case "oracle-fcfs":
            return FirstComeOracle(work.length), _all_alike
    raise ValueError(f"--policy {name}: there are {', '.join(POLICIES)}")


def _all_alike(group: int, max_tokens: int) -> int:
    return 0
