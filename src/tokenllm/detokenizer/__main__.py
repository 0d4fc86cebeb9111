"""The detokenizer process: ids in from ring B, text out to the ring C of each gateway.

Owns nothing that a restart could not rebuild. Relies on the supervisor to end it with its generation.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tokenllm.checkpoint import CheckpointError
from tokenllm.config import DetokenizerBirth
from tokenllm.counters import Page
from tokenllm.detokenizer.core import Detokenizer
from tokenllm.detokenizer.outbox import Outbox
from tokenllm.messages import Midway
from tokenllm.process import die_with, read_birth
from tokenllm.ring import Receiver, RingCorrupt, Sender
from tokenllm.text.tokenizer import load_decoder

RETRY_S = 0.002  # a ring has no bell for room: how soon to look again


def main() -> NoReturn:
    birth = read_birth(DetokenizerBirth)
    die_with(birth.supervisor_pid)
    try:
        decoder = load_decoder(Path(birth.model_path))
    except CheckpointError as error:
        sys.exit(f"tokenllm: {error}")
    detokenizer = Detokenizer(decoder, len(birth.outboxes))
    try:
        serve(Receiver(birth.inbox, Midway), detokenizer, [Outbox(Sender(fds)) for fds in birth.outboxes])
    except RingCorrupt:
        Page(birth.page_fd).add("tokenllm_ring_corrupt_total")
        raise


def serve(inbox: Receiver[Midway], detokenizer: Detokenizer, outboxes: Sequence[Outbox]) -> NoReturn:
    while True:
        inbox.sleep(RETRY_S if any(outbox.waiting for outbox in outboxes) else None)
        for message in inbox.receive():
            for slot, news in detokenizer.accept(message).items():
                outboxes[slot].put(news)
            for outbox in outboxes:
                outbox.flush()


if __name__ == "__main__":
    main()
