"""Forward requests to the services behind the gateway, and stream their answers unchanged to the client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final, Literal, TypeVar
from urllib.parse import quote, urlencode

import httpx2
import structlog
from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter, ValidationError
from starlette.types import Message, Receive, Scope, Send

from scanfleet.contracts import queries, rest
from scanfleet.contracts.messages import CommandAccepted, CommandRejected, CommandReply
from scanfleet.contracts.rest import (
    MAX_ISSUER_KEYS,
    CancelJobs,
    CancelledPage,
    Done,
    IssuerKeys,
    Revoked,
    Snapshot,
    Snapshots,
    Subject,
    UserId,
)
from scanfleet.errors import BadRequestError, DependencyError
from scanfleet.runtime import tracing
from scanfleet.runtime.http.requests import source
from scanfleet.security.auth import THE_GATEWAY, InternalTokens

SMALL_BYTES: Final = 1 << 16  # size of one read of a connection; smaller answers are read whole instead of streamed
LIMITS_SECONDS: Final = 60.0  # they change with a restart of the orchestrator
LIMITS_RETRY_SECONDS: Final = 1.0  # after a failure, which all callers share until then

_log = structlog.stdlib.get_logger(__name__)

_Answer = TypeVar("_Answer")

_OWN: Final = {
    "accept-encoding": "identity",  # answers are forwarded unchanged, so the services are not asked to compress them
    "user-agent": "scanfleet-api-gateway",
}
_FORWARDED: Final = ("accept", "content-type", "idempotency-key", "if-match", "if-none-match")
_RETURNED: Final = frozenset(
    {
        "content-type",
        "content-length",
        "content-disposition",
        "etag",
        "retry-after",
        "www-authenticate",
        "vary",
        "x-content-type-options",
    }
)
_URL: Final = lru_cache(maxsize=256)(httpx2.URL)  # clients repeat their requests
_QUERY_SAFE: Final = "!$&'()*+,;=:@/?%-._~"  # characters that RFC 3986 allows in a query, and `%` for existing escapes


class Upstream:
    """One service.

    Args:
        connections: carry the requests.
        url: the service's base URL.
        tokens: for this service.
        stalled_seconds: write timeout of a client that reads nothing.
    """

    def __init__(
        self, connections: httpx2.AsyncBaseTransport, url: str, tokens: InternalTokens, *, stalled_seconds: float
    ) -> None:
        self._connections = connections
        self._url = url.rstrip("/")
        self._tokens = tokens
        self._stalled_seconds = stalled_seconds
        self._reached = False

    async def reached(self) -> None:
        """Return if the service has been ready once since this process started.

        Routes, names and network policies of a new cluster may take effect some seconds after every pod is ready. A later
        outage of the service does not make the gateway unready: requests that need the service are answered 503 with the
        reason, and all others are answered as usual.

        Raises:
            DependencyError: the service has not answered as ready yet.
        """
        if not self._reached:
            answer = await self._ask_for_itself("GET", "/internal/ready")
            if answer.status_code != httpx2.codes.OK:
                raise DependencyError(f"{self._url} answered {answer.status_code} to GET /internal/ready")
            self._reached = True

    def identity(self, request: Request, *, with_roles: bool = False) -> dict[str, str]:
        """Return the headers of a call: caller, client address, request id and trace."""
        return {
            "authorization": self._tokens.bearer(request.scope["caller"], with_roles=with_roles),
            "x-forwarded-for": source(request),
            "x-request-id": request.scope["request_id"],
            "traceparent": tracing.current() or "",
        }

    async def forward(self, request: Request, *, with_roles: bool = False) -> Response:
        """Return the service's answer to the same request, whatever its status; as a stream unless it is small.

        Args:
            request: of the client.
            with_roles: whether the service needs the caller's roles.

        Raises:
            BadRequestError: the roles are too long.
            DependencyError: the service is unavailable.
        """
        headers = self.identity(request, with_roles=with_roles) | {
            name: ", ".join(request.headers.getlist(name)) for name in _FORWARDED if name in request.headers
        }
        # The path is one of our routes with ids in it, so only the query can contain characters that a URL must not.
        query = quote(request.scope["query_string"], safe=_QUERY_SAFE)
        target = request.scope["path"] + (f"?{query}" if query else "")
        return await self._relayed(await self._send(request.method, target, headers, await request.body()))

    async def pass_on(self, request: Request, target: str, body: bytes) -> Response:
        """Return the service's answer to a POST of the gateway itself, as `forward`.

        Raises:
            DependencyError: the service is unavailable.
        """
        headers = self.identity(request) | {"content-type": "application/json"}
        return await self._relayed(await self._send("POST", target, headers, body))

    async def _relayed(self, answer: httpx2.Response) -> Response:
        has_body = answer.status_code != httpx2.codes.NOT_MODIFIED
        if has_body and int(answer.headers.get("content-length", SMALL_BYTES + 1)) > SMALL_BYTES:
            return _Relay(answer, self._stalled_seconds)
        return _BufferedResponse(await self._read(answer), self._stalled_seconds)

    async def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> httpx2.Response:
        """Send a request of the gateway itself, and return the complete answer.

        Raises:
            DependencyError: the service is unavailable.
        """
        return await self._read(await self._send(method, target, headers, body))

    async def _ask_for_itself(self, method: str, target: str, body: bytes = b"") -> httpx2.Response:
        headers = {"authorization": self._tokens.bearer(THE_GATEWAY), "content-type": "application/json"}
        return await self._read(await self._send(method, target, headers, body))

    async def _read(self, answer: httpx2.Response) -> httpx2.Response:
        try:
            await answer.aread()
        except httpx2.HTTPError as error:
            raise DependencyError(f"{self._url}: {error!r}") from error
        finally:
            await answer.aclose()
        return answer

    async def _send(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> httpx2.Response:
        try:
            # Starlette decodes headers as Latin-1.
            encoded = {name.encode(): value.encode("latin-1") for name, value in {**_OWN, **headers}.items()}
            request = httpx2.Request(method, _URL(self._url + target), headers=encoded, content=body or None)
            answer = await self._connections.handle_async_request(request)
        except httpx2.InvalidURL as error:
            raise BadRequestError("the address is too long") from error
        except httpx2.HTTPError as error:
            raise DependencyError(f"{self._url}: {error!r}") from error
        answer.request = request
        self._tokens.learn(answer.headers.get("date"))
        if answer.status_code == httpx2.codes.UNAUTHORIZED:  # the service rejects the gateway's token, not the caller's
            await answer.aclose()
            raise DependencyError(f"{self._url} rejected the gateway's token; check that the internal keys match")
        return answer


class Orchestrator(Upstream):
    """job-orchestrator, with the gateway's own queries."""

    async def refusal(self, request: Request, job_id: int, *, hosts: bool = False) -> Response | None:
        """Return the error answer if the caller may not read this job's results, or its hosts, else None.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        target = f"/internal/jobs/{job_id}/owner{'/hosts' if hosts else ''}"
        answer = await self.ask("GET", target, self.identity(request))
        return None if answer.status_code == httpx2.codes.OK else _error(answer)

    async def exported(self, request: Request, job_id: int) -> rest.ExportedJob | Response:
        """Return the facts of a finished job, or the error answer if the caller may not export its results.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        answer = await self.ask("GET", f"/internal/jobs/{job_id}/export", self.identity(request))
        return _parse(rest.ExportedJob, answer) if answer.status_code == httpx2.codes.OK else _error(answer)

    async def latest(self, caller: Mapping[str, str], job_id: int) -> Snapshot | Response:
        """Return the current job, or the error answer if the caller may not watch it.

        Args:
            caller: the caller, as HTTP headers.
            job_id: of the job.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        answer = await self.ask("GET", f"/internal/jobs/{job_id}/latest", caller)
        return _parse(Snapshot, answer) if answer.status_code == httpx2.codes.OK else _error(answer)

    async def latest_of(self, caller: Mapping[str, str], query: queries.LatestJobs) -> Snapshots | Response:
        """Return a page of a user's current jobs, or the error answer if the caller may not watch them.

        Args:
            caller: the caller, as HTTP headers.
            query: selects the jobs.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        target = f"/internal/jobs/latest?{urlencode(query.model_dump(mode='json', exclude_defaults=True))}"
        answer = await self.ask("GET", target, caller)
        return _parse(Snapshots, answer) if answer.status_code == httpx2.codes.OK else _error(answer)

    async def cancel(self, caller: Mapping[str, str], wanted: CancelJobs) -> CancelledPage:
        """Cancel a page of the caller's unfinished jobs that match.

        Args:
            caller: the caller, as HTTP headers.
            wanted: which jobs.

        Raises:
            DependencyError: the orchestrator is unavailable; some of the page may be cancelled.
        """
        headers = {**caller, "content-type": "application/json"}
        answer = await self.ask("POST", "/internal/jobs/cancel", headers, wanted.model_dump_json().encode())
        return _parse(CancelledPage, answer)

    async def record_session(self, caller: Mapping[str, str], what: Literal["create", "refresh", "end"]) -> None:
        """Record a change of the caller's browser session in the audit log, before the change.

        Raises:
            DependencyError: the orchestrator did not record it.
        """
        answer = await self.ask("POST", f"/internal/session/{what}", caller)
        if answer.status_code != httpx2.codes.NO_CONTENT:
            raise DependencyError(f"the orchestrator answered {answer.status_code} to a session's record")

    async def user_id(self, issuer: str, subject: str) -> int:
        """Return the id of this user, which the orchestrator assigns at the first query.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        body = Subject(issuer=issuer, subject=subject).model_dump_json().encode()
        return _parse(UserId, await self._ask_for_itself("POST", "/internal/users", body)).user_id

    async def scan_limits(self) -> rest.ScanLimits:
        """Return the limits of scan targets.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        return _parse(rest.ScanLimits, await self._ask_for_itself("GET", "/internal/limits"))

    async def report_keys(self, issuer: str, keys: Sequence[str]) -> None:
        """Record the keys of the issuer that verify tokens in the audit log.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        body = IssuerKeys(issuer=issuer, keys=list(keys)[:MAX_ISSUER_KEYS]).model_dump_json().encode()
        _parse(Done, await self._ask_for_itself("POST", "/internal/keys", body))

    async def revoked(self) -> list[Revoked]:
        """Return all revocations that are in force.

        Raises:
            DependencyError: the orchestrator is unavailable.
        """
        return _parse(list[Revoked], await self._ask_for_itself("GET", "/internal/revocations"))

    async def expire(self, command_id: str, headers: Mapping[str, str]) -> CommandReply | None:
        """See `api_gateway.domain.ports.Arbiter`."""
        answer = await self.ask("POST", f"/internal/commands/{command_id}/expire", headers)
        match _parse(rest.Verdict, answer).root:
            case rest.Accepted(jobs=jobs):
                return CommandAccepted(command_id=command_id, jobs=jobs)
            case rest.Rejected(status=status, error=error):
                return CommandRejected(command_id=command_id, status=status, error=error)
            case rest.Expired():
                return None


class ScanLimits:
    """The orchestrator's limits, cached for a minute, since callers without a token can request them.

    Args:
        ask: queries the orchestrator.
        clock: in seconds.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[rest.ScanLimits]], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._clock = clock
        self._limits: rest.ScanLimits | None = None
        self._failure = ""
        self._next_query = float("-inf")
        self._lock = asyncio.Lock()

    async def read(self) -> rest.ScanLimits:
        """Return the limits; while the orchestrator is unavailable, those read last.

        Raises:
            DependencyError: it is unavailable, and they were never read.
        """
        # One caller waits for the query of old limits; the others get the old ones until it ends.
        if self._limits is None or not self._lock.locked():
            async with self._lock:  # callers that arrive during the first query share its result
                if self._clock() >= self._next_query:
                    await self._query()
        if self._limits is None:
            raise DependencyError(self._failure)
        return self._limits

    async def _query(self) -> None:
        try:
            self._limits = await self._ask()
        except DependencyError as error:
            self._failure = str(error)
            self._next_query = self._clock() + LIMITS_RETRY_SECONDS
            _log.warning("scan_limits_unavailable", error=self._failure, known=self._limits is not None)
        else:
            self._next_query = self._clock() + LIMITS_SECONDS


