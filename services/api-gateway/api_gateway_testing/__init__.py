"""The gateway with fakes of all other services."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
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
from scanfleet.clock import utc_now
from scanfleet.contracts.messages import CancelJob, CommandAccepted, CommandReply, Job, JobStatus, SubmitJobs
from scanfleet.contracts.messages.topics import SCAN_COMMANDS, SCAN_REPLIES
from scanfleet.contracts.rest import IssuerKeys, Revoked
from scanfleet.runtime.bus import Bus, Record
from scanfleet.runtime.service import create_probes
from scanfleet.security.auth import Principal
from scanfleet.services import ORCHESTRATOR, RESULT_STORE
from scanfleet_testing.bus import MemoryBroker, MemoryBus
from scanfleet_testing.tokens import InternalKeys, Issuer

Answer = Callable[[httpx2.Request], httpx2.Response]
Command = SubmitJobs | CancelJob


class Services(httpx2.AsyncBaseTransport):
    """Simulated HTTP servers, by host: `orchestrator`, `result-store` and the issuer."""

    def __init__(self, issuer: Issuer) -> None:
        self.requests: list[httpx2.Request] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        for host in ("orchestrator", "result-store"):
            self.on("GET", f"http://{host}/internal/ready", httpx2.Response(200, json={"status": "ok"}))
        self.away: set[str] = set()
        self.revoked: list[Revoked] = []
        self.keys: list[IssuerKeys] = []
        """The reports of the issuer's keys."""
        self.verdict: httpx2.Response | None = None
        """The orchestrator's answer to a request to expire any command."""

        self._issuer = issuer

    def on(self, method: str, url: str, answer: Answer | httpx2.Response) -> None:
        """Set the answer of a route; other routes are a 404."""
        self.answers[method, url] = (lambda _request: answer) if isinstance(answer, httpx2.Response) else answer

    def asked(self, host: str) -> list[httpx2.Request]:
        """Return the requests to that host."""
        return [request for request in self.requests if request.url.host == host]

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "issuer.test":
            return httpx2.Response(200, content=json.dumps(self._issuer.jwks))
        if request.url.path == "/internal/revocations" and request.url.host not in self.away:
            return httpx2.Response(200, json=[each.model_dump(mode="json") for each in self.revoked])
        if request.url.path == "/internal/keys" and request.url.host not in self.away:
            self.keys.append(IssuerKeys.model_validate_json(request.content))
            return httpx2.Response(200, json={"message": "Keys recorded"})
        self.requests.append(request)
        if request.url.host in self.away:
            raise httpx2.ConnectError("refused", request=request)
        if self.verdict and request.url.path.endswith("/expire"):
            return _fresh(self.verdict)
        path = str(request.url.copy_with(query=None))
        answer = self.answers.get((request.method, path))
        return _fresh(answer(request) if answer else httpx2.Response(404, json={"error": "Not Found"}))


def _fresh(answer: httpx2.Response) -> httpx2.Response:
    """Return the response as from the network: not read yet."""
    if not answer.is_closed:
        return answer
    return httpx2.Response(answer.status_code, headers=answer.headers, stream=httpx2.ByteStream(answer.content))


class Stream(httpx2.AsyncByteStream):
    """A body that is sent piece by piece, each when `go` permits it, and may fail after the last."""

    def __init__(self, *pieces: bytes, breaks: bool = False) -> None:
        self.pieces = pieces
        self.breaks = breaks
        self.go = asyncio.Semaphore(0)
        self.closed = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            await self.go.acquire()
            yield piece
        if self.breaks:
            raise httpx2.RemoteProtocolError("peer closed connection without sending complete message body")

    async def aclose(self) -> None:
        self.closed.set()


class Replier:
    """The orchestrator's side of the bus: answers each command with the result of `reply`, or not at all if it is None."""

    def __init__(self, bus: Bus) -> None:
        self.commands: list[Command] = []
        self.reply: Callable[[Command], Awaitable[Sequence[CommandReply]]] = accept
        self._bus = bus

    async def handle(self, records: Sequence[Record]) -> None:
        for record in records:
            command = record.message
            if isinstance(command, (SubmitJobs, CancelJob)):
                self.commands.append(command)
                await self._bus.publish(SCAN_REPLIES, await self.reply(command))


async def accept(command: Command) -> Sequence[CommandReply]:
    """Accept every command."""
    if isinstance(command, CancelJob):
        return [CommandAccepted(command_id=command.command_id, jobs=(job(command.job_id, JobStatus.CANCELLED),))]
    jobs = tuple(job(number, subnet_id=subnet) for number, subnet in enumerate(command.subnet_ids, 1))
    return [CommandAccepted(command_id=command.command_id, jobs=jobs)]


async def silence(_command: Command) -> Sequence[CommandReply]:
    """Send no reply, like an unavailable orchestrator."""
    return []


def job(id_: int, status: JobStatus = JobStatus.PENDING, *, subnet_id: int = 5) -> Job:
    now = utc_now()
    return Job(
        id=id_,
        user_id=7,
        policy_id=3,
        subnet_id=subnet_id,
        status=status,
        start_time=None,
        end_time=now if status is JobStatus.CANCELLED else None,
        created_at=now,
        updated_at=now,
    )


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
