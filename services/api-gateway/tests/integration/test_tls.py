"""TLS between the gateway and a service behind it, on real sockets: accepted and refused certificates."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvloop
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fastapi import APIRouter, FastAPI
from prometheus_client import REGISTRY
from pydantic import ValidationError

from api_gateway.connections import connect
from api_gateway_testing.gateway import Gateway
from local.credentials import LIFE, LOOPBACK, Authority
from scanfleet.errors import ConfigurationError
from scanfleet.kafka.broker import access
from scanfleet.runtime import logging, service
from scanfleet.runtime.server import Server
from scanfleet.runtime.settings import CommonSettings, InternalApiSettings, KafkaSettings
from scanfleet.runtime.tls import client_context
from scanfleet.security.audit import Refusals
from scanfleet_testing.waiting import until

pytestmark = pytest.mark.integration

LIMIT_SECONDS = 30.0  # until any of this has happened

router = APIRouter()


@router.get("/thing")
async def thing() -> int:
    return 1


class Settings(CommonSettings, InternalApiSettings):
    """Of a service behind the gateway."""


@dataclass(frozen=True, slots=True)
class Files:
    """Certificate and key of one side, and the authority that it trusts."""

    tls_ca_file: Path
    tls_certificate_file: Path
    tls_key_file: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Site:
    """An authority and its certificates."""

    def __init__(self, folder: Path, life: timedelta = LIFE) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._authority = Authority(folder.name, life)
        (folder / "ca.crt").write_text(self._authority.certificate)

    def files(self, name: str, *uses: x509.ObjectIdentifier, address: x509.GeneralName | None = LOOPBACK) -> Files:
        names = [x509.DNSName(name), *([address] if address else [])]
        extensions = [x509.SubjectAlternativeName(names), *([x509.ExtendedKeyUsage(uses)] if uses else [])]
        files = Files(*(self._folder / each for each in ("ca.crt", f"{name}.crt", f"{name}.key")))
        key, certificate = self._authority.issue(name, *extensions)
        files.tls_key_file.write_text(key)
        files.tls_certificate_file.write_text(certificate)
        return files


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def gateway(site: Site) -> Files:
    return site.files("api-gateway", ExtendedKeyUsageOID.CLIENT_AUTH)


@pytest.fixture(scope="module")
def orchestrator(site: Site) -> Files:
    return site.files("job-orchestrator", ExtendedKeyUsageOID.SERVER_AUTH)


@asynccontextmanager
async def serving(files: Files, **changed: Any) -> AsyncIterator[Server]:
    """A service behind the gateway, with this certificate."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield

    ports = {"probe_port": 0, "api_port": 0}
    given = ports | files.settings | changed
    settings = Settings(instance="test", internal_public_keys_file=Path("none"), **given)
    logging.configure("test", settings)
    server = Server(
        service.create_app(
            name="test", refusals=Refusals("test"), settings=settings, lifespan=lifespan, routers=[router]
        )
    )
    running = asyncio.create_task(server._serve())  # `serve` would end this process by the signals that it took
    await until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        await running


def url(server: Server, scheme: str = "https") -> str:
    return f"{scheme}://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server has closed the connection."""
    return reader.at_eof() or reader.exception() is not None


async def ask(server: Server, files: Files) -> httpx2.Response:
    """Return the response to the gateway with these files."""
    urls = dict.fromkeys(("orchestrator_url", "result_store_url"), url(server))
    async with connect(Gateway().settings(**urls, **files.settings)) as connections:
        answer = await connections.handle_async_request(httpx2.Request("GET", f"{url(server)}/thing"))
        await answer.aread()
        return answer


async def test_gateway_with_its_certificate_is_served(orchestrator: Files, gateway: Files) -> None:
    """With certificates of the site's authority on both sides the request is answered over TLS 1.3."""
    async with serving(orchestrator) as server:
        assert (await ask(server, gateway)).json() == 1


async def test_probes_stay_without_tls(orchestrator: Files) -> None:
    """The probe port needs no certificate, and the API port answers no request in clear text."""
    async with serving(orchestrator) as server, httpx2.AsyncClient() as client:
        assert (await client.get(f"http://127.0.0.1:{server.probe_port}/readyz")).status_code == 200
        with pytest.raises(httpx2.TransportError):
            await client.get(f"{url(server, 'http')}/thing")


async def test_client_without_a_certificate_is_refused(orchestrator: Files, gateway: Files) -> None:
    """A client that trusts the authority but has no certificate gets no response."""
    context = ssl.create_default_context(cafile=str(gateway.tls_ca_file))
    async with serving(orchestrator) as server, httpx2.AsyncClient(verify=context) as client:
        with pytest.raises(httpx2.TransportError):
            await client.get(f"{url(server)}/thing")


