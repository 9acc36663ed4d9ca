"""Where ports for sandboxes come from."""

import socket

from services.sandbox.providers.ports import ephemeral_range, free_port


def test_ports_lie_where_the_kernel_takes_none_for_dialling() -> None:  # F13
    first, last = ephemeral_range()
    assert not [port for port in (free_port() for _ in range(200)) if first <= port <= last]


def test_a_port_that_is_taken_is_passed_over() -> None:  # F13
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        assert port not in {free_port() for _ in range(50)}
