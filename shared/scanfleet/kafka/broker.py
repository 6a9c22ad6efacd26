"""Connections to the brokers, and the translation of client errors."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaError

from scanfleet.errors import DependencyError
from scanfleet.runtime.settings import KafkaSettings
from scanfleet.runtime.tls import FileContext

BACKOFF_MS: Final = 300  # retry backoff of a client: cheap while a broker is unavailable, and notices its recovery soon

PROBE_MS: Final = 5_000  # timeout of one connection
ADMIN_SECONDS: Final = 60.0  # timeout of an administrative command, including the start of a broker


def access(settings: KafkaSettings) -> dict[str, Any]:
    """Return the keyword arguments for address, TLS and SASL of every client.

    Raises:
        OSError: a file that the settings name cannot be read.
    """
    arguments: dict[str, Any] = {"bootstrap_servers": settings.kafka}
    protocol = "PLAINTEXT"
    if settings.kafka_ca_file is not None:
        protocol = "SSL"
        context = FileContext.of(ssl.PROTOCOL_TLS_CLIENT, settings.kafka_ca_file, label="kafka_authority")
        # Since Python 3.13 they accept a file that has only an intermediate authority.
        context.verify_flags |= ssl.create_default_context().verify_flags
        arguments["ssl_context"] = context
    if settings.kafka_username is not None:
        protocol = f"SASL_{protocol}"
        arguments |= {
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_plain_username": settings.kafka_username,
            "sasl_plain_password": settings.kafka_password,
        }
    return {**arguments, "security_protocol": protocol}


async def connect(start: Callable[[], Awaitable[None]]) -> None:
    """Call `start` until it reaches a broker; the caller sets the timeout."""
    while True:
        try:
            await start()
        except KafkaError as error:
            if not error.retriable:
                raise
            await asyncio.sleep(BACKOFF_MS / 1000)
        else:
            return


async def connection_error(arguments: Mapping[str, Any]) -> BaseException | None:
    """Return the error of a connection with the arguments of `access`, which clients do not raise; None if it succeeds."""
    (host, port, _), *_ = collect_hosts(arguments["bootstrap_servers"])
    others = {name: value for name, value in arguments.items() if name != "bootstrap_servers"}
    try:
        connection = await create_conn(host, port, request_timeout_ms=PROBE_MS, **others)
    except (OSError, KafkaError) as error:
        return error
    connection.close()
    return None


@contextmanager
def depending(on: str) -> Iterator[None]:
    """Raise client errors and timeouts as DependencyError; `on` describes the failed operation."""
    try:
        yield
    except (KafkaError, TimeoutError) as error:
        raise DependencyError(f"{on}: {error!r}") from error


@asynccontextmanager
async def administering(settings: KafkaSettings, cannot: str) -> AsyncIterator[AIOKafkaAdminClient]:
    """Yield a connected admin client; connecting and the block have `ADMIN_SECONDS` in total.

    Raises:
        DependencyError: no broker answered in time; the message starts with `cannot`.
        OSError: a file that the settings name cannot be read.
    """
    admin = AIOKafkaAdminClient(**access(settings))
    try:
        with depending(cannot):
            async with asyncio.timeout(ADMIN_SECONDS):
                await connect(admin.start)
                yield admin
    finally:
        await admin.close()