async def test_client_of_another_authority_is_refused(orchestrator: Files, gateway: Files, tmp_path: Path) -> None:
    """A client with the right name but a certificate of another authority gets no response."""
    forged = Site(tmp_path).files("api-gateway", ExtendedKeyUsageOID.CLIENT_AUTH)
    async with serving(orchestrator) as server:
        with pytest.raises(httpx2.TransportError):
            await ask(server, replace(forged, tls_ca_file=gateway.tls_ca_file))


async def test_server_of_another_authority_gets_no_request(gateway: Files, tmp_path: Path) -> None:
    """The gateway sends no request to a server whose certificate another authority has signed."""
    forged = Site(tmp_path).files("job-orchestrator", ExtendedKeyUsageOID.SERVER_AUTH)
    async with serving(replace(forged, tls_ca_file=gateway.tls_ca_file)) as server:
        with pytest.raises(httpx2.TransportError, match="CERTIFICATE_VERIFY_FAILED"):
            await ask(server, gateway)


async def test_server_with_another_name_gets_no_request(site: Site, gateway: Files) -> None:
    """The gateway sends no request to a server whose certificate does not have the name in the URL."""
    other = site.files("elsewhere", ExtendedKeyUsageOID.SERVER_AUTH, address=None)
    async with serving(other) as server:
        with pytest.raises(httpx2.TransportError, match=r"not valid for '127\.0\.0\.1'"):
            await ask(server, gateway)


async def test_server_certificate_is_refused_as_a_clients(orchestrator: Files, site: Site) -> None:
    """The certificate of a service behind the gateway, which is for servers, is refused by another service."""
    result_store = site.files("result-store", ExtendedKeyUsageOID.SERVER_AUTH)
    async with serving(orchestrator) as server:
        with pytest.raises(httpx2.TransportError):
            await ask(server, result_store)


@pytest.mark.parametrize("name", ["scanner-worker", "xapi-gateway", "api-gateway.example.com"])
async def test_client_with_another_name_is_refused(orchestrator: Files, site: Site, name: str) -> None:
    """A certificate of the authority for any client but the gateway is answered 403, whatever the request."""
    other = site.files(name)
    context = client_context(Settings(internal_public_keys_file=Path("none"), **other.settings))
    async with serving(orchestrator) as server:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.servers[0].sockets[0].getsockname()[1], ssl=context
        )
        async with asyncio.timeout(LIMIT_SECONDS):
            assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
        writer.close()


async def test_client_that_begins_no_handshake_is_disconnected(orchestrator: Files) -> None:
    """The timeout of headers applies to the TLS handshake too."""
    async with serving(orchestrator, header_seconds=0.1) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
        async with asyncio.timeout(LIMIT_SECONDS):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()


@pytest.mark.proves("A19")
async def test_handshakes_in_progress_are_counted_as_connections(orchestrator: Files, gateway: Files) -> None:
    """Clients that finish no handshake hold as many connections as any others, and keep no gateway out."""
    async with serving(orchestrator, header_seconds=10 * LIMIT_SECONDS, max_connections=5) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
        for _, writer in clients[::2]:
            writer.write(bytes.fromhex("160301020001"))  # the beginning of a ClientHello
        assert (await ask(server, gateway)).json() == 1
        await until(lambda: sum(ended(reader) for reader, _ in clients) >= 45)
        for _, writer in clients:
            writer.transport.abort()


async def test_handshake_and_connection_are_counted_once(orchestrator: Files, gateway: Files) -> None:
    """At a limit of one connection a request is answered, and then another."""
    async with serving(orchestrator, max_connections=1) as server:
        assert (await ask(server, gateway)).json() == 1
        assert (await ask(server, gateway)).json() == 1


async def test_older_tls_is_refused(orchestrator: Files, gateway: Files) -> None:
    """A client that supports TLS 1.2 at most gets no response."""
    context = ssl.create_default_context(cafile=str(gateway.tls_ca_file))
    context.load_cert_chain(gateway.tls_certificate_file, gateway.tls_key_file)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with serving(orchestrator) as server, httpx2.AsyncClient(verify=context) as client:
        with pytest.raises(httpx2.TransportError):
            await client.get(f"{url(server)}/thing")


