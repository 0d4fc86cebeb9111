"""The policies by name, as the scheduler's flag has them: each made anew for a server."""

from tokenllm.config import PolicyName
from tokenllm.routing.conservative import WorstCase
from tokenllm.routing.first_come import Policy
from tokenllm.routing.lengths import Lengths
from tokenllm.routing.lightllm import LightLLM
from tokenllm.routing.pace import Pace
from tokenllm.routing.past_future import PastFuture
from tokenllm.routing.tokenllm import TokenLLM


def make_policy(name: PolicyName, pace: Pace, capacity: int, lengths: Lengths) -> Policy:
    """`lengths` is what earlier servers have learned; only `tokenllm` reads it, and goes on."""
    match name:
        case "conservative":
            return WorstCase()
        case "lightllm":
            return LightLLM(pace.most_chunk)
        case "past-future":
            return PastFuture()
        case "tokenllm":
            return TokenLLM(lengths, pace, capacity)
