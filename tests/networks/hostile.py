"""Servers that refer to other machines in every field of their protocols, to detect a scanner that follows references."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import AuthorityInformationAccessOID, NameOID

from local.networks import Network

TCP_PORTS: Final = "21,22,53,80,443,445,8000,8080"
UDP_PORTS: Final = "53,161"

_Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(network: Network, address: str, elsewhere: str, folder: Path) -> AsyncIterator[None]:
    """Serve at `address` and refer to `elsewhere`, by address and by name."""
    name = f"{elsewhere.replace('.', '-')}.example.com"
    url, named = f"http://{elsewhere}", f"http://{name}"
    page = _page(url, named)
    redirect = _http("302 Found", f"Location: {url}/moved\r\nRefresh: 0; url={url}/refresh\r\n", "")
    redirect_to_name = _http("301 Moved Permanently", f"Location: {named}/moved\r\n", "")
    servers: dict[int, _Talk] = {
        21: _greeting(f"220 {name} {elsewhere} see {url}/ and {named}/\r\n".encode()),
        22: _ssh(f"SSH-2.0-see_{url}/_{named}/\r\n".encode()),
        53: _dns_over_tcp(name),
        80: _answering(page),
        443: _answering(page),
        445: _smb(name),
        8000: _answering(redirect_to_name),
        8080: _answering(redirect),
    }
    datagrams: dict[int, Callable[[bytes], bytes]] = {53: lambda asked: _dns(asked, name), 161: lambda _: _SNMP}
    tls = _tls(folder, name, elsewhere)
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for port, talk in servers.items():
            made = network.on_scanned_side(partial(socket.create_server, (address, port)))
            context = tls if port == 443 else None
            await stack.enter_async_context(await asyncio.start_server(_quiet(talk), sock=made, ssl=context))
        for port, answer in datagrams.items():
            bound = network.on_scanned_side(partial(socket.socket, type=socket.SOCK_DGRAM))
            bound.bind((address, port))
            transport, _ = await loop.create_datagram_endpoint(partial(_Datagrams, answer), sock=bound)
            stack.callback(transport.close)
        yield


def _quiet(talk: _Talk) -> _Talk:
    async def talk_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A scanner may close the connection at any time.
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            async with asyncio.timeout(1):
                await talk(reader, writer)
                await writer.drain()
        writer.close()

    return talk_and_close


def _page(url: str, named: str) -> bytes:
    places = [f"{place}/{number}" for place in (url, named) for number in range(3)]
    body = "".join(
        [
            f'<html><head><title>see {url}/ and {named}/</title><base href="{url}/">',
            f'<meta http-equiv="refresh" content="0; url={url}/meta">',
            *(f'<script src="{place}.js"></script><link rel="stylesheet" href="{place}.css">' for place in places),
            "</head><body>",
            *(
                f'<a href="{place}.html">a</a><iframe src="{place}"></iframe><img src="{place}.png">'
                for place in places
            ),
            f'<form action="{url}/form" method="post"><input name="a"></form></body></html>',
        ],
    )
    headers = (
        f'Link: <{url}/link>; rel="preload"\r\nContent-Location: {url}/\r\nAlt-Svc: h2="{url[7:]}:80"\r\n'
        f"X-Forwarded-Host: {named[7:]}\r\nSet-Cookie: a=b; domain={named[7:]}\r\n"
    )
    return _http("200 OK", headers, body)


def _http(status: str, headers: str, body: str) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nServer: Unheard-of/1 (see http://elsewhere.example.com/)\r\n{headers}"
        f"Content-Type: text/html\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


def _answering(answer: bytes) -> _Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        writer.write(answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if asked.startswith(b"HEAD ") else answer)

    return talk


def _greeting(words: bytes) -> _Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        await reader.readuntil(b"\n")
        writer.write(b"500 no\r\n")

    return talk


def _ssh(version: bytes) -> _Talk:
    """Key exchange up to the host key, which is a text."""

    def string(text: bytes) -> bytes:
        return struct.pack(">I", len(text)) + text

    def packet(payload: bytes) -> bytes:
        padding = 16 - (len(payload) + 5) % 8
        return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)

    lists = (b"diffie-hellman-group1-sha1", b"ssh-rsa", b"aes128-cbc", b"aes128-cbc", b"hmac-sha1", b"hmac-sha1")
    offer = b"\x14" + bytes(16) + b"".join(map(string, (*lists, b"none", b"none", b"", b""))) + bytes(5)
    key = string(b"ssh-rsa") + string(b"\x03") + string(b"\x00" + b"\xa5" * 128)
    reply = b"\x1f" + string(key) + string(b"\x02") + string(string(b"ssh-rsa") + string(bytes(128)))

    async def read_packet(reader: asyncio.StreamReader) -> None:
        (length,) = struct.unpack(">I", await reader.readexactly(4))
        await reader.readexactly(length)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(version)
        await reader.readuntil(b"\n")
        writer.write(packet(offer))
        await read_packet(reader)
        await read_packet(reader)
        writer.write(packet(reply))

    return talk


def _smb(name: str) -> _Talk:
    """SMB 1 without extended security, up to a share."""
    words = f"{name}\0".encode()
    negotiated = struct.pack("<HBHHIIIIqhB", 0, 3, 1, 1, 65_535, 65_536, 0, 0, 133_000_000_000_000_000, 0, 8)
    answers = {
        0x72: (negotiated, bytes(8) + f"{name}\0{name}\0".encode("utf-16-le")),
        0x73: (struct.pack("<BBHH", 0xFF, 0, 0, 0), words * 3),
        0x75: (struct.pack("<BBHH", 0xFF, 0, 0, 0), b"IPC\0\0"),
    }

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            (length,) = struct.unpack(">I", await reader.readexactly(4))
            asked = await reader.readexactly(min(length, 65_536))
            parameters, data = answers.get(asked[4], (b"", b""))
            header = (
                b"\xffSMB" + asked[4:5] + bytes(4) + b"\x80" + bytes(14) + struct.pack("<HHHH", 1, 1, 1, *asked[30:31])
            )
            body = header + bytes([len(parameters) // 2]) + parameters + struct.pack("<H", len(data)) + data
            writer.write(struct.pack(">I", len(body)) + body)

    return talk


def _dns(asked: bytes, name: str) -> bytes:
    """A TXT record, an address of another name, and a referral to other servers."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\0"
    text = bytes([len(name)]) + name.encode()

    def record(kind: int, class_: int, data: bytes) -> bytes:
        return b"\xc0\x0c" + struct.pack(">HHIH", kind, class_, 60, len(data)) + data

    question = asked[12 : asked.index(b"\0", 12) + 5] if asked.count(b"\0", 12) else b"\0\0\x10\0\x03"
    answers = record(16, 3, text) + record(5, 1, labels)
    return asked[:2] + struct.pack(">HHHHH", 0x8580, 1, 2, 1, 0) + question + answers + record(2, 1, labels)