def in_time(send: Send, seconds: float) -> Send:
    """Return `send` with a timeout: it raises TimeoutError if the client reads nothing for so long."""

    async def send_in_time(message: Message) -> None:
        async with asyncio.timeout(seconds):
            await send(message)

    return send_in_time


class _BufferedResponse(Response):
    """A small answer that was received completely."""

    def __init__(self, answer: httpx2.Response, stalled_seconds: float) -> None:
        super().__init__(answer.content, answer.status_code, _returned(answer))
        self._stalled_seconds = stalled_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self._stalled_seconds):
            await super().__call__(scope, receive, send)


class _Relay(StreamingResponse):
    """An answer that is streamed. If one connection fails, the service's or the client's, the other one is closed."""

    def __init__(self, answer: httpx2.Response, stalled_seconds: float) -> None:
        super().__init__(answer.aiter_raw(), answer.status_code, _returned(answer))
        self._answer = answer
        self._stalled_seconds = stalled_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, in_time(send, self._stalled_seconds))
        finally:
            await self._answer.aclose()


def _parse(kind: type[_Answer], answer: httpx2.Response) -> _Answer:
    try:
        return TypeAdapter(kind).validate_json(answer.content)
    except ValidationError as error:
        raise DependencyError(f"{answer.url} answered {answer.status_code} without the expected body") from error


def _error(answer: httpx2.Response) -> Response:
    """Return the service's error answer for the client."""
    return Response(answer.content, answer.status_code, _returned(answer))


def _returned(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name in _RETURNED}
