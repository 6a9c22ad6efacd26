from __future__ import annotations

import socket

from local import ports


def test_a_free_usual_port_is_taken() -> None:
    """The usual port is chosen when nobody listens on it."""
    usual = ports.choose()
    assert ports.choose(usual) == usual


def test_a_taken_port_is_avoided() -> None:
    """Another port is chosen when somebody listens on the usual one."""
    with socket.create_server(("127.0.0.1", ports.choose())) as listener:
        usual = listener.getsockname()[1]
        chosen = ports.choose(usual)
        assert chosen != usual
        assert chosen in ports.FREE_RANGE


def test_a_listener_on_every_address_holds_the_port() -> None:
    """A port is not free when somebody listens on it on all addresses."""
    with socket.create_server(("0.0.0.0", ports.choose())) as listener:
        assert not ports.is_free(listener.getsockname()[1])