def test_new_connections_use_replaced_files(tmp_path: Path) -> None:
    """Certificates and authorities that are replaced on both sides are used without a restart, also by uvloop."""
    sites = [Site(tmp_path / name) for name in ("old", "new")]
    server_files, new_server = (site.files("job-orchestrator", ExtendedKeyUsageOID.SERVER_AUTH) for site in sites)
    client_files, new_client = (site.files(name) for site, name in zip(sites, ("another", "api-gateway"), strict=True))
    context = client_context(Settings(internal_public_keys_file=Path("none"), **client_files.settings))

    async def exchange(server: Server) -> tuple[bytes, bytes]:
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        presented = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.write(b"GET /thing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        status = (await reader.read())[9:12]
        writer.close()
        return status, presented

    def certificate(files: Files) -> bytes:
        return ssl.PEM_cert_to_DER_cert(files.tls_certificate_file.read_text())

    async def renewal() -> None:
        async with serving(server_files) as server, asyncio.timeout(LIMIT_SECONDS):
            old = certificate(server_files)
            assert await exchange(server) == (b"403", old)
            shutil.copy(new_server.tls_certificate_file, server_files.tls_certificate_file)
            assert await exchange(server) == (b"403", old)  # its key does not match yet
            for replaced, by in ((server_files, new_server), (client_files, new_client)):
                for name in replaced.settings:
                    shutil.copy(getattr(by, name), getattr(replaced, name))
            assert await exchange(server) == (b"200", certificate(new_server))

    uvloop.run(renewal())


def test_file_that_is_no_certificate_ends_the_start(gateway: Files) -> None:
    """A file with invalid content is an error at start that names it."""
    files = replace(gateway, tls_certificate_file=gateway.tls_key_file)
    with pytest.raises(ConfigurationError, match=re.escape(str(gateway.tls_key_file))):
        client_context(Settings(internal_public_keys_file=Path("none"), **files.settings))


def days_left(file: str) -> float:
    """Return the days until the expiry in the metric."""
    expiry = REGISTRY.get_sample_value("scanfleet_certificate_expiry_timestamp_seconds", {"file": file})
    assert expiry is not None
    return (expiry - datetime.now(UTC).timestamp()) / 86400


def test_expiry_of_the_certificates_in_use_is_exported(tmp_path: Path) -> None:
    """The metric has the expiry of the own certificate, and of the authority that expires first."""
    files = Site(tmp_path, timedelta(days=30)).files("api-gateway")
    with files.tls_ca_file.open("a") as authorities:
        authorities.write(Authority("another", timedelta(days=20)).certificate)
    client_context(Settings(internal_public_keys_file=Path("none"), **files.settings))
    assert (days_left("certificate"), days_left("authority")) == pytest.approx((30, 20), abs=0.01)


def test_expiry_of_the_brokers_authority_is_exported(gateway: Files, tmp_path: Path) -> None:
    """The metric has the expiry of the authority of the brokers beside that of the services."""
    client_context(Settings(internal_public_keys_file=Path("none"), **gateway.settings))
    brokers = Site(tmp_path, timedelta(days=10)).files("broker")
    access(KafkaSettings(kafka="h:1", kafka_ca_file=brokers.tls_ca_file))
    assert (days_left("kafka_authority"), days_left("authority")) == pytest.approx((10, LIFE.days), abs=1)


def test_certificate_without_its_key_changes_no_expiry_and_is_logged_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The expiry stays that of the certificate in use until the key is replaced too; the mismatch is logged once."""
    old, new = (Site(tmp_path / str(days), timedelta(days=days)).files("api-gateway") for days in (20, 60))
    settings = Settings(internal_public_keys_file=Path("none"), **old.settings)
    logging.configure("test", settings)
    context = client_context(settings)
    assert context is not None

    def begin_connections() -> None:
        for _ in range(3):
            context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="h")

    shutil.copy(new.tls_certificate_file, old.tls_certificate_file)
    begin_connections()
    assert days_left("certificate") == pytest.approx(20, abs=0.01)
    assert capsys.readouterr().out.count("certificate_files_unusable") == 1
    old.tls_key_file.unlink()
    begin_connections()
    assert capsys.readouterr().out.count("certificate_files_unusable") == 1
    shutil.copy(new.tls_key_file, old.tls_key_file)
    begin_connections()
    assert days_left("certificate") == pytest.approx(60, abs=0.01)
    assert capsys.readouterr().out == ""


def test_context_of_the_brokers_has_the_default_flags(gateway: Files) -> None:
    """Brokers are verified with the default flags of this Python; since 3.13 they accept an intermediate authority alone."""
    context = access(KafkaSettings(kafka="h:1", kafka_ca_file=gateway.tls_ca_file))["ssl_context"]
    assert context.verify_flags == ssl.create_default_context().verify_flags


def test_files_without_each_other_are_refused(gateway: Files) -> None:
    """One or two of the three files without the others are an error."""
    with pytest.raises(ValidationError, match="set all of"):
        Settings(internal_public_keys_file=Path("none"), tls_ca_file=gateway.tls_ca_file)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_urls_that_do_not_match_the_certificates_are_refused(gateway: Files, scheme: str) -> None:
    """The gateway starts neither with certificates and http URLs nor with https URLs and no certificate."""
    urls = {"orchestrator_url": f"{scheme}://o", "result_store_url": "https://r"}
    with pytest.raises(ValidationError, match="https with"):
        Gateway().settings(**urls, **(gateway.settings if scheme == "http" else {}))
