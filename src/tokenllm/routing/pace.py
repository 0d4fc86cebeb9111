"""How long a step takes, in a line: what the router needs to keep running streams at their pace."""

from dataclasses import dataclass

from tokenllm.routing.columns import Floats, Ints

SLOWDOWN = 3.0  # a slow machine's step may take so many times what its streams alone take, whatever the target


@dataclass
class Pace:
    """A step takes  step + per_held·(tokens held by the decoding) + per_decode·(decodes) + per_read·(tokens read)."""

    step_s: float
    per_held_s: float
    per_decode_s: float
    per_read_s: float
    target_s: float  # what a step with prefill in it may take; the inter-token latency of those who run
    least_chunk: int = 256
    most_chunk: int = 8192

    def chunk(self, streams: int, held: int) -> int:
        """The prompt tokens that fit into the next step beside so many streams, which hold so many tokens; without
        any, as many as may be.
        """
        if not streams:
            return self.most_chunk
        streams_s = self.step_s + self.per_held_s * held + self.per_decode_s * streams
        fits = int((max(self.target_s, SLOWDOWN * streams_s) - streams_s) / self.per_read_s)
        return min(self.most_chunk, max(self.least_chunk, fits))

    def service_s(self, unread: Ints, tokens: Ints, length: Floats, capacity: int) -> Floats:
        """What a request takes of the machine to its end: reading, and decoding with its share of a full memory.

        Holding a token for a step costs its bytes and its part of what a step costs anyway: per_held + step / capacity.
        """
        held_s = self.per_held_s + self.step_s / capacity
        return unread * self.per_read_s + length * (self.per_decode_s + held_s * (tokens + 0.5 * length))