def _dns_over_tcp(name: str) -> _Talk:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack(">H", await reader.readexactly(2))
        answer = _dns(await reader.readexactly(length), name)
        writer.write(struct.pack(">H", len(answer)) + answer)

    return talk


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if len(data) > 16:  # a question; nmap also sends less
            self._transport.sendto(self._answer(data), addr)


def _ber(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return bytes([tag, len(body)]) + body


_ENGINE: Final = _ber(0x04, b"\x80\x00\x1f\x88\x04see http://elsewhere.example.com/")
_USM: Final = _ber(0x30, _ENGINE, _ber(2, b"\x01"), _ber(2, b"\x01"), _ber(0x04), _ber(0x04), _ber(0x04))
_SNMP: Final = _ber(
    0x30,
    _ber(2, b"\x03"),
    _ber(0x30, _ber(2, b"\x4a\x69"), _ber(2, b"\x00\xff\xe3"), _ber(0x04, b"\x00"), _ber(2, b"\x03")),
    _ber(0x04, _USM),
    _ber(0x30, _ENGINE, _ber(0x04), _ber(0xA8, _ber(2, b"\x37\xf0"), _ber(2, b"\x00"), _ber(2, b"\x00"), _ber(0x30))),
)
"""A report with the engine's id, which is a text."""


def _tls(folder: Path, name: str, elsewhere: str) -> ssl.SSLContext:
    """A certificate that refers to other machines and to a revocation service."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    url = x509.UniformResourceIdentifier(f"http://{elsewhere}/ca")
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ip_address(elsewhere)), url]),
            critical=False,
        )
        .add_extension(
            x509.AuthorityInformationAccess([x509.AccessDescription(AuthorityInformationAccessOID.OCSP, url)]),
            critical=False,
        )
        .add_extension(x509.CRLDistributionPoints([x509.DistributionPoint([url], None, None, None)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.set_ciphers("DEFAULT:AES128-SHA")  # nmap's TLS probes offer only old ciphers
    return context
