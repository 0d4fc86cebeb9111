"""The supervisor's life: it starts the other processes, replaces those that die, and ends them all.

Owns every child, the rings, the pages, the port, the control sockets and the file of stored responses. It has one
thread, since a child's life is bound to the thread that spawned it, and sleeps until a child dies, a gateway speaks or
a signal comes.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tokenllm.checkpoint import CheckpointError
from tokenllm.checkpoint.source import model_name, resolve
from tokenllm.config import GatewayBirth, ServeConfig
from tokenllm.control import Drain, Lost, ModelReady, Serving, channel
from tokenllm.counters import GAUGES, Page, create_page
from tokenllm.gateway.response_store import create_store
from tokenllm.supervisor import StartError
from tokenllm.supervisor.child import Child, exit_code, told
from tokenllm.supervisor.generation import SCHEDULER, Generation
from tokenllm.supervisor.greeting import greeting
from tokenllm.supervisor.listening import Port, reserve
from tokenllm.supervisor.private_folder import private_folder
from tokenllm.supervisor.slot import Gateway, Slot

RETRY_S = 0.05  # how soon to look again whether a full ring has room
GRACE_S = 5.0  # for a gateway to end what is left after that, and to exit
STILLBORN_LIMIT = 2
GATEWAY_PAGES = 3  # where they begin


def serve(config: ServeConfig, scheduler_command: Sequence[str] = SCHEDULER) -> int:
    """Serve until a signal or a failure ends it; the exit code of the process."""
    try:
        with (
            contextlib.closing(reserve(config.host, config.port, config.gateway_processes)) as port,
            private_folder() as folder,
        ):
            path = resolve(config.model, say, weights=config.load_format != "dummy")
            name = config.served_model_name or model_name(config.model, path)
            return Supervisor(config, path, name, port, folder, scheduler_command).run()
    except (StartError, CheckpointError) as error:
        say(str(error))
        return error.exit_code if isinstance(error, StartError) else 1


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads us any more: no reason to stop serving
        print(f"tokenllm: {text}", file=sys.stderr, flush=True)


class Supervisor:
    def __init__(
        self,
        config: ServeConfig,
        model_path: Path,
        name: str,
        port: Port,
        folder: Path,
        scheduler_command: Sequence[str],
    ) -> None:
        self._config = config
        self._model_path = str(model_path)
        self._name = name
        self._port = port
        self._responses_path = folder / "responses"
        create_store(self._responses_path)
        self._scheduler_command = scheduler_command
        # ours, the scheduler's, the detokenizer's and the gateways'; they outlive processes: counters never go back
        self._page_fds = tuple(create_page() for _ in range(GATEWAY_PAGES + config.gateway_processes))
        self._page, self._scheduler_page = Page(self._page_fds[0]), Page(self._page_fds[1])
        self._slots = [Slot(number) for number in range(config.gateway_processes)]
        self._generation: Generation | None = None
        self._was_ready = False
        self._greeted = False
        self._drained_by: float | None = None
        self._exit_code: int | None = None

    def run(self) -> int:
        signals = _signals()
        self._port.listen()
        try:
            self._start_generation(1)
            while self._exit_code is None:
                self._turn(signals)
            return self._exit_code
        finally:
            self._end()

    def _turn(self, signals: int) -> None:
        """Wait for one event and answer it."""
        self._fill_slots()
        handlers = {signals: partial(self._on_signal, signals), **self._handlers()}
        poller = select.poll()
        for fd in handlers:
            poller.register(fd, select.POLLIN)
        fired = {fd for fd, _ in poller.poll(self._patience_ms())}
        # one event a turn, the most important first: the others may be about something that is gone then
        for fd in handlers:
            if fd in fired:
                handlers[fd]()
                break
        if self._drained_by is not None and (not any(self._gateways()) or time.monotonic() >= self._drained_by):
            self._exit_code = 0

    def _handlers(self) -> dict[int, Callable[[], object]]:
        members = self._generation.members if self._generation else ()
        gateways = [(slot, slot.gateway) for slot in self._slots if slot.gateway]
        return {
            **{member.pidfd: partial(self._on_generation_death, member) for member in members},
            **{gateway.pidfd: partial(self._on_gateway_death, slot, gateway) for slot, gateway in gateways},
            **{gateway.control.fileno(): partial(self._on_words, gateway) for _, gateway in gateways if gateway.speaks},
        }

    def _patience_ms(self) -> float | None:
        if self._drained_by is not None:
            return max(0.0, self._drained_by - time.monotonic()) * 1000
        return None if all(slot.gateway for slot in self._slots) else RETRY_S * 1000

    def _gateways(self) -> Iterator[Gateway]:
        return (slot.gateway for slot in self._slots if slot.gateway)

    def _start_generation(self, number: int) -> None:
        pages = self._page_fds[1], self._page_fds[2]
        self._generation = Generation(
            number, self._config, self._model_path, os.getpid(), pages, self._scheduler_command
        )
        for slot in self._slots:
            if slot.gateway:
                slot.gateway.attach(self._generation, slot.number)

    def _on_generation_death(self, member: Child) -> None:
        generation = self._generation
        assert generation is not None, "a generation that is watched lives"
        for gateway in self._gateways():  # before anything that takes time: their streams wait for a last word
            gateway.tell(Lost(generation.number))
        for gateway in self._gateways():
            self._on_words(gateway)  # one may say that this generation was ready
        codes = generation.end()
        self._generation = None
        for gauge in GAUGES:  # what the dead scheduler said of itself is over
            self._scheduler_page.set(gauge, 0)
        code = codes[generation.members.index(member)]
        if not generation.ready:
            raise StartError(f"the {member.name} {told(code)} before the model was ready", exit_code(code))
        say(f"the {member.name} (pid {member.pid}) {told(code)}")
        if self._drained_by is None:
            say(f"replacing generation {generation.number}: every running stream has got its error")
            self._page.add("tokenllm_restarts_total")
            self._start_generation(generation.number + 1)

    def _fill_slots(self) -> None:
        """Give every empty slot a gateway, once the scheduler can be told that the last one is dead."""
        generation = self._generation
        if self._drained_by is not None or generation is None:
            return
        for slot in self._slots:
            if not slot.gateway and (slot.incarnation == 0 or slot.announce_death(generation)):
                slot.incarnation += 1
                slot.gateway = self._spawn(slot)
                slot.gateway.attach(generation, slot.number)

    def _spawn(self, slot: Slot) -> Gateway:
        ours, theirs = channel()
        with theirs:
            birth = GatewayBirth(
                config=self._config,
                model_path=self._model_path,
                model_name=self._name,
                slot=slot.number,
                incarnation=slot.incarnation,
                supervisor_pid=os.getpid(),
                listen_fd=self._port.sockets[slot.number].fileno(),
                control_fd=theirs.fileno(),
                page_fds=self._page_fds,
                own_page=GATEWAY_PAGES + slot.number,
                responses_path=str(self._responses_path),
            )
            return Gateway(birth, ours)

    def _on_gateway_death(self, slot: Slot, gateway: Gateway) -> None:
        self._on_words(gateway)  # what it said before it died
        code = gateway.bury()
        slot.gateway = None
        if self._drained_by is not None:
            return
        slot.stillborn = 0 if gateway.serving else slot.stillborn + 1
        if slot.stillborn == STILLBORN_LIMIT:
            raise StartError(f"{gateway.name} {told(code)} before it served, twice in a row", exit_code(code))
        say(f"{gateway.name} (pid {gateway.pid}) {told(code)}: replacing it")
        self._page.add("tokenllm_restarts_total")

    def _on_words(self, gateway: Gateway) -> None:
        for message in gateway.words():
            match message:
                case Serving():
                    gateway.serving = True
                case ModelReady():
                    self._on_ready(gateway, message)

    def _on_ready(self, gateway: Gateway, ready: ModelReady) -> None:
        generation = self._generation
        if generation is None or generation.number != ready.generation:
            return
        gateway.ready_generation = ready.generation
        generation.ready = self._was_ready = True
        everyone = len(self._slots) == sum(other.ready_generation > 0 for other in self._gateways())
        if everyone and not self._greeted:
            self._greeted = True
            with contextlib.suppress(OSError):
                print(greeting(self._config, self._port.number, self._name, ready), flush=True)

    def _on_signal(self, signals: int) -> None:
        """The first one drains; a second one, or one while no model was ever ready, ends everything at once."""
        number = signal.Signals(os.read(signals, 1)[0])
        if self._drained_by is not None:
            say(f"{number.name} again: stopping at once")
            self._exit_code = 128 + number
        elif not self._was_ready:
            say(f"{number.name}: stopping")
            self._exit_code = 0
        else:
            self._drain(number)

    def _drain(self, number: signal.Signals) -> None:
        say(f"{number.name}: running streams have {self._config.drain_s:g} s to finish")
        self._drained_by = time.monotonic() + self._config.drain_s + GRACE_S
        self._port.close()  # a connection that no gateway takes any more is refused, and does not hang
        for gateway in self._gateways():
            gateway.tell(Drain())

    def _end(self) -> None:
        for gateway in self._gateways():
            gateway.kill()
        for gateway in self._gateways():
            gateway.bury()
        if self._generation:
            self._generation.end()


def _signals() -> int:
    """A descriptor that gives a byte for each SIGTERM or SIGINT from now on: its number."""
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(theirs)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return ours
