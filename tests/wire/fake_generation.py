"""A gateway process under test, and the generation and the supervisor that it believes to have."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import msgspec
import numpy as np

from tokenllm.config import GatewayBirth, ServeConfig
from tokenllm.control import Attach, ControlMessage, Drain, Lost, ModelReady, Serving, ToSupervisor, channel, hear, tell
from tokenllm.counters import Page, create_page
from tokenllm.gateway.response_store import create_store
from tokenllm.messages import (
    Abort,
    Delta,
    Finish,
    Inbound,
    Outbound,
    Ready,
    Refused,
    Submit,
    Texts,
    TokenText,
)
from tokenllm.ring import Receiver, Sender, close_ring, create_ring
from tokenllm.text.tokenizer import Tokenizer

MODEL_NAME = "some-org/tiny"
MODEL_LEN = 512
HIDDEN = 576
STEP_S = 0.002
REASONS = ("stop", "length", "abort", "error", "refused")


class Speech:
    """A completion that is being said: its words are numbers, so that a lost or doubled one shows."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self.prompt_tokens = len(submit.prompt) // 4
        self.spoken = 0

    def next_delta(self) -> Delta | None:
        text, stopped = f"{self.spoken} ", False
        self.spoken += 1
        if text.strip() in self.submit.telling.stop:
            text, stopped = "", True
        ended = stopped or self.spoken == self.submit.max_tokens
        finish = None
        if ended:
            reason = "stop" if stopped else "length"
            finish = Finish(reason, self.prompt_tokens, 1, self.spoken, by_stop_string=stopped)
        return Delta(self.submit.uid, text, 1, self._logprobs(text), finish)

    def _logprobs(self, text: str) -> tuple[TokenText, ...]:
        if self.submit.sampling.logprobs is None:
            return ()
        top = tuple((f"t{i}", b"\xf0", -1.0 - i) for i in range(self.submit.sampling.logprobs))
        return (TokenText(text, text.encode(), float("-inf") if self.spoken == 1 else -0.5, top),)


class Vectors(Speech):
    """Says the vector of a prompt, in two parts; it begins with the prompt's length and last id."""

    def next_delta(self) -> Delta:
        self.spoken += 1
        ids = np.frombuffer(self.submit.prompt, "<i4")
        vector = np.zeros(HIDDEN, "<f4")
        vector[:3] = len(ids), ids[-1], 2.0 if self.submit.pooling == "last" else 1.0
        half = vector.tobytes()[HIDDEN * 2 * (self.spoken - 1) :][: HIDDEN * 2]
        finish = Finish("stop", self.prompt_tokens, 1, 0) if self.spoken == 2 else None
        return Delta(self.submit.uid, "", 0, (), finish, half)


class Generation(threading.Thread):
    """Says a word of every completion in each step. Prompts that hold certain words are treated otherwise:

    REFUSE is refused, FAIL ends with an error. The others last until they are aborted: SILENT makes tokens without
    text, HANG makes none, STALL says a word first. BRIEF ends by itself after six words.
    """

    def __init__(self, number: int, tokenizer: Tokenizer, step_s: float = STEP_S) -> None:
        super().__init__(daemon=True)
        self.number, self.step_s = number, step_s
        self._tokenizer = tokenizer
        self.ring_a, self.ring_c = create_ring(1 << 20), create_ring(1 << 20)
        self._inbox: Receiver[Inbound] = Receiver(self.ring_a, Inbound)
        self._outbox: Sender[Outbound] = Sender(self.ring_c)
        self._speeches: dict[int, Speech] = {}
        self._dead = threading.Event()
        self.submits: list[Submit] = []
        self.aborts: list[int] = []

    def run(self) -> None:
        self._outbox.send(Ready(self.number, 4096, MODEL_LEN))
        while not self._dead.is_set():
            for message in self._inbox.receive():
                self._hear(message)
            deltas = tuple(delta for speech in self._speeches.values() if (delta := speech.next_delta()))
            for ended in [delta.uid for delta in deltas if delta.finish]:
                del self._speeches[ended]
            if deltas:
                self._outbox.send(Texts(deltas))
            time.sleep(self.step_s)

    def die(self) -> None:
        self._dead.set()
        self.join()

    def bury(self) -> None:
        self.submits += [message for message in self._inbox.receive() if isinstance(message, Submit)]
        self._inbox.close()
        self._outbox.close()
        close_ring(self.ring_a)
        close_ring(self.ring_c)

    def prompt(self, submit: Submit) -> str:
        ids = [int.from_bytes(submit.prompt[i : i + 4], "little") for i in range(0, len(submit.prompt), 4)]
        return self._tokenizer.decode(ids, skip_special=False)

    def _hear(self, message: Inbound) -> None:
        match message:
            case Submit():
                self.submits.append(message)
                self._begin(message)
            case Abort(uid=uid):
                self.aborts.append(uid)
                if speech := self._speeches.pop(uid, None):
                    self._end(uid, "abort", speech.spoken)

    def _begin(self, submit: Submit) -> None:
        prompt = self.prompt(submit)
        if "REFUSE" in prompt:
            self._outbox.send(Refused(submit.uid, 429, "queue_full", "the queue is full"))
        elif "FAIL" in prompt:
            self._outbox.send(Texts((Delta(submit.uid, "so far ", 1),)))
            self._end(submit.uid, "error", 1)
        else:
            if "STALL" in prompt:
                self._outbox.send(Texts((Delta(submit.uid, "so far ", 1),)))
            kind = kind_of(prompt)
            self._speeches[submit.uid] = (Vectors if submit.pooling and kind is Speech else kind)(submit)

    def _end(self, uid: int, reason: str, spoken: int) -> None:
        finish = Finish(reason, 1, 0, spoken)  # type: ignore[arg-type]
        self._outbox.send(Texts((Delta(uid, "", 0, (), finish),)))


