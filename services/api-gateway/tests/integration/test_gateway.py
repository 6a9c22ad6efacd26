"""The gateway over a real broker and over real connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from uuid import uuid4

import httpx2
import pytest
import uvicorn
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from api_gateway.main import create_app
from api_gateway_testing.gateway import Gateway
from api_gateway_testing.replies import Replier
from api_gateway_testing.services import Services
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_EVENTS, SCAN_REPLIES
from scanfleet.kafka import KafkaBus
from scanfleet.kafka.topics import TopicSettings, create_topics
from scanfleet.runtime.http.connection_limits import BoundedProtocol
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.services import GATEWAY, ORCHESTRATOR
from scanfleet_testing.bus import MemoryBus
from scanfleet_testing.tokens import InternalKeys

pytestmark = pytest.mark.integration


@asynccontextmanager
async def served(app: FastAPI, http: type[asyncio.Protocol] | str = BoundedProtocol) -> AsyncIterator[str]:
    """Run the app on a separate port; yield its address."""
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as listening:  # connections made before the server is up wait in the backlog
        server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None, timeout_graceful_shutdown=1))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def test_replies_cross_kafka(kafka: str, tmp_path: Path) -> None:
    """Requests to two gateways at once each get the reply to their own command, though both read all of them."""
    prefix = f"{uuid4().hex}."
    await create_topics(TopicSettings(kafka=kafka, topic_prefix=prefix), [SCAN_COMMANDS, SCAN_EVENTS, SCAN_REPLIES])

    def bus(source: str, instance: str) -> KafkaBus:
        return KafkaBus(KafkaSettings(kafka=kafka, topic_prefix=prefix), source=source, instance=instance)

    gateway = Gateway()
    async with AsyncExitStack() as stack:
        orchestrators = bus(ORCHESTRATOR, "o-1")
        await orchestrators.start()
        stack.push_async_callback(orchestrators.stop)
        commands = orchestrators.consume(SCAN_COMMANDS, ORCHESTRATOR, Replier(orchestrators))
        await commands.start()
        stack.push_async_callback(commands.stop)
        clients = []
        keys = InternalKeys(tmp_path)
        for instance in ("g-1", "g-2"):
            app = create_app(
                gateway.settings(internal_key_file=keys.key_file),
                bus=bus(GATEWAY, instance),
                transport=Services(gateway.issuer),
            )
            await stack.enter_async_context(app.router.lifespan_context(app))
            client = httpx2.AsyncClient(
                transport=httpx2.ASGITransport(app),
                base_url="http://gateway",
                headers=gateway.issuer.bearer(),
                timeout=30,
            )
            clients.append(await stack.enter_async_context(client))

        async def post(subnet: int) -> object:
            body = {"subnet_ids": [subnet], "policy_id": 3}
            answer = await clients[subnet % 2].post("/api/v1/task", json=body)
            return answer.json()["jobs"][0]["subnet_id"]

        subnets = range(1, 41)
        assert await asyncio.gather(*(post(subnet) for subnet in subnets)) == list(subnets)


async def test_aborted_response_of_result_store_aborts_the_clients(tmp_path: Path) -> None:
    """When result-store fails in the middle of a response, the client's connection ends before the response does."""
    gateway = Gateway()
    pem = tmp_path / "issuer.pem"
    public_key = gateway.issuer.private_key.public_key()
    pem.write_bytes(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    upstream = FastAPI()
    goes_on = asyncio.Event()

    @upstream.get("/internal/revocations")
    async def revocations() -> list[str]:
        return []

    @upstream.get("/internal/jobs/41/owner")
    async def owner() -> dict[str, int]:
        return {"user_id": 7}

    @upstream.get("/api/v1/task/41/results")
    async def results() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"[1"
            await goes_on.wait()
            raise ConnectionResetError

        return StreamingResponse(body())

    async with served(upstream, "httptools") as behind:
        settings = gateway.settings(
            orchestrator_url=behind,
            result_store_url=behind,
            jwt_jwks_url=None,
            jwt_public_key_file=pem,
            internal_key_file=InternalKeys(tmp_path).key_file,
        )
        app = create_app(settings, bus=MemoryBus())
        async with served(app) as address, httpx2.AsyncClient(base_url=address) as client:
            received = b""
            with pytest.raises(httpx2.RemoteProtocolError):  # noqa: PT012 # the half before the break is looked at too
                async with client.stream("GET", "/api/v1/task/41/results", headers=gateway.issuer.bearer()) as answer:
                    assert answer.status_code == 200
                    async for piece in answer.aiter_raw():
                        received += piece
                        goes_on.set()
            assert received == b"[1"
