"""The port: ours alone or a clear refusal, and shared evenly between our gateways."""

import socket
from contextlib import closing

import pytest

from tokenllm.supervisor import StartError
from tokenllm.supervisor.listening import reserve


def test_every_socket_takes_connections_on_one_port() -> None:
    with closing(reserve("127.0.0.1", 0, 3)) as port:
        port.listen()
        clients = [socket.create_connection(("127.0.0.1", port.number)) for _ in range(64)]
        taken = []
        for one in port.sockets:
            one.setblocking(False)
            taken.append(accepted(one))
        for client in clients:
            client.close()
    assert sum(taken) == 64
    assert all(taken)


def accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_a_port_in_use_is_refused_even_if_it_could_be_shared() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        number = other.getsockname()[1]
        with pytest.raises(StartError, match=f"port {number}: Address already in use"):
            reserve("127.0.0.1", number, 1)


def test_of_two_servers_that_start_at_once_one_is_refused() -> None:
    with closing(reserve("127.0.0.1", 0, 1)) as first:  # bound, but it does not listen yet
        with pytest.raises(StartError, match=f"127.0.0.1:{first.number}"):
            reserve("127.0.0.1", first.number, 1)
        first.listen()
    with closing(reserve("127.0.0.1", first.number, 1)):
        pass


def test_the_port_is_free_again_while_old_connections_linger() -> None:
    with closing(reserve("127.0.0.1", 0, 1)) as port:
        port.listen()
        client = socket.create_connection(("127.0.0.1", port.number))
        port.sockets[0].accept()[0].close()  # the side that closes first lingers in TIME_WAIT
    client.close()
    with closing(reserve("127.0.0.1", port.number, 1)) as again:
        again.listen()


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(StartError, match=r"nowhere\.invalid"):
        reserve("nowhere.invalid", 0, 1)


def test_ipv6() -> None:
    with closing(reserve("::1", 0, 2)) as port:
        port.listen()
        socket.create_connection(("::1", port.number)).close()
