"""The place of one gateway, and the process that holds it for now: its port, page and rings outlive the process."""

import socket
import sys
from collections.abc import Iterator, Sequence

from tokenllm.config import GatewayBirth
from tokenllm.control import Attach, ChannelClosed, ControlMessage, ToSupervisor, hear, tell
from tokenllm.messages import GatewayLost, Inbound
from tokenllm.ring import RingFull, Sender
from tokenllm.supervisor.child import Child
from tokenllm.supervisor.generation import Generation

GATEWAY = (sys.executable, "-m", "tokenllm.gateway")


class Gateway(Child):
    """One incarnation, and the supervisor's end of its control socket."""

    def __init__(self, birth: GatewayBirth, control: socket.socket) -> None:
        self.control = control
        self.control.setblocking(False)
        self.speaks = True
        self.serving = False
        self.ready_generation = 0
        super().__init__(f"gateway {birth.slot}", GATEWAY, birth, (birth.listen_fd, birth.control_fd, *birth.page_fds))

    def tell(self, message: ControlMessage, descriptors: Sequence[int] = ()) -> None:
        """A gateway that does not listen is as good as dead: its successor will be told."""
        try:
            tell(self.control, message, descriptors)
        except (ChannelClosed, BlockingIOError):
            self.kill()

    def words(self) -> Iterator[ControlMessage]:
        """Everything it has said and nobody has heard."""
        while self.speaks:
            try:
                yield hear(self.control, ToSupervisor).message
            except BlockingIOError:
                return
            except ChannelClosed:
                self.speaks = False  # it is about to end, and its exit code will say why

    def attach(self, generation: Generation, slot: int) -> None:
        self.tell(Attach(generation.number), generation.rings.gateways[slot].fds)

    def bury(self) -> int:
        self.control.close()
        return self.reap()


class Slot:
    def __init__(self, number: int) -> None:
        self.number = number
        self.incarnation = 0
        self.stillborn = 0  # incarnations in a row that died before they served
        self.gateway: Gateway | None = None

    def announce_death(self, generation: Generation) -> bool:
        """Speak for the last incarnation, the only producer of its ring A until it died. False if there is no room."""
        sender: Sender[Inbound] = Sender(generation.rings.gateways[self.number].to_scheduler)
        try:
            sender.send(GatewayLost(self.number, self.incarnation))
        except RingFull:
            return False
        finally:
            sender.close()
        return True