class Silence(Speech):
    def next_delta(self) -> Delta:
        return Delta(self.submit.uid, "", 0)


class Hang(Speech):
    def next_delta(self) -> None:
        return None


class Brief(Speech):
    def next_delta(self) -> Delta:
        delta = super().next_delta()
        assert delta
        if self.spoken < 6:
            return delta
        return msgspec.structs.replace(delta, finish=Finish("stop", self.prompt_tokens, 1, self.spoken))


def kind_of(prompt: str) -> type[Speech]:
    kinds = {"HANG": Hang, "STALL": Hang, "SILENT": Silence, "BRIEF": Brief}
    return next((kind for word, kind in kinds.items() if word in prompt), Speech)


class GatewayUnderTest:
    """The process, and the supervisor's ends of what it was born with."""

    def __init__(self, model: Path, tokenizer: Tokenizer, **settings: object) -> None:
        self._tokenizer = tokenizer
        self._generations = 0
        self.generation: Generation | None = None
        listening = socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self._control, theirs = channel()
        self._page_fds = create_page(), create_page()
        self.scheduler_page, self.page = (Page(fd) for fd in self._page_fds)
        self._folder = tempfile.TemporaryDirectory()
        create_store(Path(self._folder.name, "responses"))
        birth = GatewayBirth(
            config=ServeConfig(**settings),  # type: ignore[arg-type]
            model_path=str(model),
            model_name=MODEL_NAME,
            slot=1,
            incarnation=2,
            supervisor_pid=os.getpid(),
            listen_fd=listening.fileno(),
            control_fd=theirs.fileno(),
            page_fds=self._page_fds,
            own_page=1,
            responses_path=f"{self._folder.name}/responses",
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tokenllm.gateway"],
            stdin=subprocess.PIPE,
            pass_fds=(listening.fileno(), theirs.fileno(), *self._page_fds),
        )
        assert self.process.stdin
        with self.process.stdin as stdin:
            stdin.write(msgspec.json.encode(birth))
        listening.close()
        theirs.close()
        assert self.hear() == Serving()
        self.http = httpx.Client(base_url=self.url, verify=False, timeout=20)  # to load certificates takes long

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load_model(self, **manner: float) -> Generation:
        """A new generation, ready. `finished` counts from here."""
        self._before = {reason: self._count(reason) for reason in REASONS}
        self.refused_early = 0  # choices that entered no ring; the test counts them
        self._generations += 1
        self.generation = Generation(self._generations, self._tokenizer, **manner)
        rings = self.generation.ring_a, self.generation.ring_c
        tell(self._control, Attach(self._generations), [fd for ring in rings for fd in (ring.memory, ring.bell)])
        self.generation.start()
        assert self.hear() == ModelReady(self._generations, 4096, MODEL_LEN)
        return self.generation

    def kill_model(self) -> None:
        assert self.generation
        self.generation.die()
        self.tell(Lost(self.generation.number))
        eventually(lambda: httpx.get(self.url + "/health/ready", verify=False).status_code == 503)
        self.generation.bury()
        assert self.finished() == len(self.generation.submits) + self.refused_early, "every submit ends once"
        self.generation = None

    def tell(self, message: Lost | Drain) -> None:
        tell(self._control, message)

    def hear(self) -> ControlMessage:
        return hear(self._control, ToSupervisor).message

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.http.close()
        if self.generation:
            self.generation.die()
            self.generation.bury()
        self._control.close()
        self._folder.cleanup()
        for fd in self._page_fds:
            os.close(fd)

    def finished(self, *reasons: str) -> int:
        """Requests that had their last word since the model was loaded."""
        return sum(self._count(reason) - self._before[reason] for reason in reasons or REASONS)

    def _count(self, reason: str) -> int:
        return int(self.page.get("tokenllm_requests_finished_total", reason))


def eventually(holds: Callable[[], object], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.005)


def words(count: int, start: int = 0) -> str:
    return "".join(f"{i} " for i in range(start, start + count))


def events(lines: Iterator[str]) -> list[str]:
    """The data of server-sent events."""
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
