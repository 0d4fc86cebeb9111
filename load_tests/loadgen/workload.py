"""What is sent: prompts of random token ids with given lengths, or real conversations.

Request number i has the same ids on every machine, so that two servers answer the same questions; a later
run goes on counting where the one before stopped, so that no prefix cache has seen its prompts.
"""

import random
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

IDS_SEED = 7000
CHAT_FILE = Path(__file__).parent.parent / "workloads" / "chat.json"

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=1)]


class WorkloadError(ValueError):
    """A workload that cannot be sent; the message names the file or the flag."""


class Turn(msgspec.Struct, frozen=True):
    role: str
    content: str


class IdsPrompt(msgspec.Struct, frozen=True):
    """A prompt of token ids that asks for exactly `output_tokens`."""

    ids: list[int]
    output_tokens: int


class ChatPrompt(msgspec.Struct, frozen=True):
    """A conversation that asks for at most `output_tokens`."""

    messages: list[Turn]
    output_tokens: int


Prompt: TypeAlias = IdsPrompt | ChatPrompt


class IdRange(msgspec.Struct, frozen=True):
    """Token ids low <= id < high."""

    low: int
    high: int


class Lengths(msgspec.Struct, frozen=True):
    """Random ids in (prompt, output) lengths. The first `shared` ids of all prompts are the same."""

    name: str
    lengths: list[tuple[int, int]]
    ids: IdRange
    shared: int = 0

    def prompt(self, number: int) -> IdsPrompt:
        prompt_tokens, output_tokens = self.lengths[number % len(self.lengths)]
        shared = self._drawn(IDS_SEED - 1, min(self.shared, prompt_tokens))
        return IdsPrompt(shared + self._drawn(IDS_SEED + number, prompt_tokens - len(shared)), output_tokens)

    def _drawn(self, seed: int, count: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self.ids.low, self.ids.high) for _ in range(count)]


class Chats(msgspec.Struct, frozen=True):
    """Real conversations, answered as long as the model likes up to a limit."""

    name: str
    conversations: list[list[Turn]]
    output_tokens: int

    def prompt(self, number: int) -> ChatPrompt:
        return ChatPrompt(self.conversations[number % len(self.conversations)], self.output_tokens)


Workload: TypeAlias = Lengths | Chats


class LengthsFile(msgspec.Struct, frozen=True):
    requests: Annotated[list[tuple[Count, Count]], msgspec.Meta(min_length=1)]
    shared_prefix_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0


class ChatsFile(msgspec.Struct, frozen=True):
    conversations: Annotated[list[Annotated[list[Turn], msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)]


def parse_id_range(text: str) -> IdRange:
    """LOW:HIGH, as a flag's value."""
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise WorkloadError(f"--token-ids must be LOW:HIGH with LOW < HIGH, not {text!r}")
    return IdRange(int(low), int(high))


def read_workload(path: Path, ids: IdRange, output_tokens: int) -> Workload:
    """Read JSON with `requests`, a list of [prompt, output] lengths, of which the first `shared_prefix_tokens` are the
    same in all prompts, or `conversations`, a list of lists of turns.
    """
    try:
        raw = path.read_bytes()
        keys = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        if "requests" in keys:
            file = msgspec.json.decode(raw, type=LengthsFile)
            return Lengths(path.stem, file.requests, ids, file.shared_prefix_tokens)
        return Chats(path.stem, msgspec.json.decode(raw, type=ChatsFile).conversations, output_tokens)
    except (OSError, msgspec.DecodeError) as fault:
        raise WorkloadError(f"workload {path}: {fault}") from fault
