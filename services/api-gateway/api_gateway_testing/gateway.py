"""The gateway with fakes of all other services, and a client that reads its responses piece by piece."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
from fastapi import FastAPI
from starlette.types import Message, Scope

from api_gateway.main import create_app
from api_gateway.settings import Settings
from api_gateway_testing.replies import Replier
from api_gateway_testing.services import Services
from scanfleet.contracts.messages.topics import SCAN_COMMANDS
from scanfleet.runtime.service import create_probes
from scanfleet.security.auth import Principal
from scanfleet.services import ORCHESTRATOR, RESULT_STORE
from scanfleet_testing.bus import MemoryBroker, MemoryBus
from scanfleet_testing.tokens import InternalKeys, Issuer


@dataclass(frozen=True, slots=True)
class Running:
    """A running gateway with its fakes."""

    app: FastAPI
    client: httpx2.AsyncClient
    probes: httpx2.AsyncClient
    services: Services
    broker: MemoryBroker
    replier: Replier
    issuer: Issuer
    internal: InternalKeys

    async def caller(self, request: httpx2.Request) -> Principal:
        """Return the caller in whose name a service was called."""
        audience = {"orchestrator": ORCHESTRATOR, "result-store": RESULT_STORE}[request.url.host]
        return await self.internal.caller(audience, request.headers["authorization"])


class Client:
    """An ASGI client that receives every message of a response as it is sent, or stops reading, or disconnects."""

    def __init__(self, gateway: Running, path: str) -> None:
        self.app = gateway.app
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.leaves = asyncio.Event()
        self.takes = asyncio.Event()
        self.takes.set()
        headers = [(b"authorization", gateway.client.headers["authorization"].encode())]
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},  # as sent by uvicorn
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("gateway", 80),
        }
        self._asked = False

    async def run(self) -> None:
        await self.app(self.scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.takes.wait()
        await self.messages.put(message)


@dataclass(frozen=True, slots=True)
class Gateway:
    """Runs a gateway whose client has a token of user 7."""

    issuer: Issuer = field(default_factory=Issuer)
    provider: httpx2.AsyncBaseTransport | None = None
    """The issuer's sign-in endpoints."""

    @asynccontextmanager
    async def run(self, **settings: Any) -> AsyncIterator[Running]:
        """On a bus in memory, with any setting changed."""
        with TemporaryDirectory() as folder:
            async with self._run(InternalKeys(Path(folder)), settings) as running:
                yield running

    @asynccontextmanager
    async def _run(self, internal: InternalKeys, settings: dict[str, Any]) -> AsyncIterator[Running]:
        broker = MemoryBroker()
        services = Services(self.issuer)
        app = create_app(
            self.settings(**{"internal_key_file": internal.key_file, **settings}),
            bus=MemoryBus(broker),
            transport=services,
            issuer=self.provider,
        )
        bus = MemoryBus(broker, source=ORCHESTRATOR)
        replier = Replier(bus)
        commands = bus.consume(SCAN_COMMANDS, ORCHESTRATOR, replier)
        client = httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app, raise_app_exceptions=False),
            base_url="http://gateway",
            headers=self.issuer.bearer(7),
        )
        probes = httpx2.AsyncClient(transport=httpx2.ASGITransport(create_probes(app)), base_url="http://gateway:8081")
        async with app.router.lifespan_context(app), client, probes:
            await commands.start()
            yield Running(app, client, probes, services, broker, replier, self.issuer, internal)
            await commands.stop()

    def settings(self, **changed: Any) -> Settings:
        return Settings.model_validate(
            self.issuer.settings.model_dump()
            | {
                "kafka": "kafka.test:9092",
                "internal_key_file": "internal.pem",
                "orchestrator_url": "http://orchestrator",
                "result_store_url": "http://result-store",
            }
            | changed,
        )
