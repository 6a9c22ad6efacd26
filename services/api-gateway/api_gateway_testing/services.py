"""Simulated services behind the gateway, and bodies that a test controls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import httpx2

from scanfleet.contracts.rest import IssuerKeys, Revoked
from scanfleet_testing.tokens import Issuer

Answer = Callable[[httpx2.Request], httpx2.Response]


class Services(httpx2.AsyncBaseTransport):
    """Simulated HTTP servers, by host: `orchestrator`, `result-store` and the issuer."""

    def __init__(self, issuer: Issuer) -> None:
        self.requests: list[httpx2.Request] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        for host in ("orchestrator", "result-store"):
            self.on("GET", f"http://{host}/internal/ready", httpx2.Response(200, json={"status": "ok"}))
        self.unavailable: set[str] = set()
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
        if request.url.path == "/internal/revocations" and request.url.host not in self.unavailable:
            return httpx2.Response(200, json=[each.model_dump(mode="json") for each in self.revoked])
        if request.url.path == "/internal/keys" and request.url.host not in self.unavailable:
            self.keys.append(IssuerKeys.model_validate_json(request.content))
            return httpx2.Response(200, json={"message": "Keys recorded"})
        self.requests.append(request)
        if request.url.host in self.unavailable:
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
