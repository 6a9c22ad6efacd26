"""Connections to the services behind the gateway: aiohttp below the transport interface of httpx2. ADR 0065."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import httpx2
from yarl import URL

from api_gateway.settings import Settings
from scanfleet.runtime.tls import client_context

CONNECT_SECONDS: Final = 1.0  # the services are in the same network
POOL_SECONDS: Final = 1.0  # timeout for a connection while all are in use
KEEPALIVE_SECONDS: Final = 3.0  # shorter than the servers' 5 s, so that no server closes a connection that is reused


class Connections(httpx2.AsyncBaseTransport):
    """A pool of connections to each service.

    Args:
        session: holds the connections.
        head_seconds: timeout until the head of an answer. aiohttp has none for writing a body.
    """

    def __init__(self, session: aiohttp.ClientSession, head_seconds: float) -> None:
        self._session = session
        self._head_seconds = head_seconds

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send the request, and return its answer with a body that is not read yet.

        A GET is sent again if its connection ends without an answer.

        Raises:
            httpx2.TransportError: the service is unavailable, or sent an invalid answer.
        """
        try:
            async with asyncio.timeout(self._head_seconds):
                answer = await self._session.request(
                    request.method,
                    URL(str(request.url), encoded=True),
                    headers=request.headers.multi_items(),
                    data=request.content or None,
                    allow_redirects=False,
                )
        except (aiohttp.ClientError, OSError) as error:  # a timeout is an OSError
            raise _fault(error) from error
        return httpx2.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer))


async def _without_repetition(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Prevent aiohttp from resending a PUT or DELETE.

    A repeated DELETE would get 404, and a repeated PUT could overwrite a change made in between.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        if request.method == "GET":
            raise
        raise aiohttp.ClientConnectionError(f"{type(error).__name__}: {error}") from error


class _Body(httpx2.AsyncByteStream):
    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._answer.content.iter_any():
                yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise _fault(error) from error

    async def aclose(self) -> None:
        self._answer.release()  # closes the connection unless the body was read to its end


def _fault(error: Exception) -> httpx2.TransportError:
    return httpx2.TransportError(f"{type(error).__name__}: {error}")


@asynccontextmanager
async def connect(
    settings: Settings, transport: httpx2.AsyncBaseTransport | None = None
) -> AsyncIterator[httpx2.AsyncBaseTransport]:
    """Open a pool of connections for the length of the block, or use `transport` if it is given.

    Raises:
        ConfigurationError: the files for TLS cannot be used.
    """
    if transport is not None:
        yield transport
        return
    connector = aiohttp.TCPConnector(
        limit=0,
        limit_per_host=settings.upstream_connections,
        keepalive_timeout=KEEPALIVE_SECONDS,
        ssl=client_context(settings) or True,
        use_dns_cache=False,  # a restarted service may have another address
    )
    timeout = aiohttp.ClientTimeout(
        connect=POOL_SECONDS + CONNECT_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=settings.upstream_seconds
    )
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        middlewares=(_without_repetition,),
    ) as session:
        yield Connections(session, POOL_SECONDS + CONNECT_SECONDS + 2 * settings.upstream_seconds)
