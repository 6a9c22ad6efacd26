from __future__ import annotations

import random
import socket

import pytest

from local import ports


def test_choose_with_a_free_default_port_returns_that_port() -> None:
    """The usual port is chosen if no server listens on it."""
    usual = ports.choose()
    assert ports.choose(usual) == usual


def test_choose_used_port_returns_another() -> None:
    """Another port is chosen if a server listens on the usual one."""
    with socket.create_server(("127.0.0.1", ports.choose())) as listener:
        usual = listener.getsockname()[1]
        chosen = ports.choose(usual)
        assert chosen != usual
        assert chosen in ports.FREE_RANGE


def test_is_free_with_a_listener_on_all_addresses_is_false() -> None:
    """A port is not free if a server listens on it on all addresses."""
    with socket.create_server(("0.0.0.0", ports.choose())) as listener:
        assert not ports.is_free(listener.getsockname()[1])


def test_own_ports_claimed_by_two_processes_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second claim, which another process would make in the same way, gets other ports although it prefers the same."""
    monkeypatch.setattr(random, "sample", lambda blocks, _: blocks)
    first, second = (ports._own_ports.__wrapped__() for _ in range(2))
    own = {next(first) for _ in range(ports.BLOCK)}
    assert own.isdisjoint(next(second) for _ in range(ports.BLOCK))
