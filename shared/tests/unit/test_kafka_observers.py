"""The observers of topics and groups in tests."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import Awaitable, Callable

import pytest
from aiokafka.errors import KafkaError

from scanfleet.contracts.messages.topics import SCAN_WORKERS
from scanfleet_testing.kafka import behind, read

OBSERVERS: list[Callable[[str], Awaitable[object]]] = [
    lambda bootstrap: read(bootstrap, SCAN_WORKERS),
    lambda bootstrap: behind(bootstrap, "group", SCAN_WORKERS),
]


@pytest.mark.parametrize("observe", OBSERVERS, ids=["read", "behind"])
async def test_observer_of_a_broker_that_hangs_up_closes_its_clients(
    observe: Callable[[str], Awaitable[object]],
) -> None:
    """A client whose start fails is closed, so that no later test reports its connections."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    gc.collect()  # garbage of earlier tests is not reported here
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        with pytest.raises(KafkaError):
            await observe(f"127.0.0.1:{port}")
        gc.collect()
    server.close()
    await server.wait_closed()
    assert [str(each.message) for each in caught] == []
