"""One stack whose nmap processes run in a network namespace; all other processes run outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from typing import Final

import pytest

from local.networks import NETWORK, Network
from local.stack import Stack
from tests.client import Client

SLOTS: Final = 4
REPLICAS: Final = {"result-store": 1, "job-orchestrator": 1, "scanner-worker": 2, "api-gateway": 1}

_users: Final = count(1_000)


@pytest.fixture(scope="package")
def network() -> Iterator[Network]:
    """The network; each test scans separate addresses in it."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(Network())
        except (FileNotFoundError, PermissionError) as error:  # any other failure is a defect
            pytest.skip(
                f"network namespaces are unavailable: run the tests as root, with iproute2 and nftables: {error}"
            )
        yield made


@pytest.fixture(scope="package")
def stack(network: Network, kafka: str, mongodb: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(
        tmp_path_factory.mktemp("networks"),
        replicas=REPLICAS,
        kafka_at=kafka,
        mongodb_at=mongodb,
        topic_prefix="networks-",
        database_prefix="networks",
        settings={
            "SCANFLEET_ALLOWED_NETWORKS": NETWORK,
            "SCANFLEET_NMAP": network.nmap(tmp_path_factory.mktemp("nmap")),
            "SCANFLEET_SLOTS": str(SLOTS),
        },
    )
    stack.up()
    yield stack
    stack.down()


@pytest.fixture
def user(stack: Stack) -> Iterator[Client]:
    """A new user."""
    client = Client(stack.url, stack.token(next(_users)))
    yield client
    client.close()
