"""One stack of real processes, with two replicas of most services, and real servers to find."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from local import nmap
from local.stack import Stack
from scanfleet.services import SERVICES
from tests.client import Client
from tests.e2e.collector import Collector, collecting

REPLICAS = dict.fromkeys(SERVICES, 2)


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """Receives the stack's sampled traces."""
    with collecting() as collector:
        yield collector


# An idle stack would keep a core busy: it ends with the tests of this folder.
@pytest.fixture(scope="package")
def stack(
    kafka: str,
    mongodb: str,
    collector: Collector,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Stack]:
    stack = Stack(
        tmp_path_factory.mktemp("stack"),
        replicas=REPLICAS,
        kafka_at=kafka,
        mongodb_at=mongodb,
        topic_prefix="e2e-",
        database_prefix="e2e",
        settings={"SCANFLEET_OTLP_ENDPOINT": collector.url, "SCANFLEET_OTLP_RATIO": "0"},
        settings_of={"api-gateway": {"SCANFLEET_TRUSTED_PROXIES": "127.0.0.1/32"}},  # whose sampled flags are obeyed
    )
    stack.up()
    yield stack
    stack.down()


@pytest.fixture(scope="package")
def user(stack: Stack) -> Iterator[Client]:
    client = Client(stack.url, stack.token(7))
    yield client
    client.close()


@pytest.fixture(scope="package")
def stranger(stack: Stack) -> Iterator[Client]:
    client = Client(stack.url, stack.token(8))
    yield client
    client.close()


@pytest.fixture(scope="package")
def admin(stack: Stack) -> Iterator[Client]:
    client = Client(stack.url, stack.token(9, admin=True))
    yield client
    client.close()


@pytest.fixture(scope="package")
def servers() -> Iterator[nmap.OpenPorts]:
    """Open listening sockets on some addresses of 127.9.8.0/24; yield their addresses and ports."""
    places = {(f"127.9.8.{host}", port) for host in (1, 7, 70, 130, 200, 254) for port in (8022, 8080)}
    with ExitStack() as stack:
        for place in places:
            listener = stack.enter_context(socket.socket())
            listener.bind(place)
            listener.listen(1024)  # no accept needed: the kernel completes the handshakes
        yield places


@pytest.fixture(scope="package")
def running_nmaps(stack: Stack) -> Callable[[], list[int]]:
    """Return a function that lists the pids of the stack's running nmap processes."""

    def find() -> list[int]:
        workers = {each.pid for each in stack.processes() if each.pid and each.name.startswith("scanner-worker")}
        return nmap.running_under(workers)

    return find
